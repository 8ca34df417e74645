"""Conversations by the chat template of a tokenizer."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.decode.stream import settled
from lin_jax.decode.text import TextGenerator
from lin_jax.settings.base import ConfigError, require


class ChatTemplate:
    """Writes a conversation as the token ids that a model was trained on."""

    def __init__(self, directory: Path):
        """Read the template among a tokenizer's files.

        Raises:
            ConfigError: there is none.
        """
        import transformers

        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # whatever the files of others hold
            raise ConfigError(
                f"chat needs a tokenizer in Hugging Face's form, but {directory} has none ({_first_line(error)})"
            ) from error
        require(
            bool(self._tokenizer.chat_template),
            f"chat needs a chat template, but the tokenizer in {directory} has none: take a model that was trained to "
            "chat, or put its chat_template.jinja there",
        )

    def tokens(self, messages: list[dict[str, str]]) -> np.ndarray:
        """Token ids of the messages and of what an answer begins with, int32.

        Raises:
            ConfigError: the template refuses them.
        """
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template may raise anything
            raise ConfigError(f"the chat template fails: {_first_line(error)}") from error
        return np.array(ids, np.int32)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Chat:
    """A conversation with a model.

    Attributes:
        messages: all that was said, in the form of chat templates; an answer that was stopped as far as it was shown.
    """

    def __init__(self, generator: TextGenerator, template: ChatTemplate):
        """Begin one.

        Raises:
            ConfigError: several samples are asked for.
        """
        require(generator.config.samples == 1, "a chat has one answer each: leave samples at 1")
        self._generator, self._template = generator, template
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text` in pieces.

        Raises:
            ConfigError: the conversation is too long for the model.
        """
        tokens = self._template.tokens([*self.messages, {"role": "user", "content": text}])
        self._generator.check(len(tokens))
        answer = {"role": "assistant", "content": ""}
        self.messages += [{"role": "user", "content": text}, answer]
        for row in self._generator.reply(tokens):
            whole, shown = settled(row, self._generator.config.stop), len(answer["content"])
            answer["content"] = whole
            yield whole[shown:]


def talk(generator: TextGenerator, template: ChatTemplate) -> None:
    """Answer lines of standard input on standard output. Ctrl-C stops an answer, Ctrl-D ends."""
    chat = Chat(generator, template)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "")
            return
        if text.strip():
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        for piece in chat.say(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ConfigError as error:
        chat.messages.clear()
        print(f"error: {error} (the conversation starts anew)", file=sys.stderr)
        return
    print()

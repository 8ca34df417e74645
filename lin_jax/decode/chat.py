"""Conversations by the chat template of a tokenizer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.decode.stream import settled
from lin_jax.decode.text import TextGenerator
from lin_jax.settings.base import ConfigError, first_line, require

# What a chat template may take; libraries alone map some gigabytes.
_TEMPLATE_BYTES, _TEMPLATE_TOKENS = 8 << 30, 1 << 22
# Seconds to wait for it at most, also where the machine is busy.
_PATIENCE = 300


class ChatTemplate:
    """Writes a conversation as the token ids that a model was trained on.

    Templates are programs of whoever made the tokenizer, so each time one runs in a process of its own, under limits.
    """

    def __init__(self, directory: Path, seconds: int = 10):
        """Read the template among a tokenizer's files.

        Args:
            directory: the tokenizer's, in Hugging Face's form.
            seconds: of the processor that the template may take.

        Raises:
            ConfigError: there is none.
        """
        import transformers

        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # whatever the files of others hold
            raise ConfigError(
                f"chat needs a tokenizer in Hugging Face's form, but {directory} has none ({first_line(error)})"
            ) from error
        require(
            bool(tokenizer.chat_template),
            f"chat needs a chat template, but the tokenizer in {directory} has none: take a model that was trained to "
            "chat, or put its chat_template.jinja there",
        )
        self._directory, self._seconds = directory, seconds
        self._process = self._start()

    def tokens(self, messages: list[dict[str, str]]) -> np.ndarray:
        """Return token ids of the messages and of what an answer begins with, int32.

        Raises:
            ConfigError: the template refuses them, or goes beyond its limits.
        """
        limits = {"seconds": self._seconds, "bytes": _TEMPLATE_BYTES, "tokens": _TEMPLATE_TOKENS}
        process = self._process
        try:
            said, _ = process.communicate(json.dumps({"messages": messages, **limits}).encode(), _PATIENCE)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            self.close()
            self._process = self._start()  # It takes seconds to get ready, while the answer is made.
        try:
            answer = json.loads(said)
        except ValueError:  # It ended before all was said.
            answer = {}
        problem = answer.get("error", f"it does not end in {self._seconds} seconds, or takes too much memory")
        require("ids" in answer, f"the chat template fails: {problem}")
        return np.array(answer["ids"], np.int32)

    def close(self) -> None:
        """End the process that waits for messages."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        """Return a process that has read the tokenizer and waits for messages."""
        program = str(Path(__file__).with_name("template_process.py"))
        # In a session of its own, where Ctrl-C does not reach it.
        return subprocess.Popen(
            # -P: the files beside it are no modules for the libraries to import.
            [sys.executable, "-P", program, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


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
        """Yield the answer to `text` in pieces.

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
            text.encode()
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeError:
            print("error: what was said is not UTF-8", file=sys.stderr)
            continue
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "")
            return
        if text.strip():
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    """Print the answer as it comes; a conversation that cannot go on starts anew."""
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

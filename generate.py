r"""Continue texts: python generate.py --checkpoint MODEL --prompt "Once upon a time" --temperature 0.8

A model that reads a source, such as T5, takes prompts for sources, and gives what it writes of them alone.

Prompts come in one of three ways:

  --prompt TEXT ...   Texts go to standard output as they come, and nothing else does: speed goes to standard error.
  --prompt_file IN.jsonl --output OUT.jsonl
                      Each line {"prompt": TEXT, ...} gives a line {..., "line": 1, "sample": 0, "completion": TEXT,
                      "tokens": 57} for each sample, in the order of the input. A job that was interrupted has kept what
                      was done, and in OUT.jsonl.settings how; the same command with --resume goes on.
  --chat              A conversation. Ctrl-C stops an answer, Ctrl-D ends.

For example, three samples of each prompt, each a paragraph, with guesses from the text itself to be faster:

  python generate.py --checkpoint runs/llama --prompt_file prompts.jsonl --output texts.jsonl \
      --samples 3 --temperature 0.8 --top_p 0.95 --stop $'\n\n' --draft lookup
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

from lin_jax.settings.program import exit_code


def run(arguments: Sequence[str] | None) -> None:
    """Do what is asked for; what can be checked without the model is checked before it is read."""
    # Imported here because it takes seconds, in which Ctrl-C is answered already.
    from lin_jax.convert.load import load, tokenizer_files_of
    from lin_jax.decode.arguments import config_of, make_parser
    from lin_jax.decode.chat import ChatTemplate, talk
    from lin_jax.decode.jsonl import make_job
    from lin_jax.decode.stream import print_texts
    from lin_jax.decode.text import TextGenerator

    given: argparse.Namespace = make_parser(__doc__).parse_args(arguments)
    config = config_of(given)
    job = make_job(given.prompt_file, given.output, given.checkpoint, resume=given.resume, overwrite=given.overwrite)
    chat = contextlib.closing(ChatTemplate(tokenizer_files_of(given.checkpoint))) if given.chat else None
    with chat or contextlib.nullcontext() as template:
        generator = TextGenerator(*load(given.checkpoint, dtype=given.dtype), config)
        if job is not None:
            job.run(generator)
        elif template is not None:
            talk(generator, template)
        else:
            print_texts(generator, given.prompt)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())

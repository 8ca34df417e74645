"""Measure a model: python eval.py --checkpoint runs/quickstart [--task perplexity|classification|...] [...]

perplexity: perplexity and bits-per-byte; without --path, on the validation text that the run was trained with. Any
--config.data.field=value changes the data. speculative: tokens a step and a second with guesses and without.
classification: accuracy, F1 and so on, and a prediction for every example, of the run's validation examples or of a
table that --path names. summarize: ROUGE of the targets that a model of sources writes, which stand beside the record.
"""

import json
import logging
import sys
from collections.abc import Sequence

from lin_jax.settings.program import exit_code


def run(arguments: Sequence[str] | None) -> None:
    """Measure, print what came out, and write it."""
    # Imported here because it takes seconds, in which Ctrl-C is answered already.
    from lin_jax.evaluate.arguments import output_file, parse
    from lin_jax.evaluate.tasks.registry import EVALUATIONS
    from lin_jax.paths import write_whole

    known, overrides = parse(__doc__, arguments)
    output = output_file(known)
    text, record, beside = EVALUATIONS[known.task].measure(known, overrides)
    print(text, flush=True)
    files = {output: json.dumps(record, indent=2) + "\n"}
    files |= {output.with_suffix(ending): more for ending, more in beside.items()}
    for file, content in files.items():
        write_whole(file, content.encode())
        print(f"written to {file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())

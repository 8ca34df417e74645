"""Measure a model: python eval.py --checkpoint runs/quickstart [--task perplexity|speculative] [...]

perplexity: perplexity and bits-per-byte; without --path, on the validation text that the run was trained with. Any
--config.data.field=value changes the data. speculative: tokens a step and a second with guesses and without.
"""

import json
import logging
import sys
from collections.abc import Sequence

from etils import epath

from lin_jax.evaluate.arguments import make_parser
from lin_jax.evaluate.tasks import TASKS
from lin_jax.experiment import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    try:
        known, overrides = make_parser(__doc__).parse_with_settings(arguments)
        task, name = TASKS[known.task]
        text, record = task(known, overrides)
        output = epath.Path(known.output or epath.Path(known.checkpoint) / name)
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

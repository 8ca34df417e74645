"""Train a language model: python train.py --config configs/quickstart.py [--config.section.field=value ...]

Run again with the same settings, it goes on from its last checkpoint. SIGTERM or Ctrl-C saves one and stops.
"""

import logging
import sys
from collections.abc import Sequence

import jax

from lin_jax.config import ConfigError
from lin_jax.overrides import config_parser, load_config
from lin_jax.train.loop import describe, show_sharding, train
from lin_jax.train.plan import plan, prepare_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    for library in ("absl", "asyncio"):  # The loop reports what fails, in one line; these add pages of tracebacks.
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        parser = config_parser(__doc__)
        parser.add_argument(
            "--distributed", action="store_true", help="join the other processes of a pod or cluster before starting"
        )
        known, overrides = parser.parse_known_args(arguments)
        config = load_config(known.config, overrides)
        if known.distributed:
            jax.distributed.initialize()
        if config.plan:
            prepare_plan(config)
        if config.plan or config.show_sharding:
            print(plan(config, _progress) if config.plan else show_sharding(config))
            return 0
        result = train(config, report=lambda line: print(line, flush=True))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result.validation is None:
        print(f"stopped at step {result.step}, which is saved; run the same command to go on")
    elif jax.process_index() == 0:
        print(f"finished {result.step} steps in {config.workdir}: {describe(result.validation)}")
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

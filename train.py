"""Train a language model: python train.py --config configs/quickstart.py [--config.section.field=value ...]

Run again with the same settings, it goes on from its last checkpoint. SIGTERM or Ctrl-C saves one and stops; once more
stops at once. On several hosts run it on each of them: they find each other, or --config.distributed says how
(docs/pods.md).

Exit codes: 0 finished, or stopped and saved; 2 a setting or an input is wrong; 143 (SIGTERM) or 130 (Ctrl-C) stopped
while there was nothing new to save, or at once; 1 anything else.
"""

import logging
import sys
from collections.abc import Sequence

from lin_jax.train.stop import ProgramStop, StopRequest


def main(arguments: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run the program; returns its exit code."""
    # Imported here because it takes seconds, in which signals are answered already.
    from lin_jax.experiment import ConfigError, config_parser, load_config
    from lin_jax.plan import plan, prepare_plan
    from lin_jax.train.distributed import joined, only_first
    from lin_jax.train.loop import show_sharding, train

    for library in ("absl", "asyncio"):  # The loop reports what fails, in one line; these add pages of tracebacks.
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        known, overrides = config_parser(__doc__).parse_with_settings(arguments)
        config = load_config(known.config, overrides)
        if config.plan:
            prepare_plan(config)
            print(plan(config, _progress))
            return 0
        with joined(config.distributed):
            report = only_first(_report)
            if config.show_sharding:
                report(show_sharding(config))
                return 0
            result = train(config, report, stop)
            if result.validation is None:
                report(f"stopped at step {result.step}, which is saved; run the same command to go on")
            else:
                report(f"finished {result.step} steps in {config.workdir}: {result.described}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(line: str) -> None:
    print(line, flush=True)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(stop=ProgramStop()))

"""Measure perplexity and bits-per-byte: python eval.py --checkpoint runs/quickstart [--path FILE ...]

Without --path, on the validation text that the run was trained with. Any --config.data.field=value changes the data.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lin_jax.config import ConfigError, MeshConfig
from lin_jax.evaluate.perplexity import evaluate_run
from lin_jax.overrides import apply_overrides
from lin_jax.train.checkpoint import load_model


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run's directory, or RUN/checkpoints/STEP")
    parser.add_argument("--path", nargs="+", metavar="FILE", help="evaluate on all of these files or globs instead")
    parser.add_argument("--window", type=int, help="tokens the model sees at a time (default: as in training)")
    parser.add_argument("--stride", type=int, help="tokens between starts of windows (default: half the window)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time")
    parser.add_argument("--output", metavar="FILE", help="JSON file (default: RUN/evaluation.json)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    known, overrides = make_parser().parse_known_args(arguments)
    try:
        model, tokenizer, config = load_model(known.checkpoint)
        if known.path:
            whole_files = ["source=text", "path=", f"validation_path={tuple(known.path)}"]
            overrides = [*(f"--config.data.{text}" for text in whole_files), *overrides]
        config = apply_overrides(dataclasses.replace(config, mesh=MeshConfig()), overrides)
        window = known.window if known.window is not None else config.data.sequence_length
        stride = known.stride if known.stride is not None else max(1, window // 2)
        result = evaluate_run(model, tokenizer, config, window=window, stride=stride, batch_size=known.batch_size)
        settings = {"checkpoint": known.checkpoint, "data": dataclasses.asdict(config.data)}
        record = {**result.to_dict(), "window": window, "stride": stride, **settings}
        output = Path(known.output or Path(known.checkpoint) / "evaluation.json")
        output.write_text(json.dumps(record, indent=2) + "\n")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{result}\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Convert a model: python convert_weights.py --input DIR --output DIR [--attention augmented] [--to hf] [--check]

The input is a directory of Hugging Face (LLaMA, GPT-2, the official linearized LLaMA) or the name of one on its Hub, a
run of lin_jax, a file of llama2.c, or a state dict of the official FLASH. Any --config.model.field=value changes the
model, such as --config.model.attention.group_size=64.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lin_jax.attentions.registry import preset_names
from lin_jax.convert.program import convert
from lin_jax.settings.command_line import OneLineParser
from lin_jax.settings.program import exit_code


def make_parser() -> OneLineParser:
    """Return the parser of the program's arguments."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--input", required=True, metavar="MODEL", help="the model that is read")
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory that is made")
    parser.add_argument(
        "--attention", choices=list(preset_names()), help="the result's attention (default: the source's)"
    )
    parser.add_argument("--to", choices=("lin_jax", "hf"), default="lin_jax", help="whose form the result has")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the parameters that are written (default: the source's); of activations: --config.model.dtype",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="the model's tokenizer, where the source has none or another"
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter (PEFT) that is merged into --input")
    parser.add_argument("--check", action="store_true", help="compare the logits of source and result")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that --output holds")
    return parser


def run(arguments: Sequence[str] | None) -> None:
    """Convert what is asked for."""
    known, overrides = make_parser().parse_with_settings(arguments)
    settings = {name: value for name, value in vars(known).items() if name not in ("input", "output")}
    convert(known.input, known.output, overrides=overrides, **settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit code."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # The checkpoint library warns of its own doings.
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())

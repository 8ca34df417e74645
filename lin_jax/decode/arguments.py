"""The command line of `generate.py`, with every field of `GenerateConfig` and `SamplingConfig` by its name."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from lin_jax.decode.text import make_config
from lin_jax.settings.base import require
from lin_jax.settings.command_line import OneLineParser
from lin_jax.settings.generate import GenerateConfig, SamplingConfig
from lin_jax.settings.typed import annotations_of

_GROUPS = {"how texts are continued": GenerateConfig, "how the next token is chosen": SamplingConfig}


def make_parser(description: str | None) -> OneLineParser:
    """Return the parser of its arguments."""
    parser = OneLineParser(description)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="MODEL",
        help="a run, a directory of Hugging Face, or a name on its Hub",
    )
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="of parameters and activations (default: the model's own)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue, or sources")
    prompts.add_argument("--prompt_file", type=Path, metavar="IN.jsonl", help="a file of such texts")
    prompts.add_argument("--chat", action="store_true", help="talk, by the chat template of the tokenizer")
    parser.add_argument("--output", type=Path, metavar="OUT.jsonl", help="for --prompt_file: the file that is made")
    parser.add_argument("--resume", action="store_true", help="go on with --output, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    for title, section in _GROUPS.items():
        _add_settings(parser.add_argument_group(title), section)
    return parser


def _add_settings(group: Any, section: Any) -> None:
    """Add an argument for every setting; those that are not given are left out of what is parsed."""
    for name, field in _fields(section).items():
        default = f" (default: {field.default})" if field.default != () else ""
        doc = f"{field.metadata['doc']}{default}".replace("%", "%%")
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=doc, **_form(section, name))


def config_of(given: argparse.Namespace) -> GenerateConfig:
    """The settings among what was parsed; raises `ConfigError` for a wrong value."""
    require(
        not given.chat or "batch_size" not in given, "batch_size is not for --chat, where there is one answer at a time"
    )
    names = [name for section in _GROUPS.values() for name in _fields(section) if name in given]
    values = {name: getattr(given, name) for name in names}
    return make_config({name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _fields(section: Any) -> dict[str, Any]:
    """The fields that are no sections."""
    return {field.name: field for field in dataclasses.fields(section) if field.name != "sampling"}


def _form(section: Any, name: str) -> dict[str, Any]:
    """What `add_argument` is told of a setting's type."""
    annotation = annotations_of(section)[name]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {"choices": arguments}
    if origin is tuple:
        return {"nargs": "+", "metavar": "TEXT"}
    return {"type": annotation, "metavar": {int: "N", float: "X"}.get(annotation, "NAME")}

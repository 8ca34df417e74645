"""The command line of `eval.py`."""

import argparse
import os
from collections.abc import Sequence

from etils import epath

from lin_jax.evaluate.tasks.base import Option, whole
from lin_jax.evaluate.tasks.registry import EVALUATIONS
from lin_jax.paths import is_remote, require_writable
from lin_jax.settings.base import require
from lin_jax.settings.command_line import OneLineParser
from lin_jax.train.workdir import workdir_and_step


def parse(description: str | None, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return what a command line asks for, and its settings `--config...`, which are not looked at here.

    Raises:
        ConfigError: it is wrong, or gives an option that the task does not use.
    """
    known, overrides = _make_parser(description).parse_with_settings(arguments)
    task = EVALUATIONS[known.task]
    own = {option.field for option in task.options}
    for other in EVALUATIONS:
        given = [f"--{option.field}" for option in EVALUATIONS[other].options if option.field in known]
        given = [name for name in given if name.removeprefix("--") not in own]
        require(not given, f"{', '.join(given)}: for --task {other}, not {known.task}")
    task.check(known, overrides)
    for option in task.options:
        setattr(known, option.field, getattr(known, option.field, option.default))
    return known, overrides


def output_file(known: argparse.Namespace) -> epath.Path:
    """Return where the record of a task is written: in the run, or here for a model that has no directory.

    Raises:
        ConfigError: it cannot be written.
    """
    workdir, step = workdir_and_step(os.path.expanduser(known.checkpoint))
    name = f"{EVALUATIONS[known.task].record}{'' if step is None else f'-{step}'}.json"
    directory = epath.Path(workdir) if is_remote(workdir) or os.path.isdir(workdir) else epath.Path()
    file = epath.Path(known.output) if known.output else directory / name
    require_writable(file, "--output")
    return file


def _make_parser(description: str | None) -> OneLineParser:
    """Return the parser; its errors are raised as `ConfigError`."""
    parser = OneLineParser(description)
    parser.add_argument("--task", choices=list(EVALUATIONS), default="perplexity")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run's directory, or RUN/checkpoints/STEP")
    # Earlier versions spelled this and --max_new_tokens with hyphens.
    of_batch = "windows or texts at a time"
    parser.add_argument("--batch_size", "--batch-size", type=whole(1, 2**16), default=8, metavar="N", help=of_batch)
    records = ", ".join(f"{EVALUATIONS[task].record}.json" for task in EVALUATIONS)
    parser.add_argument("--output", metavar="FILE", help=f"JSON (default: in RUN, by the task {records})")
    users: dict[str, list[str]] = {}
    for task in EVALUATIONS:
        for option in EVALUATIONS[task].options:
            users.setdefault(option.field, []).append(task)
    for title in dict.fromkeys(map(tuple, users.values())):
        group = parser.add_argument_group(", ".join(title))
        for option in EVALUATIONS[title[0]].options:
            if tuple(users[option.field]) == title:
                _add(group, option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add an option; one that is not given is left out of what is parsed."""
    shown = " ".join(option.default) if isinstance(option.default, list) else option.default
    told = f"{option.help} (default: {shown})" if option.default not in (None, False, []) else option.help
    group.add_argument(*option.names, default=argparse.SUPPRESS, help=told.replace("%", "%%"), **option.how)

"""What `convert_weights.py` does: read, change the attention, write, compare."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lin_jax.config import require
from lin_jax.convert.attention import change_attention, target_config
from lin_jax.convert.check import check_tokens, compare, logits_of, logits_of_transformers
from lin_jax.convert.directory import (
    Source,
    read_back,
    read_source,
    replacing,
    tokens_in,
    write_run,
    write_transformers,
)
from lin_jax.convert.hugging_face import Weights, family_of

Report = Callable[[str], None]


def convert(
    source_directory: Path,
    target: Path,
    *,
    attention: str | None = None,
    overrides: list[str] | None = None,
    dtype: str | None = None,
    to: str = "lin_jax",
    check: bool = False,
    overwrite: bool = False,
    report: Report = print,
) -> None:
    """Convert a model between directories of Hugging Face and lin_jax, and to another attention.

    Args:
        source_directory: of either kind.
        target: is made; replaced as a whole with `overwrite`.
        attention: a name of `lin_jax.config.ABLATIONS`; None keeps the source's.
        overrides: `--config.model.field=value`.
        dtype: of the tensors of a Hugging Face directory, or of the activations of a lin_jax model, whose parameters
            are float32; None keeps the source's.
        to: "lin_jax" or "hf".
        check: compare the logits of source and result, as read back from their files.
        overwrite: whether `target` may hold another model.
        report: is told what was done.

    Raises:
        ConfigError: the source or a setting is wrong; nothing is written then.
    """
    source_directory, target = source_directory.absolute(), target.absolute()
    inside = source_directory == target or target in source_directory.parents
    require(not inside, f"--output {target} is or holds --input {source_directory}: choose another")
    source = read_source(source_directory)
    family_of(source.weights.config)
    config = target_config(source.config, attention, overrides or []).model
    if to == "lin_jax" and dtype is not None:
        require(dtype != "float16", "--dtype float16 is for --to hf: activations are float32 or bfloat16")
        config = dataclasses.replace(config, dtype=dtype)  # type: ignore[arg-type]
    changed = change_attention(source.weights, config)
    with replacing(target, overwrite) as directory:
        if to == "hf":
            write_transformers(directory, source, changed.weights, dtype or config.dtype)
        else:
            write_run(directory, source, changed.weights, target)
    _report_names(source, changed, config, target, report)
    if check:
        _check(source, source_directory, target, report)


def _report_names(source: Source, changed: Any, config: Any, target: Path, report: Report) -> None:
    count = sum(array.size for array in changed.weights.arrays.values())
    report(f"{target}: {config.architecture}, {config.attention.kind} attention, {count:,} parameters")
    if changed.new:
        report(f"new, with the values of a fresh model: {', '.join(changed.new)}")
    if changed.unused:
        report(f"not used: {', '.join(changed.unused)}")


def _check(source: Source, source_directory: Path, target: Path, report: Report) -> None:
    result: Weights = read_back(target)
    tokens_BT = check_tokens(source.tokenizer, tokens_in(result.config))
    logits_BTV = logits_of(result, tokens_BT)
    report(f"result against source: {compare(logits_of(source.weights, tokens_BT), logits_BTV)}")
    for name, directory, weights in (("source", source_directory, source.weights), ("result", target, result)):
        # The library knows the original attention only.
        plain = (directory / "config.json").is_file() and weights.config.attention.kind == "softmax"
        theirs_BTV = logits_of_transformers(directory, tokens_BT) if plain else None
        if theirs_BTV is not None:
            report(f"result against transformers on the {name}: {compare(theirs_BTV, logits_BTV)}")

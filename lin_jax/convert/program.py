"""What `convert_weights.py` does: read, change the attention, write, compare."""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lin_jax.convert.attention import Changed, change_attention, target_config
from lin_jax.convert.check import check_tokens, compare, logits_of, logits_of_transformers
from lin_jax.convert.conversion import conversion_of
from lin_jax.convert.directory import check_target, replacing, write_run, write_transformers
from lin_jax.convert.hub import local_path
from lin_jax.convert.hugging_face import ModelWeights, Placement
from lin_jax.convert.source import Input, read_source, tokens_in
from lin_jax.paths import absolute, check_remote, copy_directory, is_remote
from lin_jax.settings.base import require
from lin_jax.settings.mesh import MeshConfig
from lin_jax.train.sharding import make_mesh

Report = Callable[[str], None]


def convert(
    source_name: str,
    target: epath.PathLike,
    *,
    attention: str | None = None,
    overrides: list[str] | None = None,
    dtype: str | None = None,
    to: str = "lin_jax",
    tokenizer: str | None = None,
    adapter: Path | None = None,
    check: bool = False,
    overwrite: bool = False,
    report: Report = print,
) -> None:
    """Convert a model to a directory of Hugging Face or of lin_jax, and to another attention.

    Args:
        source_name: a directory of either kind, a file of llama2.c or with the official FLASH, or a model's name on
            the Hugging Face Hub.
        target: is made; replaced as a whole with `overwrite`.
        attention: a name of `a preset, see `lin_jax.attentions.registry.preset_names``; None keeps the source's.
        overrides: `--config.model.field=value`.
        dtype: of the parameters that are written; None keeps that of each (but lin_jax has no float16, it takes
            float32). The type of activations is `--config.model.dtype`.
        to: "lin_jax" or "hf".
        tokenizer: a directory with one; None takes the source's own.
        adapter: a LoRA adapter to be merged into the source.
        check: compare the logits of source and result, as read back from their files.
        overwrite: whether `target` may hold another model.
        report: is told what was done.

    Raises:
        ConfigError: the source or a setting is wrong; nothing is written then.
    """
    name = absolute(str(target))
    _require_apart(absolute(source_name), name)
    check_remote(name, "--output")
    check_target(name, overwrite)
    if to == "lin_jax":
        require(dtype != "float16", "--dtype float16 is for --to hf: parameters of lin_jax are float32 or bfloat16")
    given = Input(source_name, tokenizer, adapter, tuple(overrides or ()))
    with _becoming(name) as directory:
        changed = _convert(
            given, directory, name, Placement(_mesh(), dtype, float16=to == "hf"), attention, to, overwrite
        )
        _report_names(changed, name, report)
        del changed
        if check:
            _check(given, directory, report)


@contextlib.contextmanager
def _becoming(name: str) -> Iterator[Path]:
    """The directory of that name; where it is remote, one here that is copied there at the end."""
    if not is_remote(name):
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / epath.Path(name).name
        yield directory
        if epath.Path(name).exists():
            epath.Path(name).rmtree()
        copy_directory(directory, name)


def _convert(
    given: Input, target: Path, name: str, place: Placement, attention: str | None, to: str, overwrite: bool
) -> Changed:
    source = read_source(given, place)
    if to == "hf":
        conversion_of(source.weights.config)
    config = target_config(source.config, attention, list(given.overrides)).model
    changed = change_attention(source.weights, config, place.dtype)
    with replacing(target, overwrite) as directory:
        if to == "hf":
            write_transformers(directory, source, changed.weights, place.dtype)
        else:
            write_run(directory, source, changed.weights, name)
    return changed


def _require_apart(source: str, target: str) -> None:
    inside = source == target or source.startswith(f"{target.rstrip('/')}/")
    require(not inside, f"--output {target} is or holds --input {source}: choose another")


def _mesh() -> Any:
    """All devices, each with a part of every parameter that can be cut."""
    return make_mesh(MeshConfig(data=1, fsdp=-1))


def _report_names(changed: Changed, target: str, report: Report) -> None:
    weights, config = changed.weights, changed.weights.config
    count = sum(array.size for array in weights.arrays.values())
    types = ", ".join(sorted({str(array.dtype) for array in weights.arrays.values()}))
    report(f"{target}: {config.architecture}, {config.attention.kind} attention, {count:,} parameters, {types}")
    if changed.new:
        report(f"new, with the values of a fresh model: {', '.join(changed.new)}")
    unused = [*changed.unused, *_without_numbers(weights.unused)]
    if unused:
        report(f"not used: {', '.join(unused)}")


def _without_numbers(names: Iterable[str]) -> list[str]:
    """`names` with * for the numbers of layers, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _check(given: Input, target: Path, report: Report) -> None:
    """Read both again, in the types of their files, one after the other."""
    place = Placement(_mesh(), float16=True)
    source = read_source(given, place)
    tokens_BT = check_tokens(source.tokenizer, tokens_in(source.config.model, otherwise=1 << 30))
    source_BTV, path = logits_of(source.weights, tokens_BT), local_path(given.name)
    alone = given.adapter is None and _is_plain(source.weights, path)
    plain = {"source": path if alone else None}
    del source
    result = read_source(Input(str(target)), place).weights
    result_BTV = logits_of(result, tokens_BT)
    report(f"result against source: {compare(source_BTV, result_BTV)}")
    plain["result"] = target if _is_plain(result, target) else None
    for name, directory in plain.items():
        theirs_BTV = None if directory is None else logits_of_transformers(directory, tokens_BT)
        if theirs_BTV is not None:
            report(f"result against transformers on the {name}: {compare(theirs_BTV, result_BTV)}")


def _is_plain(weights: ModelWeights, directory: Path) -> bool:
    """Whether Hugging Face's library computes this model: it knows the original attention only."""
    return (directory / "config.json").is_file() and weights.config.attention.kind == "softmax"

"""What `convert_weights.py` does: read, change the attention, write, compare."""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lin_jax.experiment import Config
from lin_jax.models.base import ModelConfig
from lin_jax.paths import absolute, check_remote, copy_directory, is_remote
from lin_jax.settings.base import ConfigError, require
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
        check: compare the logits of source and result, as read back from their files, and write nothing where they
            differ by more than rounding although the attention is the same.
        overwrite: whether `target` may hold another model.
        report: is told what was done, a line at a time.

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
    placement = Placement(_mesh(), dtype, float16=to == "hf")
    with _becoming(name) as directory:
        lines = _convert(given, directory, name, placement, attention, to, overwrite, check)
    for line in lines:
        report(line)


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
    given: Input,
    target: Path,
    name: str,
    placement: Placement,
    attention: str | None,
    to: str,
    overwrite: bool,
    check: bool,
) -> list[str]:
    """Write the result to `target`, which will be called `name`; returns what there is to say."""
    source = read_source(given, placement)
    if to == "hf":
        conversion_of(source.weights.config)
    config = target_config(source.config, attention, list(given.overrides)).model
    if to == "hf":
        _require_effect(source.config, attention, given.overrides)
    changed = change_attention(source.weights, config, placement.dtype)
    is_same = _function(config) == _function(source.config.model)
    with replacing(target, overwrite) as directory:
        if to == "hf":
            write_transformers(directory, source, changed.weights, placement.dtype)
        else:
            write_run(directory, source, changed.weights, name)
        lines = _names_told(changed, name)
        del source, changed
        if check:
            lines += _check(given, directory, is_same)
    return lines


def _function(config: ModelConfig) -> ModelConfig:
    """The settings without those that change how a model is computed, but not what."""
    how: dict[str, Any] = {"dtype": "float32", "remat": "none"}
    for name in config.attention_fields:
        attention: Any = getattr(config, name)
        how[name] = dataclasses.replace(attention, implementation=None) if _has_forms(attention) else attention
    return dataclasses.replace(config, **{name: value for name, value in how.items() if hasattr(config, name)})


def _has_forms(attention: Any) -> bool:
    return hasattr(attention, "implementation")


def _require_effect(config: Config, attention: str | None, overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an override that has no place in a config.json, and would be lost."""
    whole = target_config(config, attention, list(overrides)).model
    told = conversion_of(whole).config_to(whole)
    for override in overrides:
        try:
            model = target_config(config, attention, [other for other in overrides if other != override]).model
        except ConfigError:  # It is needed for the others to make sense.
            continue
        lost = model != whole and conversion_of(model).config_to(model) == told
        require(not lost, f"{override} has no effect with --to hf, whose config.json has no place for it: leave it out")


def _require_apart(source: str, target: str) -> None:
    inside = source == target or source.startswith(f"{target.rstrip('/')}/")
    require(not inside, f"--output {target} is or holds --input {source}: choose another")


def _mesh() -> Any:
    """All devices, each with a part of every parameter that can be cut."""
    return make_mesh(MeshConfig(data=1, fsdp=-1))


def _names_told(changed: Changed, target: str) -> list[str]:
    weights, config = changed.weights, changed.weights.config
    count = sum(array.size for array in weights.arrays.values())
    types = ", ".join(sorted({str(array.dtype) for array in weights.arrays.values()}))
    kinds = {name: getattr(config, name).kind for name in config.attention_fields}
    told = next(iter(kinds.values())) if len(set(kinds.values())) == 1 else " and ".join(map(_told_kind, kinds.items()))
    lines = [f"{target}: {config.architecture}, {told} attention, {count:,} parameters, {types}"]
    if changed.new:
        lines.append(f"new, with the values of a fresh model: {', '.join(changed.new)}")
    unused = [*changed.unused, *_without_numbers(weights.unused)]
    if unused:
        lines.append(f"not used: {', '.join(unused)}")
    return lines


def _told_kind(pair: tuple[str, str]) -> str:
    name, kind = pair
    return kind if name == "attention" else f"{kind} {name.removesuffix('_attention')}"


def _without_numbers(names: Iterable[str]) -> list[str]:
    """`names` with * for the numbers of layers, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _check(given: Input, target: Path, is_same: bool) -> list[str]:
    """Read both again, in the types of their files, one after the other; returns how far apart their logits lie.

    Raises:
        ConfigError: further than rounding explains, of models that should be the same.
    """
    placement = Placement(_mesh(), float16=True)
    source = read_source(given, placement)
    longest = tokens_in(source.config.model, otherwise=1 << 30)
    tokens_BT = check_tokens(source.tokenizer, source.config.model.vocabulary_size, longest)
    source_BTV, path = logits_of(source.weights, tokens_BT), local_path(given.name)
    alone = given.adapter is None and _is_plain(source.weights, path)
    sizes = {name: array.dtype.itemsize for name, array in source.weights.arrays.items()}
    del source
    result = read_source(Input(str(target)), placement).weights
    result_BTV = logits_of(result, tokens_BT)
    is_narrow = any(array.dtype.itemsize < sizes.get(name, 0) for name, array in result.arrays.items())
    found = {"result against source": (compare(source_BTV, result_BTV), is_narrow)}
    plain = {"source": path if alone else None, "result": target if _is_plain(result, target) else None}
    for name, directory in plain.items():
        theirs_BTV = None if directory is None else logits_of_transformers(directory, result.config, tokens_BT)
        if theirs_BTV is not None:
            which = compare(theirs_BTV, result_BTV), is_narrow and name == "source"
            found[f"result against transformers on the {name}"] = which
    for what, (difference, narrow) in found.items():
        if is_same or what.endswith("the result"):
            difference.require_small(what, narrow)
    return [f"{what}: {difference}" for what, (difference, _) in found.items()]


def _is_plain(weights: ModelWeights, directory: Path) -> bool:
    """Whether Hugging Face's library computes this model: it knows the original attention only."""
    config = weights.config
    plain = all(getattr(config, name).kind == "softmax" for name in config.attention_fields)
    return (directory / "config.json").is_file() and plain

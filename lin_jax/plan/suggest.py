"""Settings that take less memory, in the order in which they cost least, and topologies that have more of it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lin_jax.attentions.registry import ATTENTIONS
from lin_jax.chips import Chip, chip_count
from lin_jax.experiment import Config
from lin_jax.settings.base import ConfigError


class Suggestion(NamedTuple):
    """Changed settings: as they are given on the command line, and the configuration with them."""

    settings: tuple[str, ...]
    config: Config


def smaller(config: Config, devices: int) -> Iterator[Suggestion]:
    """Configurations that take less and less memory on as many devices; each keeps the changes of those before it.

    The batch and the model's type stay, and so does what is learned: only what is kept, where it is, and in how many
    parts a batch is worked through.
    """
    told: tuple[str, ...] = ()
    for changes in _changes(config, devices):
        try:
            config = _changed(config, changes)
        except ConfigError:
            continue
        names = {name for name, _ in changes}
        told = tuple(text for text in told if text.partition("=")[0].removeprefix("--config.") not in names)
        told += tuple(f"--config.{name}={_told(value)}" for name, value in changes)
        yield Suggestion(told, config)


def _changes(config: Config, devices: int) -> Iterator[Sequence[tuple[str, Any]]]:
    if config.model.remat != "full":
        yield [("model.remat", "full")]
    if config.finetune.train != ("all",) and config.finetune.frozen_dtype != "bfloat16":
        yield [("finetune.frozen_dtype", "bfloat16")]
    if config.mesh.fsdp not in (-1, devices):
        yield [("mesh.data", 1), ("mesh.fsdp", -1)]
    rows, parts = config.data.batch_size, 2 * config.train.microbatches
    while rows % (parts * devices) == 0:
        yield [("train.microbatches", parts)]
        parts *= 2
    if config.train.loss_chunk > 256:
        yield [("train.loss_chunk", 256)]
    if config.mesh.sequence > 1:
        return
    for shards in (2, 4, 8):
        if devices % shards == 0 and _can_cut(config, shards):
            yield [("mesh.sequence", shards), ("mesh.rules", ("width=fsdp+sequence",))]


def _can_cut(config: Config, shards: int) -> bool:
    """Whether rows can be cut into so many parts."""
    attention, (tokens, rest) = config.model.attention, divmod(config.data.sequence_length, shards)
    try:
        ATTENTIONS[attention.kind].check_parts(attention, tokens, "")
    except ConfigError:
        return False
    return not rest and attention.causal


def _told(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _changed(config: Any, changes: Sequence[tuple[str, Any]]) -> Any:
    """`config` with settings replaced, all of a section at a time, as its checks look at them together."""
    by_section: dict[str, list[tuple[str, Any]]] = {}
    fields: dict[str, Any] = {}
    for name, value in changes:
        first, _, rest = name.partition(".")
        if rest:
            by_section.setdefault(first, []).append((rest, value))
        else:
            fields[first] = value
    fields |= {first: _changed(getattr(config, first), rest) for first, rest in by_section.items()}
    return dataclasses.replace(config, **fields)


def larger_topologies(chip: Chip, devices: int) -> list[str]:
    """Return plans of more of the same chips, the smallest first."""
    known = chip.topologies or tuple(str(2**n) for n in range(11))
    return [f"{chip.name}:{topology}" for topology in known if chip_count(topology) > devices]

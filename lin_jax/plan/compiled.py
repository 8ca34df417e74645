"""A training step compiled for devices that need not be there, and what its compiler says of it."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from lin_jax.experiment import Config
from lin_jax.train import sharding
from lin_jax.train.collectives import Collective, find_collectives
from lin_jax.train.parts import Parts, abstract_batch, make_parts, make_step
from lin_jax.train.state import TrainState, abstract_state

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Calls of Pallas kernels, on TPUs and through Triton, and of cuDNN, by their own names.
_KERNEL = re.compile(
    r'%([\w\-]+?)[.\d]* = [^\n]*custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w*)"'
)
_OVERFLOW = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
# Said where what is between the arguments is too large by itself.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that compiled; sizes are bytes on one device.

    Attributes:
        arguments: the state and the batch.
        outputs: that do not take the place of an argument.
        temporaries: everything between.
        code: the program itself.
        collectives: what devices exchange.
        kernels: programs of Pallas and of libraries that it calls, by name.
        seconds: that the compilation took.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    collectives: Sequence[Collective]
    kernels: Sequence[str]
    seconds: float

    @property
    def bytes(self) -> int:
        """All that is in memory at the worst moment, as the compiler lays it out."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that the compiler refused: what it would take, and what there is, in bytes on one device."""

    bytes: int
    limit: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Traced:
    """A step before it is compiled: the parts of its run and the shapes of its state."""

    parts: Parts
    state: TrainState


def trace(config: Config, devices: Sequence[jax.Device]) -> Traced:
    """The parts of a run of `config` on these devices.

    Raises:
        ConfigError: the settings do not fit the devices.
    """
    partition = sharding.make_partition(config.mesh, devices)
    sharding.check_fit(config, partition)
    parts = make_parts(config, partition)
    return Traced(parts, abstract_state(parts.structure, parts.optimizer, parts.shardings))


def compile_step(traced: Traced) -> Step | TooLarge:
    """Compile the step as a run would; its memory as the compiler lays it out."""
    start = time.perf_counter()
    with jax.set_mesh(traced.parts.mesh):
        lowered = make_step(traced.parts).lower(traced.state, abstract_batch(traced.parts))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return _too_large(error, sizes(traced.state)[0], time.perf_counter() - start)
    return _step(compiled, time.perf_counter() - start)


def _step(compiled: Any, seconds: float) -> Step:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Step(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        find_collectives(text),
        sorted(set(_KERNEL.findall(text))),
        seconds,
    )


def sizes(tree: Any) -> tuple[int, int]:
    """Bytes on each device, and altogether."""
    leaves = jax.tree.leaves(tree)
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return own, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _too_large(error: Exception, state: int, seconds: float) -> TooLarge:
    """What the compiler says of a program that is too large; any other error is raised again."""
    whole, temporaries = _OVERFLOW.search(str(error)), _TEMPORARIES.search(str(error))
    told = whole or temporaries
    if told is None:
        raise error
    used, limit = (int(float(told[i]) * _UNITS[told[i + 1].upper()]) for i in (1, 3))
    return TooLarge(used if whole else used + state, limit, seconds)

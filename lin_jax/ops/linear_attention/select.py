"""Which implementation of augmented attention runs: one small resolver.

None picks by the device that the computation is meant for, and by shape and type: the platform's kernel where it can
run, else XLA's form, with the reason logged once and given by `explain`. A named implementation runs or is refused.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from lin_jax.ops.linear_attention import reference, xla
from lin_jax.ops.linear_attention.gpu import kernel as gpu_kernel
from lin_jax.ops.linear_attention.inputs import Inputs
from lin_jax.ops.linear_attention.tpu import kernel as tpu_kernel
from lin_jax.ops.target import TargetDevice, target

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An implementation, and why it is this one."""

    implementation: str
    reason: str


class Kernel(NamedTuple):
    """A kernel of one platform.

    Attributes:
        platform: where it runs; on a CPU it is simulated, if it is asked for by name.
        refusal: the reason why it cannot run for these inputs on a device of this kind, or None.
        attend: outputs, and the folded state after the row [B, K, P, E] if `Inputs.return_state`.
    """

    platform: str
    refusal: Callable[[Inputs, str], str | None]
    attend: Callable[[Inputs, str], tuple[Float[Array, "B T H E"], Float[Array, "B K P E"] | None]]


FORMS = {"xla": xla.attend, "reference": reference.attend}
KERNELS = {
    "pallas_tpu": Kernel("tpu", tpu_kernel.refusal, tpu_kernel.attend),
    "pallas_gpu": Kernel("gpu", gpu_kernel.refusal, gpu_kernel.attend),
}


def choose(inputs: Inputs) -> Choice:
    """Return the implementation that runs.

    Raises:
        ValueError: a named implementation cannot run; says why in one line.
    """
    implementation = inputs.options.implementation
    if implementation in FORMS:
        return Choice(implementation, "it was asked for")
    where = target()
    if implementation is not None:
        reason = _refusal(KERNELS[implementation], inputs, where)
        if reason is not None:
            raise ValueError(f"implementation={implementation} cannot run: {reason}")
        return Choice(implementation, "it was asked for")
    for name, kernel in KERNELS.items():
        if kernel.platform == where.platform:
            reason = _refusal(kernel, inputs, where)
            choice = Choice(name, f"it is the kernel of {where.device_kind}") if reason is None else None
            return choice or _fall_back(f"{name} cannot run: {reason}")
    return _fall_back(f"there is no kernel for {where.device_kind}")


def _refusal(kernel: Kernel, inputs: Inputs, where: TargetDevice) -> str | None:
    if where.platform not in (kernel.platform, "cpu"):
        return f"it needs a {kernel.platform.upper()}, but the device is {where.device_kind}"
    return kernel.refusal(inputs, where.device_kind)


def _fall_back(reason: str) -> Choice:
    _log_once(reason)
    return Choice("xla", reason)


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("augmented attention takes implementation xla: %s", reason)

"""Augmented attention as one pass over q, k and v on a TPU."""

from jaxtyping import Array, Float

from lin_jax.ops.augmented_attention.inputs import Inputs


def refusal(inputs: Inputs, device_kind: str) -> str | None:
    """Why the kernel cannot run for these inputs on a device of this kind; None if it can."""
    return "it is not written"


def attend(inputs: Inputs, device_kind: str) -> tuple[Float[Array, "B T H E"], Float[Array, "B K P E"] | None]:
    """Outputs, and the folded state after the row if `inputs.return_state`."""
    raise NotImplementedError

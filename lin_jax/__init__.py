"""Linearized language models in JAX: augmented linear attention and what is built on it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lin_jax.convert.load import load as load
    from lin_jax.decode.text import generate as generate
    from lin_jax.evaluate.classify import classify as classify
    from lin_jax.evaluate.embed import embed as embed

__version__ = "0.1.0"

# Imported when they are asked for, so that `import lin_jax` stays light.
_HOMES = {
    "load": "lin_jax.convert.load",
    "generate": "lin_jax.decode.text",
    "classify": "lin_jax.evaluate.classify",
    "embed": "lin_jax.evaluate.embed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

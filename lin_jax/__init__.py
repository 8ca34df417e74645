"""Linearized language models in JAX: augmented linear attention and what is built on it."""

__version__ = "0.1.0"

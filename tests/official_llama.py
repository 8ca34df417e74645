"""The official LLaMA's training path by its equations, in JAX but without lin_jax: gradients in any precision.

The sum over the groups before one's own is taken either directly or as the official code does, as the sum of all groups
up to one's own, minus one's own.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-5


class OfficialLlama:
    """Loss and gradients of a model with given settings, flags and tokens, for any parameters and precision.

    `minus_own` is the form of the sum over groups. `inputs` is what each layer's attention reads, [N, C].
    """

    def __init__(self, ids: np.ndarray, values: dict, *, minus_own: bool = False):
        def loss(weights):
            inputs = []
            x = weights["model.embed_tokens.weight"][ids]
            for layer in range(values["num_hidden_layers"]):
                name = f"model.layers.{layer}."
                parts = {key.removeprefix(name): array for key, array in weights.items() if key.startswith(name)}
                inputs.append(norm(x, parts["input_layernorm.weight"], values))
                x = x + attention(inputs[-1], parts, values, minus_own)
                x = x + feed_forward(norm(x, parts["post_attention_layernorm.weight"], values), parts)
            logits = norm(x, weights["model.norm.weight"], values) @ weights["lm_head.weight"].T
            log_p = jax.nn.log_softmax(logits[0, :-1])
            return -jnp.take_along_axis(log_p, ids[0, 1:, None], axis=-1).mean(), (logits, [x[0] for x in inputs])

        self._run = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def __call__(self, params: Mapping[str, np.ndarray], dtype: str) -> "Result":
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            weights = {name: jnp.asarray(array, dtype) for name, array in params.items()}
            (loss, (logits, inputs)), gradient = self._run(weights)
            gradients = {name: np.asarray(g) for name, g in gradient.items()}
            return Result(float(loss), np.asarray(logits), gradients, [np.asarray(x) for x in inputs])


class Result(NamedTuple):
    loss: float
    logits: np.ndarray
    gradients: dict[str, np.ndarray]
    inputs: list[np.ndarray]


def norm(x, weight, values):
    return weight * (x / jnp.sqrt((x**2).mean(-1, keepdims=True) + values["rms_norm_eps"]))


def feed_forward(x, parts):
    gate, up, down = (parts[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


def rotated(x, theta):
    """[1, H, N, D], pairs of the two halves."""
    n, d = x.shape[-2:]
    frequencies = 1.0 / theta ** (np.arange(0, d, 2) / d)
    angles = np.tile(np.arange(n)[:, None] * frequencies, (1, 2))
    half = jnp.concatenate([-x[..., d // 2 :], x[..., : d // 2]], axis=-1)
    return x * np.cos(angles).astype(x.dtype) + half * np.sin(angles).astype(x.dtype)


def unit(x):
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True))


def length(x):
    """Its norm, whose gradient at 0 is 0, as in the official library."""
    square = (x**2).sum(-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def attention(x, parts, values, minus_own):
    flags, heads = values["flags"], values["num_attention_heads"]
    n, c = x.shape[1], flags["GROUP_SIZE"]

    def split(name):
        y = x @ parts[f"self_attn.{name}_proj.weight"].T
        return y.reshape(1, n, -1, values["hidden_size"] // heads).swapaxes(1, 2)

    def per_query_head(y):
        return jnp.repeat(y, heads // y.shape[1], axis=1)

    theta = values.get("rope_theta", 10000.0)
    q, k, v = rotated(split("q"), theta), per_query_head(rotated(split("k"), theta)), per_query_head(split("v"))
    q, k = unit(q), unit(k)
    full = n // c * c
    local = jnp.concatenate([local_sum(*(y[:, :, i : i + c] for y in (q, k, v))) for i in range(0, n, c)], axis=2)
    out = local
    if flags["USE_GLOBAL"]:
        first = grouped_sum(*(y[:, :, :full] for y in (q, k, v)), c, minus_own)
        grouped = jnp.concatenate([first, rest_sum(q, k, v, full, c)], axis=2)
        if flags["NORM_GLOBAL"]:
            grouped = grouped / (EPSILON + length(grouped))
        a_local = parts["self_attn.local_factor"] if flags["LOCAL_FACTOR"] else 1
        a_grouped = parts["self_attn.global_factor"] if flags["GLOBAL_FACTOR"] else 1
        out = a_local * local + a_grouped * grouped
    if flags["USE_CASTLING"]:
        out = unit(0.5 * v + out / math.pi)
    for flag in ("USE_CASTLING", "ADD_CONV"):
        if flags[flag]:
            out = out + convolution(v, parts["self_attn.dwconv.weight"])
    return out.swapaxes(1, 2).reshape(1, n, -1) @ parts["self_attn.o_proj.weight"].T


def local_sum(q, k, v):
    return jnp.tril(jax.nn.relu(q @ k.swapaxes(-1, -2)) ** 2) @ v


def in_groups(y, c):
    return y.reshape(*y.shape[:2], -1, c, y.shape[-1])


def grouped_sum(q, k, v, c, minus_own):
    q, k, v = (in_groups(y, c) for y in (q, k, v))
    own = jnp.einsum("bhgnd,bhgne->bhgde", k, v)
    if minus_own:
        before = jnp.cumsum(own, axis=2) - own
    else:
        before = jnp.concatenate([jnp.zeros_like(own[:, :, :1]), jnp.cumsum(own[:, :, :-1], axis=2)], axis=2)
    out = jnp.einsum("bhgde,bhgnd->bhgne", before, q)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def rest_sum(q, k, v, full, c):
    k, v = (in_groups(y[:, :, :full], c) for y in (k, v))
    return q[:, :, full:] @ jnp.einsum("bhgnd,bhgne->bhgde", k, v).sum(axis=2)


def convolution(v, weight):
    h, n = weight.shape[2] // 2, v.shape[2]
    padded = jnp.pad(v, ((0, 0), (0, 0), (h, 0), (0, 0)))
    return sum(weight[:, 0, tap, 0][None, :, None, None] * padded[:, :, tap : tap + n] for tap in range(h + 1))

"""The official FLASH by its equations, in JAX but without lin_jax, in float64."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.finfo(np.float32).min


def loss_and_gradients(
    params: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, official: Mapping
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """The loss of the autoregressive wrapper, whose model sees all but the last of `ids`; logits; gradients."""

    def loss(weights):
        x = weights["token_emb.weight"][ids[:, :-1]]
        x = x + weights["abs_pos_emb.scale"] * sinusoids(x.shape[1], official["dim"])
        for layer in range(official["depth"]):
            name = f"layers.{layer}."
            parts = {key.removeprefix(name): array for key, array in weights.items() if key.startswith(name)}
            x = unit_of(x, mask, parts, official) + x
        logits = linear(layer_norm(x, weights, "to_logits.0"), weights, "to_logits.1")
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean(), logits

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        weights = {name: jnp.asarray(array, "float64") for name, array in params.items()}
        (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
        return float(value), np.asarray(logits), {name: np.asarray(g) for name, g in gradient.items()}


def sinusoids(n, dim):
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weights, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def scale_norm(x, parts):
    length = jnp.sqrt((x**2).sum(-1, keepdims=True)) * x.shape[-1] ** -0.5
    return x / jnp.maximum(length, 1e-5) * parts["norm.g"]


def rotated(x, size):
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    even, odd = x[..., :size:2], x[..., 1:size:2]
    pair = [even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)]
    return jnp.concatenate([jnp.stack(pair, axis=-1).reshape(*x.shape[:2], size), x[..., size:]], axis=-1)


def bias(n, parts, official):
    """[n, n]: row i, column j."""
    distance, buckets, start = np.arange(n)[:, None] - np.arange(n)[None], 32, 0
    if official["causal"]:
        distance = np.maximum(distance, 0)
    else:
        buckets //= 2
        start, distance = np.where(distance < 0, buckets, 0), np.abs(distance)
    exact = buckets // 2
    far = exact + np.floor(np.log(np.maximum(distance, 1) / exact) / math.log(128 / exact) * (buckets - exact))
    bucket = start + np.where(distance < exact, distance, np.minimum(far, buckets - 1)).astype(int)
    return parts["rel_pos_bias.relative_attention_bias.weight"][bucket, 0] * math.sqrt(official["query_key_dim"])


def activation(x, official):
    if official["laplace_attn_fn"]:
        return 0.5 * (1 + jax.scipy.special.erf((x - math.sqrt(0.5)) / math.sqrt(1 / (4 * math.pi)) / math.sqrt(2)))
    return jax.nn.relu(x) ** 2


def unit_of(x, mask, parts, official):
    """What one gated attention unit adds."""
    n, g = x.shape[1], official["group_size"]
    u = scale_norm(x, parts) if official["norm_type"] == "scalenorm" else layer_norm(x, parts, "norm")
    if official["shift_tokens"]:
        half = u.shape[-1] // 2
        delayed = jnp.pad(u[:, :-1, :half], ((0, 0), (1, 0), (0, 0)))
        u = jnp.concatenate([delayed, u[..., half:]], axis=-1)
    v, gate = jnp.split(jax.nn.silu(linear(u, parts, "to_hidden.0")), 2, axis=-1)
    z = jax.nn.silu(linear(u, parts, "to_qk.0"))
    gamma, beta = parts["qk_offset_scale.gamma"], parts["qk_offset_scale.beta"]
    heads = [rotated(z * gamma[m] + beta[m], min(32, official["query_key_dim"])) for m in range(len(gamma))]
    seen = mask[:, None, :] & (np.tril(np.ones((n, n), bool)) if official["causal"] else True)
    if official["softmax"] or official["square"]:
        q, k = heads
        scores = q @ k.swapaxes(1, 2) / n + bias(n, parts, official)
        if official["square"]:
            weights = activation(scores / n, official)
        else:
            causal = np.tril(np.ones((n, n), bool)) if official["causal"] else np.ones((n, n), bool)
            weights = jax.nn.softmax(jnp.where(causal, scores, NEVER))
        return linear(gate * (jnp.where(seen, weights, 0) @ v), parts, "to_out")
    q, grouped_q, k, grouped_k = heads
    group = np.arange(n) // g
    # Positions restart in each group: only distances within one matter.
    scores = q @ k.swapaxes(1, 2) / g + bias(n, parts, official)
    local = jnp.where(seen & (group[:, None] == group[None]), activation(scores, official), 0) @ v
    before = mask[:, None, :] & ((group[:, None] > group[None]) if official["causal"] else np.ones((n, n), bool))
    grouped = jnp.where(before, grouped_q @ grouped_k.swapaxes(1, 2), 0) @ v / (g if official["causal"] else n)
    out = sum(branch for on, branch in ((official["local_"], local), (official["global_"], grouped)) if on)
    if official["conv"]:
        if official["castling"]:
            out = v / 2 + out / math.pi
            out = out / jnp.sqrt((out**2).sum(-1, keepdims=True))
        weight = parts["dwconv.weight"][0, 0, :, 0]
        h = len(weight) // 2
        padded = jnp.pad(v, ((0, 0), (h, 0), (0, 0)))
        out = out + sum(weight[tap] * padded[:, tap : tap + n] for tap in range(h + 1))
    return linear(gate * out, parts, "to_out")

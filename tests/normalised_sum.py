"""The official LLaMA with NORM_GLOBAL and Castling in PyTorch, by its equations: for gradients in any precision.

The sum over the groups before one's own is taken either directly or as the official code does, as the sum of all groups
up to one's own, minus one's own.
"""

import math

import numpy as np
import torch
from torch.nn import functional

EPSILON = 1e-5


def gradients(params: dict, ids: np.ndarray, values: dict, *, minus_own: bool, dtype) -> tuple[dict, list]:
    """Gradients of the parameters, and what each layer's attention reads, [N, C]."""
    inputs = []
    weights = {name: torch.tensor(array, dtype=dtype, requires_grad=True) for name, array in params.items()}
    x = weights["model.embed_tokens.weight"][torch.from_numpy(ids).long()]
    for layer in range(values["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        parts = {key.removeprefix(name): array for key, array in weights.items() if key.startswith(name)}
        inputs.append(norm(x, parts["input_layernorm.weight"], values))
        x = x + attention(inputs[-1], parts, values, minus_own)
        x = x + feed_forward(norm(x, parts["post_attention_layernorm.weight"], values), parts)
    logits = norm(x, weights["model.norm.weight"], values) @ weights["lm_head.weight"].T
    loss = functional.cross_entropy(logits[0, :-1], torch.from_numpy(ids[0, 1:]).long())
    loss.backward()
    return {name: w.grad.numpy() for name, w in weights.items()}, [y[0].detach().numpy() for y in inputs]


def norm(x, weight, values):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + values["rms_norm_eps"]))


def feed_forward(x, parts):
    gate, up, down = (parts[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def rotated(x, theta):
    """[1, H, N, D], pairs of the two halves."""
    n, d = x.shape[-2:]
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2, dtype=x.dtype) / d)
    angles = (torch.arange(n, dtype=x.dtype)[:, None] * frequencies).repeat(1, 2)
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1)
    return x * angles.cos() + half * angles.sin()


def attention(x, parts, values, minus_own):
    n, heads, c = x.shape[1], values["num_attention_heads"], values["flags"]["GROUP_SIZE"]
    split = lambda name: (x @ parts[f"self_attn.{name}_proj.weight"].T).view(1, n, heads, -1).transpose(1, 2)  # noqa: E731
    q, k = (rotated(split(name), values["rope_theta"]) for name in "qk")
    q, k, v = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), split("v")
    full = n // c * c
    local = torch.cat([local_sum(*(y[:, :, i : i + c] for y in (q, k, v))) for i in range(0, n, c)], dim=2)
    grouped = torch.cat(
        [grouped_sum(*(y[:, :, :full] for y in (q, k, v)), c, minus_own), rest_sum(q, k, v, full, c)], dim=2
    )
    grouped = grouped / (EPSILON + grouped.norm(dim=-1, keepdim=True))
    out = 0.5 * v + (parts["self_attn.local_factor"] * local + grouped) / math.pi
    out = out / out.norm(dim=-1, keepdim=True) + convolution(v, parts["self_attn.dwconv.weight"])
    return out.transpose(1, 2).reshape(1, n, -1) @ parts["self_attn.o_proj.weight"].T


def local_sum(q, k, v):
    return torch.tril(torch.relu(q @ k.transpose(-1, -2)) ** 2) @ v


def grouped_sum(q, k, v, c, minus_own):
    q, k, v = (y.unflatten(2, (-1, c)) for y in (q, k, v))
    own = torch.einsum("bhgnd,bhgne->bhgde", k, v)
    if minus_own:
        before = own.cumsum(dim=2) - own
    else:
        before = torch.cat([torch.zeros_like(own[:, :, :1]), own[:, :, :-1].cumsum(dim=2)], dim=2)
    return torch.einsum("bhgde,bhgnd->bhgne", before, q).flatten(2, 3)


def rest_sum(q, k, v, full, c):
    k, v = (y[:, :, :full].unflatten(2, (-1, c)) for y in (k, v))
    return q[:, :, full:] @ torch.einsum("bhgnd,bhgne->bhgde", k, v).sum(dim=2)


def convolution(v, weight):
    h = weight.shape[2] // 2
    padded = functional.pad(v, (0, 0, h, 0))
    n = v.shape[2]
    return sum(weight[:, 0, tap, 0][None, :, None, None] * padded[:, :, tap : tap + n] for tap in range(h + 1))

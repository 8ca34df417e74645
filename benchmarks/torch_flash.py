"""FLASH in eager PyTorch, as one writes it from the equations: the opponent of `benchmarks.flash_train`.

Only the augmented causal model (relu^2 in the groups, grouped linear attention, convolution, ScaleNorm, token shift).
Modules carry the names of the official release, so that its weights load by `load_state_dict`.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFlashConfig:
    """Sizes of the model; `kernel` is the official odd width of the centred filter, whose causal half is used.

    `depthwise` computes the same convolution with one channel for every value, which the official code does not do; on
    a CPU it is an order of magnitude quicker than the official image with a single channel.
    """

    vocabulary_size: int
    width: int
    depth: int
    query_key_size: int = 128
    value_size: int
    group_size: int = 256
    kernel: int = 63
    rotary_size: int = 32
    bias_buckets: int = 32
    bias_max_distance: int = 128
    depthwise: bool = False


class TorchFlash(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, config: TorchFlashConfig):
        super().__init__()
        self.token_emb = nn.Embedding(config.vocabulary_size, config.width)
        self.abs_pos_emb = SinusoidalPositions(config.width)
        self.layers = nn.ModuleList(FlashLayer(config) for _ in range(config.depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.vocabulary_size))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens)
        x = x + self.abs_pos_emb(tokens.shape[1])
        for layer in self.layers:
            x = layer(x)
        return self.to_logits(x)


class SinusoidalPositions(nn.Module):
    """Sine and cosine of the positions, times one learned scale."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("inv_freq", 10000 ** -(torch.arange(0, width, 2) / width))

    def forward(self, length: int) -> Tensor:
        angles = torch.arange(length)[:, None] * self.inv_freq
        return self.scale * torch.cat((angles.sin(), angles.cos()), dim=-1)


class ScaleNorm(nn.Module):
    """x over its root mean square, times one learned gain."""

    def __init__(self, width: int):
        super().__init__()
        self.root_width = math.sqrt(width)
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=-1, keepdim=True) / self.root_width
        return x / size.clamp(min=1e-5) * self.g


class OffsetScale(nn.Module):
    """Several affine copies of one projection."""

    def __init__(self, width: int, copies: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(copies, width))
        self.beta = nn.Parameter(torch.zeros(copies, width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x[..., None, :] * self.gamma + self.beta).unbind(dim=-2)


class Rotary(nn.Module):
    """Rotates neighbouring pairs of the first channels by position."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("freqs", 10000 ** -(torch.arange(0, size, 2) / size))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.freqs
        turned, rest = x.split((2 * len(self.freqs), x.shape[-1] - 2 * len(self.freqs)), dim=-1)
        even, odd = turned[..., 0::2], turned[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)


class RelativeBias(nn.Module):
    """T5's causal relative position bias of a group, times the root of the query/key size."""

    def __init__(self, config: TorchFlashConfig):
        super().__init__()
        self.scale = math.sqrt(config.query_key_size)
        self.buckets, self.max_distance = config.bias_buckets, config.bias_max_distance
        self.relative_attention_bias = nn.Embedding(config.bias_buckets, 1)

    def forward(self, length: int) -> Tensor:
        positions = torch.arange(length)
        distance = (positions[:, None] - positions[None, :]).clamp(min=0)
        exact = self.buckets // 2
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = exact + (growth * (self.buckets - exact)).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=self.buckets - 1))
        return self.relative_attention_bias(bucket)[..., 0] * self.scale


class CausalFilter(nn.Module):
    """One centred filter for all channels, of which only the taps of the past and the present count."""

    def __init__(self, kernel: int, depthwise: bool):
        super().__init__()
        self.past, self.depthwise = kernel // 2, depthwise
        self.weight = nn.Parameter(torch.zeros(1, 1, kernel, 1))
        mask = (torch.arange(kernel) <= self.past).float().reshape(1, 1, kernel, 1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        if self.depthwise:
            channels = F.pad(v.transpose(1, 2), (self.past, 0))
            filters = self.weight[0, :, : self.past + 1, 0].expand(v.shape[2], 1, -1)
            return F.conv1d(channels, filters, groups=v.shape[2]).transpose(1, 2)
        return F.conv2d(v[:, None], self.weight * self.mask, padding=(self.past, 0))[:, 0]


class FlashLayer(nn.Module):
    """One gated attention unit with its norm and residual."""

    def __init__(self, config: TorchFlashConfig):
        super().__init__()
        self.group_size = config.group_size
        self.norm = ScaleNorm(config.width)
        self.to_hidden = nn.Sequential(nn.Linear(config.width, 2 * config.value_size), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(config.width, config.query_key_size), nn.SiLU())
        self.qk_offset_scale = OffsetScale(config.query_key_size, 4)
        self.rotary_pos_emb = Rotary(min(config.rotary_size, config.query_key_size))
        self.rel_pos_bias = RelativeBias(config)
        self.dwconv = CausalFilter(config.kernel, config.depthwise)
        self.to_out = nn.Linear(config.value_size, config.width)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        shifted, kept = u.chunk(2, dim=-1)
        u = torch.cat((F.pad(shifted, (0, 0, 1, -1)), kept), dim=-1)
        v, gate = self.to_hidden(u).chunk(2, dim=-1)
        heads = [self.rotary_pos_emb(head) for head in self.qk_offset_scale(self.to_qk(u))]
        return self.to_out(gate * (self.attend(*heads, v) + self.dwconv(v))) + x

    def attend(self, quad_q: Tensor, lin_q: Tensor, quad_k: Tensor, lin_k: Tensor, v: Tensor) -> Tensor:
        length, size = v.shape[1], self.group_size
        padding = -length % size
        grouped = [
            F.pad(array, (0, 0, 0, padding)).unflatten(1, (-1, size)) for array in (quad_q, lin_q, quad_k, lin_k, v)
        ]
        quad_q, lin_q, quad_k, lin_k, v = grouped
        scores = torch.einsum("bnid,bnjd->bnij", quad_q, quad_k) / size + self.rel_pos_bias(size)
        future = torch.ones(size, size, dtype=torch.bool).triu(1)
        weights = (F.relu(scores) ** 2).masked_fill(future, 0.0)
        local = torch.einsum("bnij,bnje->bnie", weights, v)
        states = torch.einsum("bnjd,bnje->bnde", lin_k, v) / size
        before = F.pad(states.cumsum(dim=1), (0, 0, 0, 0, 1, -1))
        out = local + torch.einsum("bnid,bnde->bnie", lin_q, before)
        return out.flatten(1, 2)[:, :length]

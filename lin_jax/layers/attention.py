"""What LLaMA and GPT-2 do with queries, keys and values: softmax attention, augmented linear attention, LongLoRA's."""

from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.config import AttentionConfig
from lin_jax.layers.gated_attention import Rows
from lin_jax.layers.parameter import parameter
from lin_jax.ops.augmented_attention import augmented_attention
from lin_jax.ops.castling import castle
from lin_jax.ops.causal_conv import causal_conv
from lin_jax.ops.feature_maps import unit
from lin_jax.ops.softmax_attention import longlora_attention, softmax_attention


def layer_kinds(attention: AttentionConfig, depth: int) -> Sequence[str]:
    """The kind of attention of each layer."""
    return ["softmax" if layer in attention.softmax_layers else attention.kind for layer in range(depth)]


class Mixing(nnx.Module):
    """Attention without its projections; a layer's kind is chosen at the call, so that layers of two kinds can stack.

    The new parameters of linearized attention start so that pretrained layers are disturbed least: the grouped branch
    and the convolution at 0, as released. A layer whose kind is softmax has them and leaves them alone.
    """

    def __init__(self, attention: AttentionConfig, heads: int):
        self.attention = attention
        augmented = attention.kind == "augmented"
        if augmented and attention.grouped and attention.grouped_weight == "learned":
            self.alpha = parameter(jnp.zeros(()), ())
        if augmented and attention.local != "none" and attention.local_weight == "learned":
            self.local_factor = parameter(jnp.ones(()), ())
        if augmented and attention.convolution:
            self.filter = parameter(jnp.zeros((attention.convolution, heads)), (None, "heads"))

    def __call__(
        self,
        q_BTHD: Float[Array, "B T H D"],
        k_BTKD: Float[Array, "B T K D"],
        v_BTKE: Float[Array, "B T K E"],
        rows: Rows,
        kind: str,
    ) -> Float[Array, "B T H E"]:
        """The attention of `kind`."""
        if kind == "softmax":
            return softmax_attention(q_BTHD, k_BTKD, v_BTKE, rows.segment_ids_BT)
        if kind == "longlora":
            return longlora_attention(
                q_BTHD,
                k_BTKD,
                v_BTKE,
                split=self.attention.longlora_split,
                shift=self.attention.longlora_shift,
                segment_ids_BT=rows.segment_ids_BT,
            )
        return self._augmented(q_BTHD, k_BTKD, v_BTKE, rows)

    def _augmented(self, q: Array, k: Array, v: Array, rows: Rows) -> Array:
        """relu2 and laplace score normalised queries and keys, as released; softmax the scaled ones as they are."""
        attention = self.attention
        unit_q, unit_k = unit(q), unit(k)
        softmax = attention.local == "softmax"
        local_q, local_k = (q, k) if softmax else (unit_q, unit_k)
        scale = q.shape[-1] ** -0.5 if softmax else 1.0
        conv_WH = self.filter[...] if attention.convolution else None
        local_weighted = attention.local != "none" and attention.local_weight == "learned"
        # The branches are computed together unless something comes in between.
        if not (attention.normalise_grouped or local_weighted or attention.castling):
            return self._attend(
                local_q, local_k, v, unit_q, unit_k, attention.local, scale, self._alpha(), conv_WH, rows
            )
        y = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
        if attention.local != "none":
            local = self._attend(local_q, local_k, v, None, None, attention.local, scale, None, None, rows)
            y += local * self.local_factor[...].astype(v.dtype) if local_weighted else local
        if attention.grouped:
            grouped = self._attend(unit_q, unit_k, v, unit_q, unit_k, "none", 1.0, 1.0, None, rows)
            grouped = _normalised(grouped) if attention.normalise_grouped else grouped
            y += grouped * jnp.asarray(self._alpha()).astype(v.dtype)
        repeated_v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        if attention.castling:
            y = castle(repeated_v, y)
        return y if conv_WH is None else y + causal_conv(repeated_v, conv_WH, rows.segment_ids_BT)

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        grouped_q: Array | None,
        grouped_k: Array | None,
        local: str,
        scale: float,
        alpha: Array | float | None,
        conv_WH: Array | None,
        rows: Rows,
    ) -> Array:
        """The op; `alpha=None` turns the grouped branch off."""
        attention = self.attention
        y = augmented_attention(
            q,
            k,
            v,
            grouped_q_BTHP=grouped_q,
            grouped_k_BTKP=grouped_k,
            local=local,
            score_scale=scale,
            grouped=attention.grouped and alpha is not None,
            feature_map=attention.feature_map,
            alpha=1.0 if alpha is None else alpha,
            conv_WH=conv_WH,
            group_size=attention.group_size,
            local_groups=attention.local_groups,
            segment_ids_BT=rows.segment_ids_BT,
            implementation=attention.implementation,
        )
        return cast(Array, y)

    def _alpha(self) -> Array | float:
        learned = self.attention.grouped and self.attention.grouped_weight == "learned"
        return self.alpha[...] if learned else 1.0


def _normalised(x: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
    """x / (1e-5 + ||x||), with a finite gradient at 0."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, 1e-24))
    return (x / (1e-5 + norm)).astype(x.dtype)

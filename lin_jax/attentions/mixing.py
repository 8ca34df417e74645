"""What LLaMA and GPT-2 do with queries, keys and values: softmax attention, augmented linear attention, LongLoRA's."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.settings import AttentionConfig
from lin_jax.layers.parameter import parameter
from lin_jax.layers.steps import Step, Verify
from lin_jax.models.gated_attention import Rows
from lin_jax.ops.castling import castle
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend
from lin_jax.ops.linear_attention.feature_maps import unit
from lin_jax.ops.linear_attention.state import AttentionState, Pending, empty_state
from lin_jax.ops.linear_attention.verify import append, commit_path, verify_tree
from lin_jax.ops.rows import convolve
from lin_jax.ops.softmax_attention.api import longlora_attention
from lin_jax.ops.softmax_attention.cache import (
    Cache,
    append_to_cache,
    commit_to_cache,
    empty_cache,
    extend_softmax,
    verify_softmax,
)
from lin_jax.ops.softmax_attention.whole_row import sharded_softmax
from lin_jax.ops.tree import chain


def layer_kinds(attention: AttentionConfig, depth: int) -> Sequence[str]:
    """The kind of attention of each layer."""
    return ["softmax" if layer in attention.softmax_layers else attention.kind for layer in range(depth)]


class _Operands(NamedTuple):
    """What the op is given; the grouped branch has its own queries and keys, or None."""

    q: Array
    k: Array
    v: Array
    grouped_q: Array | None
    grouped_k: Array | None


class _Branches(NamedTuple):
    """Which branches of the op are on."""

    local: str = "none"
    grouped: bool = False
    alpha: Array | float = 1.0
    conv_WH: Array | None = None


MixingState = AttentionState | Cache


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
            return sharded_softmax(q_BTHD, k_BTKD, v_BTKE, rows.segment_ids_BT, rows.partition.for_ops(heads="heads"))
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
        shards = rows.partition.for_ops(heads="heads")
        # The op normalises, so that a kernel needs no normalised copies; but states hold keys that are normalised.
        inside = shards is None or shards.parts == 1
        operands = _Operands(q, k, v, None, None) if inside else self._operands(q, k, v)

        def attend_branches(branches: _Branches) -> Array:
            if branches.local == "none" and not branches.grouped and branches.conv_WH is not None:
                return convolve(_per_query_head(v, q), branches.conv_WH, rows.segment_ids_BT, shards)
            y, _ = attend(
                self._arrays(operands, branches),
                dataclasses.replace(self._options(branches, q.shape[-1]), normalise=inside),
                segment_ids_BT=rows.segment_ids_BT,
                shards=shards,
                position_BT=rows.position_BT,
            )
            return y

        return self._combine(q, v, attend_branches)

    def _operands(self, q: Array, k: Array, v: Array) -> _Operands:
        """relu2 and laplace score normalised queries and keys, as released; softmax the scaled ones as they are."""
        unit_q, unit_k = unit(q), unit(k)
        if self.attention.local != "softmax":
            return _Operands(unit_q, unit_k, v, None, None)
        return _Operands(q, k, v, *((unit_q, unit_k) if self.attention.grouped else (None, None)))

    def _combine(self, q: Array, v: Array, attend: Callable[[_Branches], Array]) -> Array:
        """The branches together, unless something comes in between."""
        attention = self.attention
        conv_WH = self.filter[...] if attention.convolution else None
        local_weighted = attention.local != "none" and attention.local_weight == "learned"
        if not (attention.normalise_grouped or local_weighted or attention.castling):
            return attend(_Branches(attention.local, attention.grouped, self._alpha(), conv_WH))
        y = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
        if attention.local != "none":
            local = attend(_Branches(local=attention.local))
            y += local * self.local_factor[...].astype(v.dtype) if local_weighted else local
        if attention.grouped:
            grouped = attend(_Branches(grouped=True))
            grouped = _normalised(grouped) if attention.normalise_grouped else grouped
            y += grouped * jnp.asarray(self._alpha()).astype(v.dtype)
        if attention.castling:
            y = castle(_per_query_head(v, q), y)
        return y if conv_WH is None else y + attend(_Branches(conv_WH=conv_WH))

    def _arrays(self, operands: _Operands, branches: _Branches) -> AttentionArrays:
        """The op's arrays, for some of the branches."""
        return AttentionArrays(
            operands.q,
            operands.k,
            operands.v,
            operands.grouped_q,
            operands.grouped_k,
            alpha_H=branches.alpha,
            conv_WH=branches.conv_WH,
        )

    def _options(self, branches: _Branches, head_size: int = 1) -> AttentionOptions:
        attention = self.attention
        return AttentionOptions(
            group_size=attention.group_size,
            local_groups=attention.local_groups,
            local=branches.local,
            score_scale=head_size**-0.5 if attention.local == "softmax" else 1.0,
            grouped=branches.grouped,
            feature_map=attention.feature_map,
            implementation=attention.implementation,
        )

    def empty_state(self, k_BTKD: Array, v_BTKE: Array, capacity: int, kind: str) -> MixingState:
        """The state before the first token, for keys and values of these shapes (T does not matter).

        A cache has slots for `capacity` tokens; the state of augmented attention needs none.
        """
        if kind == "softmax":
            return empty_cache(k_BTKD, v_BTKE, capacity)
        attention = self.attention
        return empty_state(
            k_BTKD,
            v_BTKE,
            self._options(_Branches()),
            grouped_k_BTKP=k_BTKD if attention.local == "softmax" and attention.grouped else None,
            taps=attention.convolution,
        )

    def decode(
        self, q_BTHD: Array, k_BTKD: Array, v_BTKE: Array, state: MixingState, step: Step
    ) -> tuple[Array, MixingState | Pending]:
        """The attention of tokens that follow a state.

        Returns:
            The outputs, and the state after the tokens of an `Extend`, or what `commit` needs after a `Verify`.
        """
        if isinstance(state, Cache):
            return _decode_with_cache(q_BTHD, k_BTKD, v_BTKE, state, step)
        operands = self._operands(q_BTHD, k_BTKD, v_BTKE)

        def attend_branches(branches: _Branches) -> Array:
            return self._attend_after(operands, branches, state, step)

        y_BTHE = self._combine(q_BTHD, v_BTKE, attend_branches)
        pending = Pending(operands.k, operands.grouped_k, v_BTKE)
        if isinstance(step, Verify):
            return y_BTHE, pending
        return y_BTHE, append(state, pending, step.count_B, self._options(_Branches()))

    def _attend_after(self, operands: _Operands, branches: _Branches, state: AttentionState, step: Step) -> Array:
        """Some of the branches, of tokens that follow a state. Rows shorter than a group are not padded to one."""
        T = operands.q.shape[1]
        arrays, options = self._arrays(operands, branches), self._options(branches, operands.q.shape[-1])
        if isinstance(step, Verify) or self.attention.group_size >= T:
            return verify_tree(arrays, step.tree if isinstance(step, Verify) else chain(T), state, options)
        y, _ = attend(arrays, options, segment_ids_BT=step.segment_ids(T), initial_state=state)
        return y

    def commit(
        self, state: MixingState, pending: Pending, path_BP: Int[Array, "B P"], count_B: Int[Array, " B"]
    ) -> MixingState:
        """The state after the first `count_B` nodes of each row's path."""
        if isinstance(state, Cache):
            return commit_to_cache(state, pending, path_BP, count_B)
        return commit_path(state, pending, path_BP, count_B, self._options(_Branches()))

    def _alpha(self) -> Array | float:
        learned = self.attention.grouped and self.attention.grouped_weight == "learned"
        return self.alpha[...] if learned else 1.0


def _decode_with_cache(
    q_BTHD: Array, k_BTKD: Array, v_BTKE: Array, cache: Cache, step: Step
) -> tuple[Array, Cache | Pending]:
    pending = Pending(k_BTKD, None, v_BTKE)
    if isinstance(step, Verify):
        return verify_softmax(q_BTHD, k_BTKD, v_BTKE, step.tree, cache), pending
    longer = append_to_cache(cache, pending, step.count_B)
    return extend_softmax(q_BTHD, longer, cache.length_B), longer


def _per_query_head(v_BTKE: Array, q_BTHD: Array) -> Float[Array, "B T H E"]:
    return jnp.repeat(v_BTKE, q_BTHD.shape[2] // v_BTKE.shape[2], axis=2)


def _normalised(x: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
    """x / (1e-5 + ||x||), with a finite gradient at 0."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, 1e-24))
    return (x / (1e-5 + norm)).astype(x.dtype)

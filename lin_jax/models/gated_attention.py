"""FLASH's gated attention unit: one wide value head, one narrow query/key head, a gate, and any kind of attention."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import NORMS
from lin_jax.layers.parameter import Constant, parameter, uniform
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.positions import bias_buckets, rotate, token_shift
from lin_jax.layers.steps import Step, Verify
from lin_jax.models.flash_settings import FlashConfig
from lin_jax.ops.castling import castle
from lin_jax.ops.linear_attention import AttentionArrays, AttentionOptions, attend
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS
from lin_jax.ops.linear_attention.state import AttentionState, Pending, empty_state
from lin_jax.ops.linear_attention.verify import append, commit_path, verify_tree
from lin_jax.ops.rows import convolve, positions
from lin_jax.ops.softmax_attention.whole_row import whole_row_attention
from lin_jax.ops.tree import Tree, chain


class Rows(NamedTuple):
    """How tokens lie in their rows, the same for all layers.

    Attributes:
        position_BT: position of each token in its sequence.
        segment_ids_BT: sequences of a row, 0 for padding; None if every row is one sequence.
        value_mask_BT: 0 where attention must not see a value; only for `padding="released"`.
        partition: how all arrays of rows are cut.
    """

    position_BT: Int[Array, "B T"]
    segment_ids_BT: Int[Array, "B T"] | None
    value_mask_BT: Float[Array, "B T"] | None
    partition: Partition


def place(
    segment_ids_BT: Int[Array, "B T"] | None, shape: tuple[int, int], padding: str, partition: Partition = WHOLE
) -> Rows:
    """The rows of a batch of `shape` (B, T); see `FlashConfig.padding`."""
    in_row_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    in_row_BT = partition.constrain(in_row_BT, "batch", "tokens")
    if segment_ids_BT is None:
        return Rows(in_row_BT, None, None, partition)
    if padding == "released":
        return Rows(in_row_BT, None, (segment_ids_BT != 0).astype(jnp.float32), partition)
    return Rows(positions(segment_ids_BT, partition.for_ops()), segment_ids_BT, None, partition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedState:
    """State of one layer: of its attention, and the channels of the last token that the token shift delays."""

    attention: AttentionState
    previous_BC: Float[Array, "B half"]


class GatedPending(NamedTuple):
    """What a commit needs to know of draft tokens."""

    tokens: Pending
    half_BMC: Float[Array, "B M half"]


class GatedAttention(nnx.Module):
    """x + W_o (gate * attention(...)) with gate and values from one projection (Hua et al., 2022).

    The released code computes, with u the normalised and shifted x: [v | gate] = SiLU(W_h u), z = SiLU(W_qk u), and
    queries and keys z * gamma_m + beta_m: four of them (local q, grouped q, local k, grouped k), or two (q, k) for
    attention over the whole row. Local scores are q . k / G + bias, grouped attention is divided by G.
    """

    def __init__(self, config: FlashConfig, *, rngs: nnx.Rngs):
        C, E, D = config.width, config.value_size, config.query_key_size
        attention = config.attention
        self.config = config
        self.norm = NORMS[config.norm](C)
        self.hidden = Linear(C, 2 * E, ("width", "hidden"), rngs=rngs)
        self.query_key = Linear(C, D, ("width", "query_key"), rngs=rngs)
        heads = 4 if attention.kind == "augmented" else 2
        # The released start: gamma has standard deviation 0.02, so scores start near the bias alone.
        self.gamma = parameter(0.02 * jax.random.normal(rngs.params(), (heads, D)), (None, "query_key"))
        self.beta = parameter(jnp.zeros((heads, D)), (None, "query_key"))
        # The released bias starts with standard deviation sqrt(D), at which every Laplace weight is 0 or 1 and has no
        # gradient (measured in the official code); here it starts with 1.
        bias = jax.random.normal(rngs.params(), (config.bias_buckets, 1)) * D**-0.5
        self.bias = parameter(bias, (None, None))
        self.output = Linear(E, C, ("hidden", "width"), rngs=rngs)
        if attention.kind == "augmented" and attention.convolution:
            taps = attention.convolution
            self.filter = parameter(uniform(rngs.params(), (taps, 1), taps), (None, None))
        if attention.kind == "augmented" and FEATURE_MAPS[attention.feature_map].arrays:
            (projection,) = FEATURE_MAPS[attention.feature_map].arrays
            self.projection = Constant(projection.draw(rngs.params(), D, attention.feature_size))

    def __call__(self, x_BTC: Float[Array, "B T C"], rows: Rows) -> Float[Array, "B T C"]:
        """Applies the layer."""
        u_BTC = self.norm(x_BTC)
        if self.config.token_shift:
            u_BTC = token_shift(u_BTC, rows.position_BT, rows.partition.for_ops())
        v_BTE, gate_BTE, heads_BT2D = self._project(u_BTC, rows.position_BT, rows.partition)
        attend = self._augmented if self.config.attention.kind == "augmented" else self._whole_row
        attended_BTE = attend(heads_BT2D, v_BTE, rows)
        return x_BTC + self.output(gate_BTE * attended_BTE)

    def _project(self, u_BTC: Array, position_BT: Array, partition: Partition = WHOLE) -> tuple[Array, Array, Array]:
        """Values, gate, and rotated queries and keys."""
        v_BTE, gate_BTE = (jax.nn.silu(x) for x in self.hidden.parts(u_BTC, 2, partition))
        z_BTD = jax.nn.silu(self.query_key(u_BTC))
        heads_BT2D = z_BTD[:, :, None] * self.gamma[...].astype(z_BTD.dtype)[None, None]
        heads_BT2D += self.beta[...].astype(z_BTD.dtype)[None, None]
        return v_BTE, gate_BTE, rotate(heads_BT2D, position_BT, self.config.rotary_size)

    def _augmented(self, heads_BT4D: Array, v_BTE: Array, rows: Rows) -> Array:
        attention = self.config.attention
        q, grouped_q, k, grouped_k = self._operands(heads_BT4D)
        if not attention.causal:
            grouped_q = grouped_q * _per_token_count(rows).astype(grouped_q.dtype)[..., None, None]
        v_BT1E = v_BTE[:, :, None]
        conv_W1 = self.filter[...] if attention.convolution else None
        # Folded into the scores unless something comes in between.
        apart = attention.castling or rows.value_mask_BT is not None
        shards = rows.partition.for_ops(values="hidden")
        seen_BT1E = v_BT1E if rows.value_mask_BT is None else v_BT1E * _broadcast(rows.value_mask_BT, v_BT1E)
        y_BT1E, _ = attend(
            self._arrays(q, k, seen_BT1E, grouped_q, grouped_k, None if apart else conv_W1),
            self._options(),
            segment_ids_BT=rows.segment_ids_BT,
            shards=shards,
            position_BT=rows.position_BT,
        )
        if attention.castling:
            y_BT1E = castle(v_BT1E, y_BT1E)
        if apart and conv_W1 is not None:
            y_BT1E += convolve(v_BT1E, conv_W1, rows.segment_ids_BT, shards)
        return y_BT1E[:, :, 0]

    def _operands(self, heads_BT4D: Array) -> tuple[Array, Array, Array, Array]:
        """Queries and keys of the local and the grouped branch: q, grouped q, k, grouped k; random maps applied."""
        q, grouped_q, k, grouped_k = jnp.split(heads_BT4D, 4, axis=2)
        feature_map = FEATURE_MAPS[self.config.attention.feature_map]
        if feature_map.arrays:
            grouped_q, grouped_k = (feature_map.apply(x, self.projection[...]) for x in (grouped_q, grouped_k))
        return q, grouped_q, k, grouped_k

    def _arrays(
        self, q: Array, k: Array, v: Array, grouped_q: Array, grouped_k: Array | None, conv_W1: Array | None
    ) -> AttentionArrays:
        """The op's arrays."""
        attention, G = self.config.attention, self.config.attention.group_size
        bias = self._bias(G * attention.local_groups) if attention.local != "none" else None
        return AttentionArrays(q, k, v, grouped_q, grouped_k, bias, 1 / G if attention.causal else 1.0, conv_W1)

    def _options(self) -> AttentionOptions:
        attention = self.config.attention
        return AttentionOptions(
            group_size=attention.group_size,
            local_groups=attention.local_groups,
            local=attention.local,
            score_scale=1 / attention.group_size,
            grouped=attention.grouped,
            feature_map="identity" if FEATURE_MAPS[attention.feature_map].arrays else attention.feature_map,
            causal=attention.causal,
            implementation=attention.implementation,
        )

    def empty_state(self, batch: int, capacity: int, kind: str) -> GatedState:
        """The state before the first token; `capacity` does not matter."""
        config, attention = self.config, self.config.attention
        zeros = lambda size: jnp.zeros((batch, 0, 1, size), config.dtype)  # noqa: E731
        own = FEATURE_MAPS[attention.feature_map].size(config.query_key_size, attention.feature_size)
        state = empty_state(
            zeros(config.query_key_size),
            zeros(config.value_size),
            self._options(),
            grouped_k_BTKP=zeros(own),
            taps=attention.convolution,
        )
        return GatedState(state, jnp.zeros((batch, config.width // 2), config.dtype))

    def decode(
        self, x_BTC: Float[Array, "B T C"], position_BT: Int[Array, "B T"], state: GatedState, step: Step
    ) -> tuple[Array, Any]:
        """The layer for tokens that follow a state.

        Returns:
            The outputs, and the state after the tokens of an `Extend`, or what `commit` needs after a `Verify`.
        """
        T = x_BTC.shape[1]
        tree = step.tree if isinstance(step, Verify) else chain(T)
        u_BTC, half_BTC = self._shift(self.norm(x_BTC), state.previous_BC, tree)
        v_BTE, gate_BTE, heads_BT4D = self._project(u_BTC, position_BT)
        q, grouped_q, k, grouped_k = self._operands(heads_BT4D)
        v_BT1E = v_BTE[:, :, None]
        pending = GatedPending(Pending(k, grouped_k, v_BT1E), half_BTC)
        attended_BT1E = self._attend_after(q, grouped_q, pending.tokens, state.attention, step, tree)
        y_BTC = x_BTC + self.output(gate_BTE * attended_BT1E[:, :, 0])
        if isinstance(step, Verify):
            return y_BTC, pending
        after = append(state.attention, pending.tokens, step.count_B, self._options())
        return y_BTC, GatedState(after, _last(half_BTC, step.count_B, state.previous_BC))

    def _shift(self, u_BTC: Array, previous_BC: Array, tree: Tree) -> tuple[Array, Array]:
        """The token shift, where the token before a node is its parent; and the half of the channels it delays."""
        half = u_BTC.shape[-1] // 2
        if not self.config.token_shift:
            return u_BTC, u_BTC[..., :half]
        before = jnp.concatenate([previous_BC[:, None], u_BTC[..., :half]], axis=1)
        delayed = before[:, np.asarray(tree.parents) + 1]
        return jnp.concatenate([delayed, u_BTC[..., half:]], axis=-1), u_BTC[..., :half]

    def _attend_after(
        self, q: Array, grouped_q: Array, tokens: Pending, state: AttentionState, step: Step, tree: Tree
    ) -> Array:
        attention, (k, grouped_k, v) = self.config.attention, tokens
        conv_W1 = self.filter[...] if attention.convolution else None
        arrays, options = self._arrays(q, k, v, grouped_q, grouped_k, conv_W1), self._options()

        def attend_after(arrays: AttentionArrays, options: AttentionOptions) -> Array:
            if isinstance(step, Verify) or q.shape[1] <= attention.group_size:
                return verify_tree(arrays, tree, state, options)
            return attend(arrays, options, segment_ids_BT=step.segment_ids(q.shape[1]), initial_state=state)[0]

        if not attention.castling:
            return attend_after(arrays, options)
        y = castle(v, attend_after(dataclasses.replace(arrays, conv_WH=None), options))
        off = dataclasses.replace(options, local="none", grouped=False)
        return y if conv_W1 is None else y + attend_after(dataclasses.replace(arrays, bias_XH=None), off)

    def commit(
        self, state: GatedState, pending: GatedPending, path_BP: Int[Array, "B P"], count_B: Int[Array, " B"]
    ) -> GatedState:
        """The state after the first `count_B` nodes of each row's path."""
        after = commit_path(state.attention, pending.tokens, path_BP, count_B, self._options())
        half_BPC = jnp.take_along_axis(pending.half_BMC, path_BP[:, :, None], axis=1)
        return GatedState(after, _last(half_BPC, count_B, state.previous_BC))

    def _whole_row(self, heads_BT2D: Array, v_BTE: Array, rows: Rows) -> Array:
        """Softmax or quadratic attention is the local branch of one group that spans the row."""
        config, attention, T = self.config, self.config.attention, v_BTE.shape[1]
        quadratic = attention.kind == "quadratic"
        scale = config.query_key_size**-0.5 if config.score_scale == "head" else 1 / T
        # The released quadratic form divides scores and bias by the row length once more.
        again = 1 / T if quadratic and config.score_scale == "released" else 1.0
        v_BT1E = v_BTE[:, :, None]
        if rows.value_mask_BT is not None:
            v_BT1E = v_BT1E * _broadcast(rows.value_mask_BT, v_BT1E)
        q_BT1D, k_BT1D = heads_BT2D[:, :, :1], heads_BT2D[:, :, 1:]
        local, bias_X1 = attention.local if quadratic else "softmax", self._bias(T) * again
        shards = rows.partition.for_ops(values="hidden")
        if shards is not None and shards.parts > 1:
            named: dict[str, Any] = {"activation": local, "score_scale": scale * again, "bias_T": bias_X1[:, 0]}
            return whole_row_attention(q_BT1D, k_BT1D, v_BT1E, rows.segment_ids_BT, shards, **named)[:, :, 0]
        options = AttentionOptions(
            group_size=T,
            local=local,
            score_scale=scale * again,
            grouped=False,
            causal=attention.causal,
            implementation=attention.implementation,
        )
        arrays = AttentionArrays(q_BT1D, k_BT1D, v_BT1E, bias_XH=bias_X1)
        y_BT1E, _ = attend(arrays, options, segment_ids_BT=rows.segment_ids_BT, shards=shards)
        return y_BT1E[:, :, 0]

    def _bias(self, slots: int) -> Float[Array, "X 1"]:
        """sqrt(D) times the entry of each distance's bucket."""
        config, causal = self.config, self.config.attention.causal
        distance = np.arange(0 if causal else 1 - slots, slots)
        bucket = bias_buckets(distance, config.bias_buckets, config.bias_max_distance, causal)
        return self.bias[...][bucket] * config.query_key_size**0.5


def _last(x_BTC: Array, count_B: Array, otherwise_BC: Array) -> Array:
    """Of each row the entry of its last token, or `otherwise` where it has none."""
    last_B1C = jnp.take_along_axis(x_BTC, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    return jnp.where(count_B[:, None] > 0, last_B1C[:, 0], otherwise_BC)


def _broadcast(mask_BT: Array, like: Array) -> Array:
    return mask_BT.astype(like.dtype).reshape(*mask_BT.shape, *(1,) * (like.ndim - 2))


def _per_token_count(rows: Rows) -> Float[Array, "B T"]:
    """1 / tokens in the sequence of each token; bidirectional grouped attention is a mean over it."""
    if rows.segment_ids_BT is None:
        return jnp.full(rows.position_BT.shape, 1 / rows.position_BT.shape[1], jnp.float32)
    T = rows.position_BT.shape[1]
    index_T = jnp.arange(T, dtype=jnp.int32)[None]
    is_last_BT = jnp.pad(rows.position_BT[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    last_BT = jax.lax.cummin(jnp.where(is_last_BT, index_T, T), axis=1, reverse=True)
    return 1 / (rows.position_BT + 1 + last_BT - index_T).astype(jnp.float32)

"""FLASH: a language model of gated attention units (Hua et al., 2022, as released with You et al., 2024)."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attentions.augmented import AugmentedConfig, Mixture, Operands
from lin_jax.attentions.base import NOT_CAUSAL, AttentionConfig, HeadSizes, Scoring
from lin_jax.attentions.registry import ATTENTIONS, make_attention
from lin_jax.layers.embedding import look_up
from lin_jax.layers.linear import Linear
from lin_jax.layers.norms import NORMS, LayerNorm
from lin_jax.layers.parameter import constant, parameter, uniform
from lin_jax.layers.partition import WHOLE, Partition
from lin_jax.layers.positions import bias_buckets, rotate, sinusoids, token_shift
from lin_jax.layers.rows import Rows, place, tokens_in_sequence
from lin_jax.layers.stack import stack_layers
from lin_jax.models.base import Decoder, Layer, Matrix, ModelConfig
from lin_jax.ops.linear_attention.feature_maps import FEATURE_MAPS
from lin_jax.ops.linear_attention.state import AttentionState, Pending
from lin_jax.ops.tree import Tree, chain
from lin_jax.settings.base import require, require_at_least_zero, require_positive, setting, variants


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashConfig(ModelConfig):
    """A FLASH language model: gated attention units, no separate feed-forward layers."""

    architecture: Literal["flash"] = setting("flash", "which model these settings are of")
    vocabulary_size: int = setting(50257, "tokens V that the model knows", most=2**24)
    width: int = setting(768, "model width C", most=2**20)
    depth: int = setting(24, "layers L", most=2**12)
    query_key_size: int = setting(128, "query/key size D, shared by all layers' single head", most=2**16)
    expansion: float = setting(2.0, "value size E as a multiple of the width", most=64)
    norm: Literal["scalenorm", "layernorm"] = setting("scalenorm", "normalisation before each layer")
    token_shift: bool = setting(True, "delay half of the channels by one token before each layer")
    rotary_size: int = setting(32, "channels of queries and keys that are rotated by position", most=2**16)
    bias_buckets: int = setting(32, "buckets of the T5 relative position bias", most=2**16)
    bias_max_distance: int = setting(128, "distance from which on all positions share the last bucket", most=2**24)
    attention: AttentionConfig = variants(AugmentedConfig, ATTENTIONS, "the attention of every layer")
    padding: Literal["exact", "released"] = setting(
        "exact",
        "exact: padding changes nothing; released: the official code, in which the convolution and the token shift "
        "see padding and groups are counted from the start of the row",
    )
    score_scale: Literal["released", "head"] = setting(
        "released",
        "scale of whole-row scores (kinds softmax and quadratic): released divides by the row length, as the official "
        "code does; head divides by the square root of query_key_size, which does not depend on the row",
    )

    free: ClassVar[tuple[str, ...]] = (*ModelConfig.free, "padding", "score_scale")

    def _check(self) -> None:
        require_positive(self, "vocabulary_size", "width", "depth", "query_key_size", "expansion", "bias_max_distance")
        require_at_least_zero(self, "rotary_size")
        require(self.width % 2 == 0, f"width must be even (sine and cosine halves), but is {self.width}")
        require(
            self.rotary_size % 2 == 0 and self.rotary_size <= self.query_key_size,
            f"rotary_size must be even and at most query_key_size={self.query_key_size}, but is {self.rotary_size}",
        )
        require(
            self.bias_buckets >= 4 and self.bias_buckets % 4 == 0,
            f"bias_buckets must be a positive multiple of 4, but is {self.bias_buckets}",
        )
        require(
            self.bias_max_distance > self.bias_buckets // 2,
            f"bias_max_distance must exceed bias_buckets/2={self.bias_buckets // 2}, but is {self.bias_max_distance}",
        )
        value_size = self.width * self.expansion
        require(value_size == int(value_size), f"width * expansion must be whole, but is {value_size}")
        _refuse_transformer_attention(self.attention)

    @property
    def value_size(self) -> int:
        """Value size E."""
        return int(self.width * self.expansion)

    def check_segments(self) -> None:
        """Raise `ConfigError` where released padding would mix the documents of a row."""
        require(
            self.padding == "exact",
            "data.packing=segments keeps documents apart, but model.padding=released mixes them: use padding=exact",
        )


def _refuse_transformer_attention(attention: AttentionConfig) -> None:
    """Raise `ConfigError` for what FLASH's attention does not have."""
    require(attention.kind != "longlora", "attention.kind=longlora is not for FLASH")
    plain = AugmentedConfig()
    for name in ("softmax_layers", "grouped_weight", "local_weight", "normalise_grouped"):
        value = getattr(attention, name, getattr(plain, name))
        require(value == getattr(plain, name), f"attention.{name}={value} is not for FLASH, which has no such choice")


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


class GatedAttention(Layer):
    """x + W_o (gate * attention(...)) with gate and values from one projection (Hua et al., 2022).

    The released code computes, with u the normalised and shifted x: [v | gate] = SiLU(W_h u), z = SiLU(W_qk u), and
    queries and keys z * gamma_m + beta_m: four of them (local q, grouped q, local k, grouped k) for augmented
    attention, else two (q, k). Local scores are q . k / G + bias, grouped attention is divided by G.
    """

    def __init__(self, config: FlashConfig, *, rngs: nnx.Rngs):
        C, E, D = config.width, config.value_size, config.query_key_size
        attention = config.attention
        role: dict[str, Any] = {"roles": ("attention",)}
        self.config = config
        self.norm = NORMS[config.norm](C)
        self.hidden = Linear(C, 2 * E, ("width", "hidden"), **role, rngs=rngs)
        self.query_key = Linear(C, D, ("width", "query_key"), **role, rngs=rngs)
        heads = 4 if isinstance(attention, AugmentedConfig) else 2
        # The released start: gamma has standard deviation 0.02, so scores start near the bias alone.
        self.gamma = parameter(0.02 * jax.random.normal(rngs.params(), (heads, D)), (None, "query_key"), **role)
        self.beta = parameter(jnp.zeros((heads, D)), (None, "query_key"), **role)
        # The released bias starts with standard deviation sqrt(D), at which every Laplace weight is 0 or 1 and has no
        # gradient (measured in the official code); here it starts with 1.
        bias = jax.random.normal(rngs.params(), (config.bias_buckets, 1)) * D**-0.5
        self.bias = parameter(bias, (None, None), **role)
        self.output = Linear(E, C, ("hidden", "width"), **role, rngs=rngs)
        if not isinstance(attention, AugmentedConfig):
            self.mixing = make_attention(attention, Flash.head_sizes(config), rngs)
            return
        if attention.convolution:
            taps = attention.convolution
            self.filter = parameter(uniform(rngs.params(), (taps, 1), taps), (None, None), roles=("new", "attention"))
        if attention.widens:
            (projection,) = FEATURE_MAPS[attention.feature_map].arrays
            start = projection.draw(rngs.params(), D, attention.feature_size)
            self.projection = constant(start, (None, "query_key"))

    def __call__(self, x_BTC: Float[Array, "B T C"], rows: Rows, *shared: Any) -> Float[Array, "B T C"]:
        """Apply the layer to whole rows."""
        u_BTC = self.norm(x_BTC)
        if self.config.token_shift:
            u_BTC = token_shift(u_BTC, rows.position_BT, rows.partition.for_ops())
        v_BTE, gate_BTE, heads_BT2D = self._project(u_BTC, rows.position_BT, rows.partition)
        attend = self._augmented if isinstance(self.config.attention, AugmentedConfig) else self._attend
        return x_BTC + self.output(gate_BTE * attend(heads_BT2D, v_BTE[:, :, None], rows)[:, :, 0])

    def _project(self, u_BTC: Array, position_BT: Array, partition: Partition = WHOLE) -> tuple[Array, Array, Array]:
        """Values, gate, and rotated queries and keys."""
        v_BTE, gate_BTE = (jax.nn.silu(x) for x in self.hidden.parts(u_BTC, 2, partition))
        z_BTD = jax.nn.silu(self.query_key(u_BTC))
        heads_BT2D = z_BTD[:, :, None] * self.gamma[...].astype(z_BTD.dtype)[None, None]
        heads_BT2D += self.beta[...].astype(z_BTD.dtype)[None, None]
        return v_BTE, gate_BTE, rotate(heads_BT2D, position_BT, self.config.rotary_size)

    def _augmented(self, heads_BT4D: Array, v_BT1E: Array, rows: Rows) -> Array:
        operands = self._operands(heads_BT4D, v_BT1E)
        if not self.config.attention.causal:
            assert operands.grouped_q is not None
            grouped_q = operands.grouped_q * _per_token_count(rows).astype(v_BT1E.dtype)[..., None, None]
            operands = operands._replace(grouped_q=grouped_q)
        if rows.value_mask_BT is not None:
            operands = operands._replace(v=_masked(v_BT1E, rows), convolved_v=v_BT1E)
        return self._mixture().attend(operands, rows)

    def _operands(self, heads_BT4D: Array, v_BT1E: Array) -> Operands:
        """Queries and keys of the local and the grouped branch, random maps applied."""
        q, grouped_q, k, grouped_k = jnp.split(heads_BT4D, 4, axis=2)
        attention = self._settings
        if attention.widens:
            phi = FEATURE_MAPS[attention.feature_map].apply
            grouped_q, grouped_k = (phi(x, self.projection[...]) for x in (grouped_q, grouped_k))
        return Operands(q, k, v_BT1E, grouped_q, grouped_k)

    @property
    def _settings(self) -> AugmentedConfig:
        """Of augmented attention, where it is that."""
        return cast(AugmentedConfig, self.config.attention)

    def _mixture(self) -> Mixture:
        attention, G = self._settings, self._settings.group_size
        return Mixture(
            attention,
            score_scale=1 / G,
            alpha=1 / G if attention.causal else 1.0,
            conv_WH=self.filter[...] if attention.convolution else None,
            bias_XH=self._bias(G * attention.local_groups) if attention.local != "none" else None,
        )

    def _attend(self, heads_BT2D: Array, v_BT1E: Array, rows: Rows) -> Array:
        """Attention of any other kind, with FLASH's scale and bias."""
        config, T = self.config, v_BT1E.shape[1]
        released = config.score_scale == "released"
        scale = 1 / T if released else config.query_key_size**-0.5
        # The released quadratic form divides scores and bias by the row length once more.
        again = 1 / T if released and config.attention.kind == "quadratic" else 1.0
        if rows.value_mask_BT is not None:
            v_BT1E = _masked(v_BT1E, rows)
        scoring = Scoring(scale * again, self._bias(T) * again)
        return self.mixing(heads_BT2D[:, :, :1], heads_BT2D[:, :, 1:], v_BT1E, rows, scoring=scoring)

    def _bias(self, slots: int) -> Float[Array, "X 1"]:
        """sqrt(D) times the entry of each distance's bucket."""
        config, causal = self.config, self.config.attention.causal
        distance = np.arange(0 if causal else 1 - slots, slots)
        bucket = bias_buckets(distance, config.bias_buckets, config.bias_max_distance, causal)
        return self.bias[...][bucket].astype(jnp.float32) * config.query_key_size**0.5

    def empty_state(self, batch: int, capacity: int) -> GatedState:
        """Return the state before the first token; `capacity` does not matter."""
        config, attention = self.config, self._settings
        keys, values, grouped_keys = (
            jnp.zeros((batch, 0, 1, size), config.dtype)
            for size in (
                config.query_key_size,
                config.value_size,
                attention.features(config.query_key_size),
            )
        )
        state = Mixture(attention).empty_state(keys, values, grouped_keys)
        return GatedState(state, jnp.zeros((batch, config.width // 2), config.dtype))

    def extend(
        self, x_BTC: Float[Array, "B T C"], state: GatedState, count_B: Int[Array, " B"], *shared: Array
    ) -> tuple[Float[Array, "B T C"], GatedState]:
        """Apply the layer to tokens that follow a state."""
        (position_BT,), tree = shared, chain(x_BTC.shape[1])
        operands, gate_BTE, half_BTC = self._behind(x_BTC, position_BT, state, tree)
        attended_BT1E, after = self._mixture().extend(operands, state.attention, count_B)
        y_BTC = x_BTC + self.output(gate_BTE * attended_BT1E[:, :, 0])
        return y_BTC, GatedState(after, _last(half_BTC, count_B, state.previous_BC))

    def verify(
        self, x_BMC: Float[Array, "B M C"], state: GatedState, tree: Tree, *shared: Array
    ) -> tuple[Float[Array, "B M C"], GatedPending]:
        """Apply the layer to the nodes of a tree that follows a state."""
        (position_BM,) = shared
        operands, gate_BME, half_BMC = self._behind(x_BMC, position_BM, state, tree)
        attended_BM1E, tokens = self._mixture().verify(operands, state.attention, tree)
        return x_BMC + self.output(gate_BME * attended_BM1E[:, :, 0]), GatedPending(tokens, half_BMC)

    def commit(
        self, state: GatedState, pending: GatedPending, path_BM: Int[Array, "B M"], count_B: Int[Array, " B"]
    ) -> GatedState:
        """Return the state after the first `count_B` nodes of each row's path."""
        after = Mixture(self._settings).commit(state.attention, pending.tokens, path_BM, count_B)
        half_BMC = jnp.take_along_axis(pending.half_BMC, path_BM[:, :, None], axis=1)
        return GatedState(after, _last(half_BMC, count_B, state.previous_BC))

    def _behind(self, x_BTC: Array, position_BT: Array, state: GatedState, tree: Tree) -> tuple[Operands, Array, Array]:
        """Operands and gate of tokens that follow a state, and the half of their channels that the shift delays."""
        u_BTC, half_BTC = self._shift(self.norm(x_BTC), state.previous_BC, tree)
        v_BTE, gate_BTE, heads_BT4D = self._project(u_BTC, position_BT)
        return self._operands(heads_BT4D, v_BTE[:, :, None]), gate_BTE, half_BTC

    def _shift(self, u_BTC: Array, previous_BC: Array, tree: Tree) -> tuple[Array, Array]:
        """The token shift, where the token before a node is its parent; and the half of the channels it delays."""
        half = u_BTC.shape[-1] // 2
        if not self.config.token_shift:
            return u_BTC, u_BTC[..., :half]
        before = jnp.concatenate([previous_BC[:, None], u_BTC[..., :half]], axis=1)
        delayed = before[:, np.asarray(tree.parents) + 1]
        return jnp.concatenate([delayed, u_BTC[..., half:]], axis=-1), u_BTC[..., :half]


def _last(x_BTC: Array, count_B: Array, otherwise_BC: Array) -> Array:
    """Of each row the entry of its last token, or `otherwise` where it has none."""
    last_B1C = jnp.take_along_axis(x_BTC, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    return jnp.where(count_B[:, None] > 0, last_B1C[:, 0], otherwise_BC)


def _masked(v_BT1E: Array, rows: Rows) -> Array:
    """The values that attention may see, others as 0."""
    assert rows.value_mask_BT is not None
    return v_BT1E * rows.value_mask_BT.astype(v_BT1E.dtype)[:, :, None, None]


def _per_token_count(rows: Rows) -> Float[Array, "B T"]:
    """1 / tokens in the sequence of each token; bidirectional grouped attention is a mean over it."""
    if rows.segment_ids_BT is None:
        return jnp.full(rows.position_BT.shape, 1 / rows.position_BT.shape[1], jnp.float32)
    return 1 / tokens_in_sequence(rows.position_BT).astype(jnp.float32)


class Flash(Decoder):
    """Token embedding with scaled sinusoids, gated attention units, layer norm, untied head with bias."""

    settings = FlashConfig
    cut_sizes: ClassVar[dict[str, tuple[str, ...]]] = {"hidden": ("value_size",)}
    plain_scores = False

    def __init__(self, config: FlashConfig, *, rngs: nnx.Rngs):
        V, C = config.vocabulary_size, config.width
        self.config = config
        embedding = jax.random.normal(rngs.params(), (V, C))
        self.embedding = parameter(embedding, ("vocabulary", "width"), decay=True, roles=("embedding",))
        self.position_scale = parameter(jnp.ones(()), ())
        self.layers = stack_layers(lambda rngs: GatedAttention(config, rngs=rngs), config.depth, rngs)
        self.norm = LayerNorm(C)
        self.logits = Linear(C, V, ("width", "vocabulary"), roles=("head",), rngs=rngs)

    def begin(
        self, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"] | None, partition: Partition = WHOLE
    ) -> tuple[Any, ...]:
        """Return the embedded tokens of whole rows, and their `Rows`."""
        B, T = tokens_BT.shape
        released = self.config.padding == "released"
        rows = place(segment_ids_BT, (B, T), partition, released_padding=released, values="hidden")
        return self.embed(tokens_BT, rows.position_BT, partition)[0].astype(self.config.dtype), rows

    def embed(
        self, tokens_BT: Int[Array, "B T"], position_BT: Int[Array, "B T"], partition: Partition = WHOLE
    ) -> tuple[Array, tuple[Any, ...]]:
        """Return the embedded tokens with their positions, and the positions for all layers."""
        position_BTC = self.position_scale[...] * sinusoids(position_BT, self.config.width)
        return look_up(self.embedding[...], tokens_BT, partition) + position_BTC, (position_BT,)

    def check_decodable(self, capacity: int) -> None:
        """Raise `ConfigError` unless sequences can be decoded exactly, however long."""
        config, attention = self.config, self.config.attention
        require(attention.causal, NOT_CAUSAL)
        require(
            isinstance(attention, AugmentedConfig),
            f"attention.kind={attention.kind} of FLASH reads whole rows and cannot be decoded; train kind=augmented",
        )
        require(config.padding == "exact", "padding=released mixes padding into a row and cannot be decoded: use exact")

    def head(self, x_BTC: Float[Array, "*batch C"]) -> Float[Array, "*batch V"]:
        """Return the logits of `features`, float32."""
        return self.logits(x_BTC).astype(jnp.float32)

    @classmethod
    def head_sizes(cls, config: FlashConfig) -> HeadSizes:
        """Return the sizes of the one head."""
        return HeadSizes(1, 1, config.query_key_size, config.value_size)

    @classmethod
    def matrices(cls, config: FlashConfig) -> list[Matrix]:
        """Return the matrices of all layers, in the order in which they are used."""
        C, E, D, L = config.width, config.value_size, config.query_key_size, config.depth
        shapes = {"hidden": (C, 2 * E), "query_key": (C, D), "output": (E, C)}
        return [Matrix(("layers", name, "kernel"), *shape, L) for name, shape in shapes.items()]

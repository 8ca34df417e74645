"""Hugging Face's LLaMA, the official linearized LLaMA, and our Llama."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lin_jax.attentions.augmented import AugmentedConfig
from lin_jax.convert.conversion import Conversion, attention_entries
from lin_jax.convert.hugging_face_config import attention_from, attention_to, compute_type, names_ending
from lin_jax.convert.names import Entry, transposed
from lin_jax.layers.rope import RopeConfig
from lin_jax.models.llama import LlamaConfig
from lin_jax.settings.foreign import Fields

# The names of what may be tied, whether it is where config.json does not say, and matrices kept as [inputs, outputs].
EMBEDDING, HEAD, IS_TIED = "model.embed_tokens.weight", "lm_head.weight", False
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_FEED_FORWARD = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def name_table(config: LlamaConfig) -> list[Entry]:
    """One entry a parameter."""
    layer = "model.layers.{layer}."
    table = [
        Entry(EMBEDDING, "embedding"),
        Entry("model.norm.weight", "norm.weight"),
        Entry(layer + "input_layernorm.weight", "layers.attention_norm.weight"),
        Entry(layer + "post_attention_layernorm.weight", "layers.feed_forward_norm.weight"),
        *attention_table(config, layer + "self_attn.", "layers.attention."),
    ]
    for theirs, ours in _FEED_FORWARD.items():
        name = f"{layer}mlp.{theirs}"
        table.append(transposed(f"{name}.weight", f"layers.feed_forward.{ours}.kernel"))
        if config.feed_forward_bias:
            table.append(Entry(f"{name}.bias", f"layers.feed_forward.{ours}.bias"))
    if not config.tie_embeddings:
        table.append(transposed(HEAD, "logits.kernel"))
    return table


def ignored(config: LlamaConfig) -> tuple[str, ...]:
    """Ends of names that hold no parameters: frequencies, the mask of the official filters."""
    return ("rotary_emb.inv_freq", "self_attn.conv_mask")


def attention_table(config: LlamaConfig, theirs: str, ours: str) -> list[Entry]:
    """The entries of one attention, whose names begin with `theirs` and `ours`."""
    table = []
    for name, path in _PROJECTIONS.items():
        table.append(transposed(f"{theirs}{name}.weight", f"{ours}{path}.kernel"))
        if config.attention_bias:
            table.append(Entry(f"{theirs}{name}.bias", f"{ours}{path}.bias"))
    return table + attention_entries(config, "llama", theirs, ours + "mixing.")


def config_from_hugging_face(fields: Fields, shapes: Mapping[str, tuple[int, ...]]) -> LlamaConfig:
    """Our config of a config.json and the shapes of its tensors.

    Raises:
        ConfigError: something is missing, of another type, or is not supported.
    """
    heads, width = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    activation = fields.get("hidden_act", str, "silu")
    fields.require(activation == "silu", f"hidden_act={activation} is not supported; LLaMA's is silu")
    return LlamaConfig(
        vocabulary_size=fields.get("vocab_size", int),
        width=width,
        depth=fields.get("num_hidden_layers", int),
        heads=heads,
        key_value_heads=fields.get("num_key_value_heads", int, heads),
        head_size=fields.get("head_dim", int, width // max(heads, 1)),
        feed_forward_size=fields.get("intermediate_size", int),
        positions=fields.get("max_position_embeddings", int, 2048),
        norm_epsilon=fields.get("rms_norm_eps", float, 1e-6),
        rope=_rope(fields),
        attention_bias=fields.get("attention_bias", bool, False),
        feed_forward_bias=fields.get("mlp_bias", bool, False),
        tie_embeddings=fields.get("tie_word_embeddings", bool, IS_TIED),
        attention=attention_from(fields, _official_attention(shapes)),
        dtype=compute_type(fields),
    )


def _official_attention(shapes: Mapping[str, tuple[int, ...]]) -> AugmentedConfig | None:
    """What the names of an official linearized checkpoint tell: the paper's group, and which parameters there are.

    Without `global_factor` the grouped branch has the weight 1, as in the official benchmark code.
    """
    filters = [shape for name, shape in shapes.items() if name.endswith("self_attn.dwconv.weight")]
    kernels = [shape[2] for shape in filters if len(shape) == 4]
    factors = {kind: names_ending(shapes, f"self_attn.{kind}_factor") for kind in ("global", "local")}
    if not kernels and not any(factors.values()):
        return None
    return AugmentedConfig(
        group_size=64,
        convolution=kernels[0] // 2 + 1 if kernels else 0,
        grouped_weight="learned" if factors["global"] else "one",
        local_weight="learned" if factors["local"] else "one",
    )


def _rope(fields: Fields) -> RopeConfig:
    """The rotary positions of a config.json, old or new: rope_theta and rope_scaling, or rope_parameters."""
    scaling = fields.section("rope_parameters" if fields.section("rope_parameters") else "rope_scaling")
    kind: Any = scaling.get("rope_type", Any, scaling.get("type", Any, "default"))
    known = ("default", "linear", "dynamic", "llama3")
    fields.require(kind in known, f"rope scaling {kind!r} is not supported; there are {', '.join(known)}")
    theta = scaling.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    llama3: dict[str, Any] = {}
    if kind == "llama3":
        llama3 = {
            "low_frequency_factor": scaling.get("low_freq_factor", float),
            "high_frequency_factor": scaling.get("high_freq_factor", float),
            "original_positions": scaling.get("original_max_position_embeddings", int),
        }
    return RopeConfig(theta=theta, scaling=kind, factor=scaling.get("factor", float), **llama3)


def config_to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
    """The contents of a config.json."""
    rope, scaling = config.rope, None
    if rope.scaling != "default":
        scaling = {"rope_type": rope.scaling, "type": rope.scaling, "factor": rope.factor}
    if scaling is not None and rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.low_frequency_factor
        scaling["high_freq_factor"] = rope.high_frequency_factor
        scaling["original_max_position_embeddings"] = rope.original_positions
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward_size,
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.feed_forward_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **attention_to(config.attention),
    }


def extra_tensors(config: LlamaConfig) -> dict[str, np.ndarray]:
    """The masks that the official linearized code keeps beside its filters."""
    taps = config.attention.convolution if isinstance(config.attention, AugmentedConfig) else 0
    if not taps:
        return {}
    mask = (np.arange(2 * taps - 1) < taps).astype(np.float32).reshape(1, 1, -1, 1)
    return {f"model.layers.{layer}.self_attn.conv_mask": mask for layer in range(config.depth)}


CONVERSION = Conversion(
    model_type="llama",
    name_table=name_table,
    ignored=ignored,
    config_from=config_from_hugging_face,
    config_to=config_to_hugging_face,
    extra_tensors=extra_tensors,
    embedding=EMBEDDING,
    head=HEAD,
    is_tied=IS_TIED,
    replaced=("rope_parameters",),
)

"""Settings of an attention layer."""

import dataclasses
from typing import Any, Literal

from lin_jax.settings.base import require, require_at_least_zero, require_positive, setting

Kind = Literal["augmented", "quadratic", "softmax", "longlora"]


Local = Literal["relu2", "laplace", "softmax", "none"]


Implementation = Literal["xla", "reference", "pallas_tpu", "pallas_gpu"]


FeatureMap = Literal["identity", "unit", "relu", "elu1", "favor", "fourier"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention layer. The paper's ablations are points of this one config, see `ABLATIONS`."""

    kind: Kind = setting(
        "augmented",
        "augmented: local groups + grouped linear + convolution; quadratic: the local activation over the whole "
        "row (FLASH only); softmax: softmax attention over the whole row; longlora: softmax attention inside groups, "
        "which half of the heads see shifted by half a group (not FLASH)",
    )
    local: Local = setting("relu2", "activation of the scores inside the local window; none turns the branch off")
    grouped: bool = setting(True, "linear attention to the groups before the local window")
    feature_map: FeatureMap = setting("identity", "what the grouped branch does to its queries and keys")
    feature_size: int = setting(256, "width of the random feature maps favor and fourier; even for fourier")
    convolution: int = setting(32, "taps W of the causal depthwise convolution of the values; 0 turns it off")
    castling: bool = setting(False, "Castling-ViT's normalised sum of values and attention, instead of plain attention")
    causal: bool = setting(True, "whether a token sees only itself and earlier ones")
    group_size: int = setting(256, "tokens G in a group")
    local_groups: int = setting(1, "groups R in the local window; 1 is the paper's")
    implementation: Implementation | None = setting(None, "which form computes it; None chooses by device and shape")
    softmax_layers: tuple[int, ...] = setting((), "layers, counted from 0, that keep softmax attention (not FLASH)")
    grouped_weight: Literal["learned", "one"] = setting(
        "learned",
        "weight of the grouped branch outside FLASH: learned is one number a layer that starts at 0; one is the "
        "official benchmark's",
    )
    local_weight: Literal["one", "learned"] = setting(
        "one", "weight of the local branch outside FLASH; learned is one number a layer that starts at 1"
    )
    normalise_grouped: bool = setting(
        False, "divide each head's grouped output by its norm, as the official NORM_GLOBAL does (not FLASH)"
    )
    longlora_split: int = setting(4, "kind=longlora: groups in a row")
    longlora_shift: Literal["causal", "released"] = setting(
        "causal",
        "kind=longlora: causal: the first half group of shifted heads sees only itself; released: the official code, "
        "in which it wraps around to the end of the row and sees the future",
    )

    def __post_init__(self):
        require_positive(self, "group_size", "local_groups", "feature_size", "longlora_split")
        repeated = len(set(self.softmax_layers)) < len(self.softmax_layers)
        require(
            not repeated and all(layer >= 0 for layer in self.softmax_layers),
            f"softmax_layers must be different layers from 0 on, but is {self.softmax_layers}",
        )
        require_at_least_zero(self, "convolution")
        if self.kind == "augmented":
            on = self.local != "none" or self.grouped or self.convolution > 0
            require(on, "attention has nothing to compute: turn on local, grouped or convolution")
        require(
            self.feature_map != "fourier" or self.feature_size % 2 == 0,
            f"feature_size must be even for feature_map=fourier (cosines and sines), but is {self.feature_size}",
        )
        if self.kind == "quadratic":
            require(
                self.local in ("relu2", "laplace"),
                f"kind=quadratic needs local=relu2 or local=laplace, but local is {self.local}",
            )


# The rows of the paper's ablation tables, as changes to an AttentionConfig.
ABLATIONS: dict[str, dict[str, Any]] = {
    "local": {"kind": "augmented", "grouped": False, "convolution": 0},
    "grouped": {"kind": "augmented", "local": "none", "convolution": 0},
    "local_grouped": {"kind": "augmented", "convolution": 0},
    "local_convolution": {"kind": "augmented", "grouped": False},
    "augmented": {"kind": "augmented"},
    "softmax": {"kind": "softmax", "convolution": 0},
    "longlora": {"kind": "longlora", "convolution": 0},
    "quadratic": {"kind": "quadratic", "convolution": 0},
}


def ablate(attention: AttentionConfig, name: str) -> AttentionConfig:
    """The attention config of one row of the paper's ablation tables.

    Raises:
        ConfigError: the name is not one of `ABLATIONS`.
    """
    require(name in ABLATIONS, f"unknown ablation {name!r}; there are {', '.join(ABLATIONS)}")
    return dataclasses.replace(attention, **ABLATIONS[name])


def refuse_transformer_attention(attention: AttentionConfig) -> None:
    """Raise `ConfigError` for what FLASH's attention does not have."""
    plain = AttentionConfig()
    for name in ("softmax_layers", "grouped_weight", "local_weight", "normalise_grouped"):
        value = getattr(attention, name)
        require(value == getattr(plain, name), f"attention.{name}={value} is not for FLASH, which has no such choice")
    require(attention.kind != "longlora", "attention.kind=longlora is not for FLASH")


def check_transformer_attention(attention: AttentionConfig, depth: int) -> None:
    """Raise `ConfigError` for what the attention of LLaMA and GPT-2 does not have."""
    require(
        attention.kind != "quadratic",
        "attention.kind=quadratic is FLASH's; use augmented, softmax or longlora",
    )
    require(attention.causal, "attention.causal=false is not for models that predict the next token")
    require(
        attention.feature_map not in ("favor", "fourier"),
        f"attention.feature_map={attention.feature_map} is FLASH's; use identity, unit, relu or elu1",
    )
    require(
        all(layer < depth for layer in attention.softmax_layers),
        f"attention.softmax_layers={attention.softmax_layers} names a layer that depth={depth} does not have",
    )


def paper_attention() -> AttentionConfig:
    """The paper's attention of LLaMA and GPT-2."""
    return AttentionConfig(group_size=64)

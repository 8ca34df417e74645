"""What the flags of the official code mean in settings of ours (the golden directory's MATH.md and QUIRKS.md).

A flag that ours has no settings for raises `UnsupportedFlag`, by which the test of a case that has it fails.
"""

from collections.abc import Mapping
from typing import Any

from lin_jax.attentions.augmented import AugmentedConfig
from lin_jax.attentions.base import AttentionConfig
from lin_jax.attentions.longlora import LongloraConfig
from lin_jax.attentions.registry import preset_attention
from lin_jax.attentions.released_t5 import ReleasedT5Config
from lin_jax.attentions.softmax import SoftmaxConfig

Flags = Mapping[str, Any]

# Parameters that flags make, by the ends of their names; a branch that is off leaves its own unread.
OWN = ("global_factor", "local_factor", "dwconv.weight", "attn.alpha", "Attention.alpha", "dconv_ada.weight")


class UnsupportedFlag(Exception):
    """A flag of the official code that ours has no settings for."""


def refuse(flags: Flags, *names: str) -> None:
    """Raise `UnsupportedFlag` for the first of `names` that is on."""
    for name in names:
        if flags.get(name):
            raise UnsupportedFlag(f"{name}={flags[name]} has no settings here")


def taps(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Causal taps of the centred filters of a checkpoint; 0 where it has none."""
    kernels = {shape[2] for name, shape in shapes.items() if name.endswith(("dwconv.weight", "dconv_ada.weight"))}
    assert len(kernels) <= 1, f"filters of several sizes: {kernels}"
    return kernels.pop() // 2 + 1 if kernels else 0


def benchmark_attention(config: Mapping[str, Any]) -> AttentionConfig:
    """The benchmark path: all branches with weight 1."""
    return AugmentedConfig(
        group_size=config["group_size"], convolution=config["res_kernel_size"] // 2 + 1, grouped_weight="one"
    )


def llama_attention(flags: Flags, shapes: Mapping[str, tuple[int, ...]], tokens: int) -> AttentionConfig:
    """The training path, or LongLoRA's where USE_LINEAR is off.

    USE_LOCAL and NORM_LOCAL are never read, ZERO_CONV only at the start; what concerns the grouped branch, the weight
    of the local one included, is read only where that branch is on.
    """
    refuse(flags, "USE_YOSO", "NORM_TOGETHER")
    if not flags["USE_LINEAR"]:
        refuse(flags, "NOSHIFT", "ADD_CONV")
        return LongloraConfig(split=tokens // int(tokens / flags["split"]), shift="released")
    grouped = bool(flags.get("USE_GLOBAL"))
    convolves = flags.get("ADD_CONV") or flags.get("USE_CASTLING")
    return AugmentedConfig(
        group_size=flags["GROUP_SIZE"],
        grouped=grouped,
        convolution=taps(shapes) if convolves else 0,
        castling=bool(flags.get("USE_CASTLING")),
        grouped_weight="learned" if grouped and flags.get("GLOBAL_FACTOR") else "one",
        local_weight="learned" if grouped and flags.get("LOCAL_FACTOR") else "one",
        normalise_grouped=bool(grouped and flags.get("NORM_GLOBAL")),
    )


def added_filters(flags: Flags) -> int:
    """How often the training path adds its convolution: once for each flag that has one."""
    return sum(bool(flags.get(name)) for name in ("ADD_CONV", "USE_CASTLING")) if flags.get("USE_LINEAR") else 0


def medusa_attention(flags: Flags, shapes: Mapping[str, tuple[int, ...]]) -> AttentionConfig:
    """The backbone of the Medusa experiments: the training path with fewer flags, or softmax attention."""
    if not flags["USE_LINEAR"]:
        return SoftmaxConfig()
    known = ("USE_LINEAR", "USE_GLOBAL", "GLOBAL_FACTOR", "ADD_CONV", "GROUP_SIZE")
    return llama_attention({name: flags.get(name, 0) for name in known}, shapes, 0)


def gpt2_attention(flags: Flags, shapes: Mapping[str, tuple[int, ...]]) -> AttentionConfig:
    """The first of LOCAL_ATTN, AUG, BOTH_ATTN and GLOBAL_ATTN that is on, else softmax.

    These read neither CONV, FLASH_GLOBAL, FLASH_LOCAL nor GLOBAL_RELU; NO_FLASH_INF only decides which lengths crash.
    """
    refuse(flags, "FFNCONV", "LINEAR_HEADS")
    presets = {"LOCAL_ATTN": "local", "AUG": "augmented", "BOTH_ATTN": "local_grouped", "GLOBAL_ATTN": "grouped"}
    name = next((preset for flag, preset in presets.items() if flags.get(flag)), "softmax")
    weight = "learned" if name == "augmented" else "one"
    filters = taps(shapes) if name == "augmented" else 0
    base = AugmentedConfig(group_size=flags["GROUP_SIZE"], convolution=filters, grouped_weight=weight)
    return preset_attention(base, name)


def t5_attentions(flags: Flags) -> dict[str, AttentionConfig]:
    """The attentions of the released T5: those of ENCODER, DECODER and CROSS that are on, and softmax.

    The first of LOCAL_ATTN, GLOBAL_ATTN, BOTH_ATTN and AUG that is on decides; ALPHA_BOTH makes the weight of BOTH_ATTN
    learned. A KERNEL_SIZE of 2 W - 1 is W taps here, of which cross attention has none.
    """
    refuse(flags, "LINEAR", "CONV")
    branches: dict[str, Any] = {"LOCAL_ATTN": "local", "GLOBAL_ATTN": "grouped", "BOTH_ATTN": "both", "AUG": "both"}
    name = next((flag for flag in branches if flags.get(flag)), None)
    places = {"encoder_attention": "ENCODER", "attention": "DECODER", "cross_attention": "CROSS"}
    found: dict[str, AttentionConfig] = {}
    for field, switch in places.items():
        causal = field == "attention"
        if not flags.get(switch):
            found[field] = SoftmaxConfig(causal=causal)
            continue
        assert name is not None, f"{switch} without a variant crashes in the official code"
        filters = flags["KERNEL_SIZE"] // 2 + 1 if name == "AUG" and field != "cross_attention" else 0
        found[field] = ReleasedT5Config(
            branches=branches[name],
            weighted=bool(name == "AUG" or flags.get("ALPHA_BOTH")),
            convolution=filters,
            group_size=flags["GROUP_SIZE"],
            causal=causal,
        )
    return found

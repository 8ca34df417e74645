"""The configuration of an experiment: frozen dataclasses, every field documented once, here.

A file in `configs/` has a `get_config()` that returns a `Config`; the programs change single fields of it from the
command line (`--config.optimizer.peak_learning_rate=1e-4`, see `lin_jax.overrides`). Every dataclass checks its own
fields when it is made, so that a wrong value is refused before anything is read, written or compiled.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting or an input that the user has to change; its message is one line that names it and says how."""


def first_line(error: BaseException) -> str:
    """What an error says in one line, for messages that hold it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with its documentation, which `--help` prints."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def section(default: Callable[[], Any], doc: str) -> Any:
    """A dataclass field that is itself a group of settings."""
    return dataclasses.field(default_factory=default, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name} must be greater than 0, but is {value}")


def _require_at_least_zero(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name} must be 0 or more, but is {value}")


# Documentation of settings that every model has.
_DTYPE_DOC = "type of activations; parameters have their own: float32 in training, or as they were converted"
_REMAT_DOC = "what the backward pass recomputes: nothing, whole layers (least memory), or all but matrix products"

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
        _require_positive(self, "group_size", "local_groups", "feature_size", "longlora_split")
        repeated = len(set(self.softmax_layers)) < len(self.softmax_layers)
        require(
            not repeated and all(layer >= 0 for layer in self.softmax_layers),
            f"softmax_layers must be different layers from 0 on, but is {self.softmax_layers}",
        )
        _require_at_least_zero(self, "convolution")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashConfig:
    """A FLASH language model: gated attention units, no separate feed-forward layers."""

    architecture: Literal["flash"] = setting("flash", "which model these settings are of")
    vocabulary_size: int = setting(50257, "tokens V that the model knows")
    width: int = setting(768, "model width C")
    depth: int = setting(24, "layers L")
    query_key_size: int = setting(128, "query/key size D, shared by all layers' single head")
    expansion: float = setting(2.0, "value size E as a multiple of the width")
    norm: Literal["scalenorm", "layernorm"] = setting("scalenorm", "normalisation before each layer")
    token_shift: bool = setting(True, "delay half of the channels by one token before each layer")
    rotary_size: int = setting(32, "channels of queries and keys that are rotated by position")
    bias_buckets: int = setting(32, "buckets of the T5 relative position bias")
    bias_max_distance: int = setting(128, "distance from which on all positions share the last bucket")
    attention: AttentionConfig = section(AttentionConfig, "the attention of every layer")
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
    dtype: Literal["float32", "bfloat16"] = setting("float32", _DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", _REMAT_DOC)

    def __post_init__(self):
        _require_positive(self, "vocabulary_size", "width", "depth", "query_key_size", "expansion", "bias_max_distance")
        _require_at_least_zero(self, "rotary_size")
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


def _refuse_transformer_attention(attention: AttentionConfig) -> None:
    """Raise `ConfigError` for what FLASH's attention does not have."""
    plain = AttentionConfig()
    for name in ("softmax_layers", "grouped_weight", "local_weight", "normalise_grouped"):
        value = getattr(attention, name)
        require(value == getattr(plain, name), f"attention.{name}={value} is not for FLASH, which has no such choice")
    require(attention.kind != "longlora", "attention.kind=longlora is not for FLASH")


def _check_transformer_attention(attention: AttentionConfig, depth: int) -> None:
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


def _paper_attention() -> AttentionConfig:
    """The paper's attention of LLaMA and GPT-2."""
    return AttentionConfig(group_size=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions and their scaling, with the meaning that Hugging Face gives to each."""

    theta: float = setting(10000.0, "base of the wavelengths")
    scaling: Literal["default", "linear", "dynamic", "llama3"] = setting(
        "default",
        "how positions beyond those of pretraining are reached: default: not; linear: positions are divided by "
        "factor; dynamic: theta grows with a sequence longer than `positions`; llama3: long wavelengths are divided",
    )
    factor: float = setting(1.0, "how much longer; all but default")
    low_frequency_factor: float = setting(1.0, "scaling=llama3: wavelengths above original_positions / this are scaled")
    high_frequency_factor: float = setting(4.0, "scaling=llama3: wavelengths below original_positions / this are kept")
    original_positions: int = setting(8192, "scaling=llama3: positions of pretraining")

    def __post_init__(self):
        _require_positive(self, "theta", "low_frequency_factor", "original_positions")
        require(self.factor >= 1, f"factor must be 1 or more, but is {self.factor}")
        require(
            self.high_frequency_factor > self.low_frequency_factor,
            f"high_frequency_factor must exceed low_frequency_factor={self.low_frequency_factor}, "
            f"but is {self.high_frequency_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A LLaMA 1, 2 or 3, with its softmax attention or a linearized one; the defaults are LLaMA-2-7B's."""

    architecture: Literal["llama"] = setting("llama", "which model these settings are of")
    vocabulary_size: int = setting(32000, "tokens V that the model knows")
    width: int = setting(4096, "model width C")
    depth: int = setting(32, "layers L")
    heads: int = setting(32, "query heads H")
    key_value_heads: int = setting(32, "key/value heads K, a divisor of heads")
    head_size: int = setting(128, "query/key and value size D of a head")
    feed_forward_size: int = setting(11008, "feed-forward width F")
    positions: int = setting(4096, "tokens in the longest sequence of pretraining; only rope.scaling=dynamic reads it")
    norm_epsilon: float = setting(1e-5, "added to the mean square in norms")
    rope: RopeConfig = section(RopeConfig, "rotary positions")
    attention_bias: bool = setting(False, "biases in the attention's four projections")
    feed_forward_bias: bool = setting(False, "biases in the feed-forward layer's projections")
    tie_embeddings: bool = setting(False, "the head shares the embedding's matrix")
    attention: AttentionConfig = section(_paper_attention, "the attention of every layer")
    dtype: Literal["float32", "bfloat16"] = setting("float32", _DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", _REMAT_DOC)

    def __post_init__(self):
        _require_positive(self, "vocabulary_size", "width", "depth", "heads", "key_value_heads", "head_size")
        _require_positive(self, "feed_forward_size", "positions", "norm_epsilon")
        require(
            self.heads % self.key_value_heads == 0,
            f"heads={self.heads} is not divisible by key_value_heads={self.key_value_heads}",
        )
        require(self.head_size % 2 == 0, f"head_size must be even (rotated pairs), but is {self.head_size}")
        _check_transformer_attention(self.attention, self.depth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """A GPT-2, with its softmax attention or a linearized one; the defaults are those of the 124M model."""

    architecture: Literal["gpt2"] = setting("gpt2", "which model these settings are of")
    vocabulary_size: int = setting(50257, "tokens V that the model knows")
    width: int = setting(768, "model width C, a multiple of heads")
    depth: int = setting(12, "layers L")
    heads: int = setting(12, "heads H")
    feed_forward_size: int = setting(3072, "feed-forward width F")
    positions: int = setting(1024, "learned positions, and so tokens in the longest row")
    norm_epsilon: float = setting(1e-5, "added to the variance in norms")
    labels: int = setting(0, "classes of a sequence-classification head; 0: the model has none")
    attention: AttentionConfig = section(_paper_attention, "the attention of every layer")
    dtype: Literal["float32", "bfloat16"] = setting("float32", _DTYPE_DOC)
    remat: Literal["none", "full", "dots"] = setting("none", _REMAT_DOC)

    def __post_init__(self):
        _require_positive(self, "vocabulary_size", "width", "depth", "heads", "feed_forward_size", "positions")
        _require_positive(self, "norm_epsilon")
        _require_at_least_zero(self, "labels")
        require(self.width % self.heads == 0, f"width={self.width} is not divisible by heads={self.heads}")
        _check_transformer_attention(self.attention, self.depth)

    @property
    def head_size(self) -> int:
        """Query/key and value size D of a head."""
        return self.width // self.heads


TransformerConfig = LlamaConfig | Gpt2Config
ModelConfig = FlashConfig | LlamaConfig | Gpt2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: Literal["tfds", "text", "stdlib"] = setting(
        "stdlib",
        "tfds: a prepared TensorFlow dataset; text: files; stdlib: this Python's own library source, always there",
    )
    path: tuple[str, ...] = setting((), "source=text: files or globs of .txt .jsonl, plain or .gz .zst")
    validation_path: tuple[str, ...] = setting((), "source=text: files held out; empty holds out validation_fraction")
    validation_fraction: float = setting(
        0.05, "part of the documents held out where the source has no validation split"
    )
    tfds_name: str = setting("wiki40b/en", "source=tfds: dataset/config")
    tfds_directory: str | None = setting(None, "source=tfds: where it was prepared; None is ~/tensorflow_datasets")
    train_split: str = setting("train", "source=tfds: split to train on")
    validation_split: str = setting("validation", "source=tfds: split to evaluate on")
    text_field: str = setting("text", "field that holds the text in .jsonl lines and TFDS examples")
    separator: str | None = setting(
        None, "source=text: string between documents of a plain text file; None makes a file one document"
    )
    cache_directory: str = setting(
        "~/.cache/lin_jax", "source=text: where .gz and .zst files are kept uncompressed, and offsets of large files"
    )
    encoding_errors: Literal["replace", "strict"] = setting(
        "strict", "bytes that are not UTF-8: refuse the file, or replace them by U+FFFD"
    )
    tokenizer: str = setting(
        "bytes",
        "bytes; train (a byte-level BPE is learned from the corpus); checkpoint (that of finetune.checkpoint); or a "
        "Hugging Face directory or name",
    )
    tokenizer_vocabulary: int = setting(4096, "tokenizer=train: size of the learned vocabulary")
    sequence_length: int = setting(1024, "tokens T in a row")
    batch_size: int = setting(8, "rows in an update, over all devices and microbatches")
    packing: Literal["concatenate", "segments"] = setting(
        "concatenate",
        "concatenate: rows are cut from one stream of documents, and attention crosses their borders; "
        "segments: documents never see each other",
    )
    seed: int = setting(0, "seed of the order of documents")

    def __post_init__(self):
        _require_positive(self, "sequence_length", "batch_size", "tokenizer_vocabulary")
        require(0 <= self.seed < 2**32, f"data.seed must lie between 0 and 2**32 - 1, but is {self.seed}")
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction must lie between 0 and 1, but is {self.validation_fraction}",
        )
        require(
            self.source != "text" or bool(self.path or self.validation_path),
            "path is empty: give files with --config.data.path=FILE_OR_GLOB",
        )
        require(self.separator != "", "separator must not be the empty string; None makes a file one document")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    peak_learning_rate: float = setting(7e-4, "learning rate after warmup")
    end_learning_rate: float = setting(0.0, "learning rate that linear and cosine schedules reach after the last step")
    alpha_rate: float = setting(
        1.0,
        "learning rate of alpha, the weight of the grouped branch, as a multiple of the others': alpha weighs a sum "
        "over all earlier tokens, so useful values are small",
    )
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "course of the learning rate after warmup")
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    beta1: float = setting(0.9, "decay of the mean of gradients")
    beta2: float = setting(0.999, "decay of the mean of squared gradients")
    epsilon: float = setting(1e-8, "added to the root of the mean of squared gradients")
    weight_decay: float = setting(0.01, "decay of matrices; biases, norms, scales and filters never decay")
    gradient_clip: float = setting(1.0, "largest global norm of the gradient; 0 turns clipping off")
    z_loss: float = setting(0.0, "weight of the squared log of the softmax denominator, added to the loss")

    def __post_init__(self):
        _require_positive(self, "peak_learning_rate", "alpha_rate", "epsilon")
        _require_at_least_zero(self, "end_learning_rate", "warmup_steps", "weight_decay", "gradient_clip", "z_loss")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must lie in [0, 1), but is {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int = setting(1000, "updates of the parameters")
    microbatches: int = setting(1, "parts into which a batch is cut to save memory; their gradients are summed")
    seed: int = setting(0, "seed of the initial parameters")
    loss_chunk: int = setting(1024, "positions whose logits are in memory at a time, for each device")
    log_every: int = setting(10, "steps between lines of metrics")
    evaluate_every: int = setting(250, "steps between evaluations; 0 evaluates only at the end")
    evaluate_batches: int = setting(20, "batches in an evaluation; 0 takes the whole validation split")
    max_skipped: int = setting(50, "steps in a row with a non-finite gradient after which training stops")

    def __post_init__(self):
        _require_positive(self, "steps", "microbatches", "loss_chunk", "log_every", "max_skipped")
        _require_at_least_zero(self, "evaluate_every", "evaluate_batches")
        require(0 <= self.seed < 2**32, f"seed must lie between 0 and 2**32 - 1, but is {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021): a product of two thin matrices added to a frozen one."""

    rank: int = setting(0, "rank of the added matrices; 0: no adapters")
    alpha: float = setting(16.0, "the added matrix is scaled by alpha / rank")
    targets: tuple[str, ...] = setting(
        ("query", "key", "value", "output"),
        "projections that get adapters, by name; GPT-2's are query_key_value, output, up, down",
    )

    def __post_init__(self):
        _require_at_least_zero(self, "rank")
        _require_positive(self, "alpha")
        require(bool(self.targets) or self.rank == 0, "targets is empty: name projections, or set rank to 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """Medusa heads (Cai et al., 2024), which guess the tokens after the next one."""

    heads: int = setting(4, "heads; head i, counted from 1, guesses the token i places after the next one")
    layers: int = setting(1, "residual blocks in a head")
    weight: float = setting(
        0.2, "weight of the heads' loss beside that of the next token, where the model trains with the heads"
    )
    tree_nodes: int = setting(
        64, "nodes, the root included, of the tree that is chosen from the heads' accuracies, WORKDIR/tree.json"
    )

    def __post_init__(self):
        _require_positive(self, "heads", "weight")
        _require_at_least_zero(self, "layers")
        require(self.tree_nodes >= 2, f"tree_nodes must be 2 or more (the root and a guess), but is {self.tree_nodes}")


TrainedGroup = Literal["all", "new", "norm", "embedding", "attention", "feed_forward", "head"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Training that starts from a model, and which of its parameters it changes."""

    checkpoint: str = setting(
        "", "run of lin_jax, also one that convert_weights.py wrote, to start from; empty: random parameters"
    )
    train: tuple[TrainedGroup, ...] = setting(
        ("all",),
        "what trains besides adapters: all, or some of new (what linearized attention adds), norm, embedding, "
        "attention (with its projections), feed_forward, head; the rest is frozen",
    )
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    frozen_dtype: Literal["float32", "bfloat16"] = setting("float32", "type in which frozen parameters are held")
    objective: Literal["language_model", "attention_transfer", "medusa"] = setting(
        "language_model",
        "language_model: predict the next token; attention_transfer: every linearized layer learns to give the output "
        "of the softmax attention that it replaces, which goes on to the next layer (mean squared error); medusa: "
        "Medusa heads learn to guess the tokens after the next one, alone (Medusa-1: train is empty) or with what else "
        "trains (Medusa-2)",
    )
    medusa: MedusaConfig = section(MedusaConfig, "objective=medusa: the heads")

    def __post_init__(self):
        require(
            self.trains_model or self.objective == "medusa",
            "train is empty and there are no adapters: nothing to train",
        )
        require(
            self.objective == "medusa" or self.medusa == MedusaConfig(),
            f"medusa has settings of Medusa heads, but objective={self.objective} trains none: give objective=medusa",
        )
        require(
            self.lora.rank == 0 or "all" not in self.train,
            "train=all leaves nothing for adapters: say what trains besides them, such as new,norm,embedding",
        )
        if self.objective == "attention_transfer":
            require(
                set(self.train) <= {"new", "attention"},
                f"train={','.join(self.train)} does not suit objective=attention_transfer, in which only attention "
                "learns: give new, attention or both",
            )
        if not self.checkpoint:
            plain = self.train == ("all",) and self.lora.rank == 0 and self.objective == "language_model"
            require(plain, "checkpoint is empty, but random parameters must all train: give the run to start from")

    @property
    def trains_model(self) -> bool:
        """Whether anything of the model itself trains, or adapters do."""
        return bool(self.train) or self.lora.rank > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved; it is always saved at the end and on SIGTERM."""

    every: int = setting(500, "steps between checkpoints; 0 saves only at the end")
    keep: int = setting(2, "newest checkpoints that are kept")
    keep_best: bool = setting(True, "also keep the checkpoint with the lowest validation loss")

    def __post_init__(self):
        _require_at_least_zero(self, "every")
        _require_positive(self, "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each parallel axis takes; one of them may be -1, which takes what is left."""

    slice: int = setting(1, "TPU slices, between which only gradients cross the data centre's network")
    data: int = setting(-1, "copies of the model, each with its part of the batch")
    fsdp: int = setting(1, "parts into which parameters, optimizer state and batch are cut")
    tensor: int = setting(1, "parts into which heads, feed-forward layers and vocabulary are cut")
    sequence: int = setting(1, "parts into which rows are cut; augmented attention sends only states between them")
    rules: tuple[str, ...] = setting(
        (),
        "changes of what cuts what: LOGICAL=MESH+MESH, such as width=fsdp+sequence, or vocabulary= for what is not to "
        "be cut; the table is in lin_jax/train/sharding.py",
    )

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("slice", "data", "fsdp", "tensor", "sequence")}
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"{name} must be a number of devices or -1, but is {size}")
        require(list(sizes.values()).count(-1) <= 1, "only one mesh axis may be -1")
        for rule in self.rules:
            require("=" in rule, f"rules must look like width=fsdp+sequence, but one is {rule!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run. On TPU pods, under SLURM and under Open MPI nothing is to be set."""

    coordinator: str | None = setting(
        None, "HOST:PORT at which all processes reach process 0; else $JAX_COORDINATOR_ADDRESS"
    )
    processes: int | None = setting(None, "number of processes, on all hosts together; else $JAX_NUM_PROCESSES")
    process: int | None = setting(None, "which one this is, counted from 0; else $JAX_PROCESS_ID")
    timeout: int = setting(300, "seconds in which all processes must have started")

    def __post_init__(self):
        coordinator, processes, process = self.coordinator, self.processes, self.process
        require(
            coordinator is None or re.fullmatch(r".+:[1-9]\d{0,4}", coordinator) is not None,
            f"coordinator must look like HOST:PORT, but is {coordinator}",
        )
        require(processes is None or processes > 0, f"processes must be greater than 0, but is {processes}")
        require(
            process is None or 0 <= process < (processes or process + 1),
            f"process must lie between 0 and processes - 1, but is {process}"
            + (f" of {processes}" if processes else ""),
        )
        _require_positive(self, "timeout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen from the model's logits; applied in the order of the fields."""

    repetition_penalty: float = setting(
        1.0, "logits of tokens that occurred are divided (positive ones) or multiplied (negative ones) by it"
    )
    temperature: float = setting(0.0, "divisor of the logits; 0 takes the likeliest token")
    top_k: int = setting(0, "keep the likeliest so many tokens; 0 keeps all")
    top_p: float = setting(1.0, "keep the fewest likeliest tokens whose probabilities reach this sum")
    min_p: float = setting(0.0, "keep tokens with at least this part of the likeliest token's probability")
    seed: int = setting(0, "seed; the samples of a prompt depend on it, on their number, and on nothing else")

    def __post_init__(self):
        _require_at_least_zero(self, "temperature", "top_k")
        _require_positive(self, "repetition_penalty")
        require(0 < self.top_p <= 1, f"top_p must lie above 0 and up to 1, but is {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must lie between 0 and 1, but is {self.min_p}")
        require(0 <= self.seed < 2**32, f"seed must lie between 0 and 2**32 - 1, but is {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How texts are continued."""

    max_new_tokens: int = setting(128, "tokens after which a text ends")
    samples: int = setting(1, "continuations of each prompt")
    sampling: SamplingConfig = section(SamplingConfig, "choice of the next token")
    stop: tuple[str, ...] = setting((), "strings before which a text ends")
    stop_tokens: tuple[str, ...] = setting((), "tokens that end a text, besides the tokenizer's own")
    draft: Literal["none", "lookup", "medusa"] = setting(
        "none",
        "what guesses tokens that the model then verifies in one step: none; lookup: what followed the last tokens "
        "where they occurred before; medusa: the model's Medusa heads",
    )
    tree: str = setting(
        "mc_sim_7b_63",
        "draft=medusa: the tree of guesses: a published one (mc_sim_7b_63, vicuna_7b_stage2), or a .json file with a "
        "list of paths, such as the tree.json that a run of heads writes",
    )
    lookup_tokens: int = setting(7, "draft=lookup: tokens that are guessed at a time")
    lookup_match: int = setting(3, "draft=lookup: most tokens that are compared to find where they occurred")
    acceptance: Literal["exact", "typical"] = setting(
        "exact",
        "which guesses are kept: exact: those that are the very tokens of plain decoding, sampled or not; typical: "
        "also others that the model finds likely enough (Medusa's, needs temperature > 0)",
    )
    typical_threshold: float = setting(0.09, "acceptance=typical: probability that always suffices")
    typical_alpha: float = setting(0.3, "acceptance=typical: or this times exp(-entropy)")
    batch_size: int = setting(8, "texts that are continued at a time")
    prefill_chunk: int = setting(512, "tokens of a prompt that are read at a time")
    block: int = setting(16, "steps between looks at what came out, for streaming and stop strings")

    def __post_init__(self):
        _require_positive(self, "max_new_tokens", "samples", "lookup_tokens", "lookup_match")
        _require_positive(self, "batch_size", "prefill_chunk", "block")
        _require_at_least_zero(self, "typical_threshold", "typical_alpha")
        require(all(self.stop), "stop must not hold the empty string")
        require(
            self.acceptance == "exact" or self.sampling.temperature > 0,
            "acceptance=typical compares probabilities, which temperature=0 does not have: give a temperature",
        )


# A chip and how many, or for TPUs their topology; nothing where nothing is planned.
_PLAN = r"((cpu|a100|a100-40g|h100|h200):[1-9]\d*|([1-9]\d*\*)?(v4|v5e|v5p|v6e):[1-9]\d*(x[1-9]\d*){1,2})?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment: everything that `train.py` needs to know."""

    workdir: str = setting(
        "runs/experiment", "directory of checkpoints, metrics, pictures, also gs://BUCKET/DIR; a rerun resumes from it"
    )
    model: ModelConfig = section(FlashConfig, "the model: a FlashConfig, LlamaConfig or Gpt2Config")
    data: DataConfig = section(DataConfig, "the text")
    optimizer: OptimizerConfig = section(OptimizerConfig, "the optimizer")
    train: TrainConfig = section(TrainConfig, "the training loop")
    finetune: FinetuneConfig = section(FinetuneConfig, "a model to start from, and what of it is trained")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")
    mesh: MeshConfig = section(MeshConfig, "devices")
    distributed: DistributedConfig = section(DistributedConfig, "the processes of a run on several hosts")
    profile: bool = setting(False, "write a profiler trace of a few steps to workdir/profile")
    show_sharding: bool = setting(False, "print every parameter with its shards and bytes a device, and stop")
    plan: str = setting(
        "",
        "devices, which need not be there, to compile the training step for without any parameters; prints memory, "
        "exchanges and best possible times, and stops: v4, v5e, v5p, v6e with a topology (v5e:8x8, v5p:4x4x4; two "
        "slices: 2*v5e:8x8), a100, a100-40g, h100, h200 with a number (h100:8), or cpu:8",
    )

    def __post_init__(self):
        require(
            re.fullmatch(_PLAN, self.plan) is not None,
            f"plan must look like cpu:8, h100:8, v5e:8x8, v5p:4x4x4 or 2*v5e:8x8, but is {self.plan}",
        )
        require(
            self.data.packing != "segments" or not isinstance(self.model, FlashConfig) or self.model.padding == "exact",
            "data.packing=segments keeps documents apart, but model.padding=released mixes them: use padding=exact",
        )
        require(
            self.data.batch_size % self.train.microbatches == 0,
            f"data.batch_size={self.data.batch_size} is not divisible by train.microbatches={self.train.microbatches}",
        )
        require(
            self.data.tokenizer != "checkpoint" or bool(self.finetune.checkpoint),
            "data.tokenizer=checkpoint needs finetune.checkpoint",
        )
        if self.finetune.objective == "attention_transfer":
            kind = self.model.attention.kind
            require(
                isinstance(self.model, TransformerConfig) and kind != "softmax",
                f"finetune.objective=attention_transfer is for linearized LLaMA and GPT-2, not for "
                f"{self.model.architecture} with model.attention.kind={kind}",
            )
        require(
            not isinstance(self.model, Gpt2Config) or self.data.sequence_length <= self.model.positions,
            f"data.sequence_length={self.data.sequence_length} is more than the model's "
            f"positions={getattr(self.model, 'positions', None)}",
        )
        require(
            self.optimizer.warmup_steps < self.train.steps or self.optimizer.schedule == "constant",
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be smaller than train.steps={self.train.steps}",
        )

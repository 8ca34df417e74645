"""Small LLaMAs and GPT-2s with any attention, for the tests of both."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from lin_jax.experiment import AugmentedConfig, Gpt2Config, LlamaConfig, LongloraConfig, SoftmaxConfig
from lin_jax.models.registry import create_model

T, LENGTH = 24, 10
SEGMENTS = np.array([0, 0, *[3] * LENGTH, *[1] * LENGTH, 0, 0], np.int32)
SOFTMAX = SoftmaxConfig()
AUGMENTED = AugmentedConfig(group_size=4, convolution=3)
ATTENTION = {
    "softmax": SOFTMAX,
    "augmented": AUGMENTED,
    "softmax_local": dataclasses.replace(AUGMENTED, local="softmax", local_groups=2),
    "hybrid": dataclasses.replace(AUGMENTED, softmax_layers=(1,)),
    "longlora": LongloraConfig(split=3),
}


def make_config(family, attention):
    if family == "gpt2":
        return Gpt2Config(
            vocabulary_size=T, width=16, depth=3, heads=4, feed_forward_size=32, positions=T, attention=attention
        )
    return LlamaConfig(
        vocabulary_size=T,
        width=16,
        depth=3,
        heads=4,
        key_value_heads=2,
        head_size=6,
        feed_forward_size=24,
        attention=attention,
    )


def make_model(config):
    """A model whose parameters are all far from their start, the new ones too."""
    model = create_model(config, nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), state))
    return model

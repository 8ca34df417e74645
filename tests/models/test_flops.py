"""Counted operations against those of the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lin_jax.attentions.registry import with_kind
from lin_jax.experiment import AugmentedConfig, FlashConfig, Gpt2Config, LlamaConfig, SoftmaxConfig
from lin_jax.models.flash import Flash
from lin_jax.models.flops import training_flops_per_token

B, T = 2, 256


def forward_flops(config: FlashConfig) -> float:
    """What XLA counts for one token. One layer and one chunk of groups, as it counts the body of a loop once."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Flash(config, rngs=nnx.Rngs(0))))
    run = jax.jit(lambda state, tokens_BT: nnx.merge(graph, state)(tokens_BT))
    compiled = run.lower(state, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
    return compiled.cost_analysis()["flops"] / (B * T)


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"local_groups": 2, "convolution": 0},
        {"grouped": False},
        {"local": "none", "convolution": 0},
        {"local": "none", "castling": True, "convolution": 4},
        {"feature_map": "favor", "feature_size": 512},
        {"feature_map": "fourier", "feature_size": 512},
        {"causal": False, "local_groups": 2},
        {"kind": "softmax"},
        {"kind": "quadratic"},
    ],
    ids=str,
)
def test_equals_the_compiled_program(attention):
    config = FlashConfig(
        vocabulary_size=512,
        width=256,
        depth=1,
        query_key_size=128,
        attention=with_kind(AugmentedConfig(group_size=64), **{"kind": "augmented", **attention}),
    )
    # The compiled program also has what is counted as nothing: activations, norms, rotations, masks.
    ratio = forward_flops(config) / (training_flops_per_token(config, T) / 3)
    assert 0.99 < ratio < 1.05


def test_layers_add_up():
    one, three = (FlashConfig(depth=depth) for depth in (1, 3))
    head = 3 * 2 * 768 * 50257
    assert training_flops_per_token(three, 1024) - head == 3 * (training_flops_per_token(one, 1024) - head)


def test_operations_are_counted():
    """LLaMA-2-7B: 6 operations a parameter and token but for the embedding, and the scores."""
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    softmax = LlamaConfig(attention=SoftmaxConfig())
    assert training_flops_per_token(softmax, 4096) == 6 * matrices + 3 * 32 * 4 * 4096 * 4096
    augmented = LlamaConfig(attention=AugmentedConfig(group_size=64))
    assert training_flops_per_token(augmented, 4096) == 6 * matrices + 3 * 32 * (4 * 64 * 4096 + 4 * 4096 * 128)
    gpt2 = Gpt2Config(attention=SoftmaxConfig())
    assert training_flops_per_token(gpt2, 1024) == 6 * (12 * 12 * 768**2 + 768 * 50257) + 3 * 12 * 4 * 1024 * 768

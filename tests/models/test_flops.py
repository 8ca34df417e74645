"""Counted operations against those of the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lin_jax.attentions.registry import with_kind
from lin_jax.experiment import (
    AugmentedConfig,
    FlashConfig,
    Gpt2Config,
    LlamaConfig,
    LoraConfig,
    SoftmaxConfig,
    T5Config,
)
from lin_jax.models.flash import Flash
from lin_jax.models.flops import pair_flops, training_flops_per_token
from lin_jax.models.t5 import T5

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


@pytest.mark.parametrize("cross", ["softmax", "augmented"])
@pytest.mark.parametrize("feed_forward", ["relu", "gated_gelu"])
def test_of_a_pair_they_are_those_of_the_compiled_program(cross, feed_forward):
    """One layer in each stack, as XLA counts the body of a loop once, and rows of different lengths."""
    S, T = 256, 64
    linear = AugmentedConfig(group_size=64, causal=False, convolution=0)
    config = T5Config(
        vocabulary_size=512,
        width=256,
        depth=1,
        encoder_depth=1,
        heads=4,
        head_size=64,
        feed_forward_size=512,
        feed_forward=feed_forward,
        attention=SoftmaxConfig(),
        encoder_attention=linear,
        cross_attention=linear if cross == "augmented" else SoftmaxConfig(causal=False),
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0))))
    run = jax.jit(lambda state, source_BS, tokens_BT: nnx.merge(graph, state)(source_BS, tokens_BT))
    rows = (jax.ShapeDtypeStruct((B, length), jnp.int32) for length in (S, T))
    compiled = run.lower(state, *rows).compile().cost_analysis()["flops"] / B
    head = 2 * 256 * 512 * T
    counted = pair_flops(config, S, T, LoraConfig(), lambda path: True).forward + head
    assert 0.99 < compiled / counted < 1.06


def test_the_backward_pass_of_a_pair_is_twice_the_forward_pass():
    pair = pair_flops(T5Config(), 512, 128, LoraConfig(), lambda path: True)
    assert pair.backward == 2 * pair.forward and pair.recomputed == 0
    again = pair_flops(T5Config(remat="full"), 512, 128, LoraConfig(), lambda path: True)
    assert 0.8 * pair.forward < again.recomputed < pair.forward

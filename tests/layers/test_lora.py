"""Adapters against the formula, and in and out of the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.experiment import ConfigError, Gpt2Config, LlamaConfig, LoraConfig
from lin_jax.layers.lora import add_lora, merge_lora, unmerge_lora
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.registry import create_model

LLAMA = LlamaConfig(
    vocabulary_size=50, width=32, depth=3, heads=4, key_value_heads=2, head_size=8, feed_forward_size=48
)
LORA = LoraConfig(rank=2, alpha=6.0)
TOKENS = jnp.arange(40).reshape(2, 20)


def adapted(config=LLAMA, lora=LORA):
    """A model with adapters that do something."""
    model = create_model(config, nnx.Rngs(0))
    add_lora(model, lora, nnx.Rngs(1))
    random = np.random.default_rng(2)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-2:] == ("adapter", "b"):
            variable.set_value(jnp.asarray(0.1 * random.normal(size=variable.get_value().shape), jnp.float32))
    return model


def test_a_new_adapter_changes_nothing():
    model = create_model(LLAMA, nnx.Rngs(0))
    before = model(TOKENS)
    add_lora(model, LORA, nnx.Rngs(1))
    np.testing.assert_array_equal(model(TOKENS), before)
    assert float(jnp.min(jnp.std(model.layers.attention.query.adapter.a[...], axis=(1, 2)))) > 0.05


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (LLAMA, LORA),
        (
            Gpt2Config(vocabulary_size=50, width=32, depth=2, heads=4, feed_forward_size=48, positions=64),
            LoraConfig(rank=3, targets=("query_key_value", "down")),
        ),
    ],
)
def test_the_model_is_that_of_the_formula(config, lora):
    model = adapted(config, lora)
    plain = create_model(config, nnx.Rngs(0))
    found = parameters_by_path(model)
    scale = lora.alpha / lora.rank
    for path, variable in nnx.to_flat_state(nnx.state(plain, nnx.Param)):
        name = ".".join(map(str, path))
        if path[-1] == "kernel" and path[-2] in lora.targets:
            a, b = (np.asarray(found[name.replace("kernel", f"adapter.{part}")], np.float64) for part in "ab")
            variable.set_value(jnp.asarray(np.asarray(found[name], np.float64) + scale * a @ b, jnp.float32))
    assert len(found) == len(parameters_by_path(plain)) + 2 * len(lora.targets)
    np.testing.assert_allclose(model(TOKENS), plain(TOKENS), atol=2e-5)


def test_merging_and_its_inverse():
    model, merged = adapted(), adapted()
    merge_lora(merged)
    assert parameters_by_path(merged).keys() == parameters_by_path(create_model(LLAMA, nnx.Rngs(0))).keys()
    np.testing.assert_allclose(merged(TOKENS), model(TOKENS), atol=1e-5)
    unmerge_lora(merged, model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), parameters_by_path(merged), parameters_by_path(model)
    )


def test_merging_does_not_round_to_a_frozen_type():
    model = adapted()
    kernel = model.layers.attention.query.kernel
    kernel.set_value(kernel[...].astype(jnp.bfloat16))
    exact = kernel[...].astype(jnp.float32) + model.layers.attention.query.adapter.matrix()
    merge_lora(model)
    np.testing.assert_array_equal(model.layers.attention.query.kernel[...], exact)


def test_an_unknown_target_is_told_with_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"no projection q_proj; there are down, gate, key, logits, output, query, up"
    ):
        add_lora(create_model(LLAMA, nnx.Rngs(0)), LoraConfig(rank=2, targets=("q_proj",)), nnx.Rngs(1))

"""Tables of names: both ways, and checkpoints that do not fit."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.convert.flash import from_official, name_table, to_official
from lin_jax.convert.names import Entry, load
from lin_jax.experiment import AugmentedConfig, ConfigError, FlashConfig
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.models.flash import Flash

CONFIG = FlashConfig(
    vocabulary_size=11, width=8, depth=3, query_key_size=4, rotary_size=2, attention=AugmentedConfig(convolution=5)
)
KERNEL = 9


@pytest.fixture(scope="module")
def model(quick_compilation):
    return Flash(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def official(model):
    return to_official(model, KERNEL)


def test_there_and_back(model, official):
    back = parameters_by_path(from_official(CONFIG, official, KERNEL))
    assert back.keys() == parameters_by_path(model).keys()
    for path, array in parameters_by_path(model).items():
        np.testing.assert_array_equal(back[path], array)


def test_every_layer_has_names_of_its_own(model, official):
    np.testing.assert_array_equal(official["layers.2.to_out.weight"], np.asarray(model.layers.output.kernel[2]).T)
    assert official["layers.0.dwconv.weight"].shape == (1, 1, KERNEL, 1)
    np.testing.assert_array_equal(official["layers.0.dwconv.weight"][0, 0, 4, 0], model.layers.filter[0, 0, 0])
    assert not official["layers.0.dwconv.weight"][0, 0, 5:].any()


def test_computed_tables_are_ignored(official):
    from_official(CONFIG, {**official, "abs_pos_emb.inv_freq": np.zeros(4)}, KERNEL)


def without(official, *names):
    return {name: array for name, array in official.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: without(x, "token_emb.weight"), "the checkpoint lacks token_emb.weight$"),
        (
            lambda x: {name: array for name, array in x.items() if "to_" not in name},
            "the checkpoint lacks .*layers.0.to_qk.0.bias and 17 more$",
        ),
        (lambda x: {**x, "layers.3.norm.g": np.ones(1)}, "the model has no place for layers.3.norm.g$"),
        (
            lambda x: {**x, "token_emb.weight": np.ones((12, 8))},
            r"token_emb.weight has shape \(12, 8\), which does not fit embedding\(11, 8\)",
        ),
        (
            lambda x: {**x, "layers.1.to_out.weight": np.ones((8, 17))},
            r"layers.1.to_out.weight has shape \(8, 17\), which does not fit layers.output.kernel\(16, 8\)",
        ),
        (lambda x: {**x, "abs_pos_emb.scale": np.ones(2)}, r"abs_pos_emb.scale has shape \(2,\)"),
        (lambda x: {**x, "layers.2.dwconv.weight": np.ones((1, 1, 7, 1))}, r"layers.2.dwconv.weight has shape"),
    ],
)
def test_refuses_checkpoints_that_do_not_fit(official, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_official(CONFIG, change(official), KERNEL)
    assert "\n" not in str(error.value)


def test_a_table_must_set_every_parameter_and_sets_none_otherwise(official):
    model = from_official(CONFIG, official, KERNEL)
    official = {name: 2 * array for name, array in official.items()}
    before = {path: np.asarray(array) for path, array in parameters_by_path(model).items()}
    table = [entry for entry in name_table(CONFIG, KERNEL) if entry.ours != "norm.bias"]
    with pytest.raises(ConfigError, match="no entry of the table sets norm.bias"):
        load(model, table, without(official, "to_logits.0.bias"), CONFIG.depth, ())
    with pytest.raises(ConfigError, match="to_logits.1.bias"):
        load(model, name_table(CONFIG, KERNEL), {**official, "to_logits.1.bias": np.ones(3)}, CONFIG.depth, ())
    for path, array in parameters_by_path(model).items():
        np.testing.assert_array_equal(array, before[path])


def test_an_entry_may_transform_and_keeps_the_type():
    class Doubled(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.zeros((2, 3), jnp.float32))

    model = Doubled()
    entry = Entry("w", "weight", lambda x: 2 * x.T, lambda x: x.T / 2)
    load(model, [entry], {"w": np.arange(6, dtype=np.float64).reshape(3, 2), "w.freqs": np.ones(1)}, 1, (".freqs",))
    assert model.weight.dtype == jnp.float32
    np.testing.assert_array_equal(model.weight[...], [[0, 4, 8], [2, 6, 10]])

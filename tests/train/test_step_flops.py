"""Counted operations of whole training steps against those of the compiled program."""

import jax
import pytest

from lin_jax.experiment import (
    Config,
    DataConfig,
    FinetuneConfig,
    LlamaConfig,
    LoraConfig,
    MedusaConfig,
    MedusaFinetuneConfig,
    MeshConfig,
    SoftmaxConfig,
)
from lin_jax.plan.compiled import trace
from lin_jax.train.parts import abstract_batch, make_step
from lin_jax.train.trainable import step_flops

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 256
# One layer and one chunk of everything, as XLA counts the body of a loop once.
SOFTMAX = SoftmaxConfig()


def settings(remat="none", finetune=FinetuneConfig()):  # noqa: B008
    model = LlamaConfig(
        vocabulary_size=512,
        width=256,
        depth=1,
        heads=2,
        key_value_heads=2,
        head_size=128,
        feed_forward_size=512,
        attention=SOFTMAX,
        remat=remat,
    )
    data = DataConfig(sequence_length=T, batch_size=B)
    return Config(model=model, data=data, finetune=finetune, mesh=MeshConfig(data=1))


LORA = FinetuneConfig(checkpoint="x", train=("embedding",), lora=LoraConfig(rank=16))
HEADS = MedusaFinetuneConfig(checkpoint="x", train=(), medusa=MedusaConfig(heads=1))
LOGITS = 2 * 256 * 512


@pytest.mark.parametrize(
    ("config", "shared"),
    # Of jax 0.10 and 0.12 only one shares the logits of heads.
    [(settings(remat="full"), [LOGITS]), (settings(finetune=LORA), [LOGITS]), (settings(finetune=HEADS), [LOGITS, 0])],
    ids=["all", "lora", "heads"],
)
def test_equals_the_compiled_step(config, shared):
    traced = trace(config, jax.devices()[:1])
    compiled = make_step(traced.parts).lower(traced.state, abstract_batch(traced.parts)).compile()
    # Where there is one chunk of positions, XLA shares the logits that the backward pass asks for again.
    expected = [B * T * (step_flops(config).computed - less) for less in shared]
    # The compiled program also has activations, norms, rotations, masks and the optimizer.
    assert any(0.99 < compiled.cost_analysis()["flops"] / flops < 1.08 for flops in expected)

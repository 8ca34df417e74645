"""What JAX has deprecated is imported where it is used alone."""

import os
import subprocess
import sys

PROGRAM = """
import sys, jax.numpy as jnp
import lin_jax, lin_jax.models.llama, lin_jax.models.gpt2, lin_jax.models.flash
from lin_jax.ops.linear_attention import augmented_attention
x = jnp.ones((1, 4, 1, 2))
DEPRECATED = ("jax.experimental.pallas.triton", "jax.experimental.pallas.ops.gpu", "jax.experimental.pallas.ops.tpu")
augmented_attention(x, x, x, group_size=2, implementation=sys.argv[1])
print(sorted(name for name in DEPRECATED if name in sys.modules))
"""


def imported(implementation: str, *flags: str) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *flags, "-c", PROGRAM, implementation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_and_xla_s_form_import_nothing_deprecated():
    assert imported("xla", "-W", "error::DeprecationWarning:lin_jax") == "[]"
    assert imported("pallas_gpu") == "['jax.experimental.pallas.triton']"

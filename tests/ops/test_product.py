"""The product in types of 16 bits: each equation of the library runs on this machine, and is summed in float32."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lin_jax
from lin_jax.ops import product as product_module
from lin_jax.ops.product import in_full_float32, product
from lin_jax.ops.softmax_attention.api import longlora_attention, softmax_attention
from lin_jax.ops.target import TargetDevice

pytestmark = pytest.mark.usefixtures("quick_compilation")

LIBRARY = Path(lin_jax.__file__).parent
CALL = re.compile(r'\bproduct\(\s*"([^"]+)"')
# "..." is written as two axes.
EQUATIONS = sorted(
    {equation.replace("...", "bm") for file in LIBRARY.rglob("*.py") for equation in CALL.findall(file.read_text())}
)
TYPES = [jnp.bfloat16, jnp.float16]
# Lengths of the letters that stand for rows, and for tokens or nodes; heads and sizes are all different.
SHAPES = [(2, 1), (2, 8)]
SIZES = dict(k=2, j=3, d=8, e=6, p=5, s=4, u=7, h=6)


def operands(equation: str, rows: int, tokens: int, dtype) -> list[jax.Array]:
    """Two normal arrays that fit the equation."""
    rng = np.random.default_rng(0)
    sizes = SIZES | dict.fromkeys("bn", rows) | dict.fromkeys("amtg", tokens)
    shapes = [[sizes[letter] for letter in part] for part in equation.split("->")[0].split(",")]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def test_the_equations_are_found():
    assert len(EQUATIONS) > 10


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
def test_every_equation_of_the_library_and_its_gradients(dtype, rows, tokens):
    cases = {equation: operands(equation, rows, tokens, dtype) for equation in EQUATIONS}

    @jax.jit
    def run(cases):
        def one(equation, a, b):
            y, pullback = jax.vjp(lambda a, b: product(equation, a, b), a, b)
            return y, pullback(jnp.ones_like(y))

        return {equation: one(equation, *arrays) for equation, arrays in cases.items()}

    for equation, (y, gradients) in run(cases).items():
        a, b = (np.asarray(x, np.float64) for x in cases[equation])
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, np.einsum(equation, a, b), rtol=1e-5, atol=1e-5)
        left, right, out = re.split(",|->", equation)
        expected_gradients = (
            np.einsum(f"{out},{right}->{left}", np.ones(y.shape), b),
            np.einsum(f"{left},{out}->{right}", a, np.ones(y.shape)),
        )
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == dtype
            np.testing.assert_allclose(gradient, expected, rtol=float(jnp.finfo(dtype).eps) + 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
@pytest.mark.parametrize("attend", [softmax_attention, functools.partial(longlora_attention, split=2)])
def test_softmax_attention_and_its_gradients(dtype, rows, tokens, attend):
    q, k = operands("bthd,btkd->b", rows, tokens, dtype)
    v, _ = operands("btkd,b->b", rows, tokens, dtype)

    @jax.jit
    def run(*heads):
        y, pullback = jax.vjp(attend, *heads)
        return y, pullback(jnp.ones_like(y))

    narrow, wide = run(q, k, v), run(*(x.astype(jnp.float32) for x in (q, k, v)))
    for actual, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(("platform", "in_full"), [("cpu", 0), ("gpu", 3), ("tpu", 3)])
def test_float32_is_multiplied_in_full_also_where_a_device_would_round_it(platform, in_full, monkeypatch):
    """A CPU does so by itself."""
    monkeypatch.setattr(product_module, "target", lambda: TargetDevice(platform, ""))

    def products(x):
        return jnp.einsum("ij,jk->ik", x, x), x @ x, product("ij,kj->ik", x, x)

    x = jnp.ones((3, 3))
    assert str(jax.make_jaxpr(jax.jit(products))(x)).count("Precision.HIGHEST, ") == 0
    assert str(jax.make_jaxpr(jax.jit(in_full_float32(products)))(x)).count("Precision.HIGHEST, ") == in_full

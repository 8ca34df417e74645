"""The table of chips: what JAX calls them, what a plan may name, and that its figures stand nowhere else."""

import ast
from pathlib import Path

import pytest

from lin_jax.chips import CHIPS, chip_count, chip_named, chip_of, is_plan

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert chip_of(kind) == chip_named(name)


def test_no_chip_is_taken_for_another():
    kinds = [(chip.name, kind) for chip in CHIPS for kind in (chip.kind, *chip.parts)]
    assert [chip_of(kind).name for _, kind in kinds] == [name for name, _ in kinds]
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert chip_of("cpu") is None


def test_every_chip_that_can_be_compiled_for_can_be_planned():
    for chip in CHIPS:
        sizes = chip.topologies or (("8",) if chip.multiprocessors else ())
        assert all(is_plan(f"{chip.name}:{size}") for size in sizes)
        assert [chip_count(size) for size in sizes] == sorted(chip_count(size) for size in sizes)
    assert not is_plan("h100-pcie:8") and not is_plan("v9:2x2") and not is_plan("")


def numbers(node):
    """The values of the largest expressions of numbers alone."""
    if isinstance(node, (ast.Constant, ast.UnaryOp, ast.BinOp)):
        try:
            value = eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})
        except Exception:
            value = None
        if isinstance(value, (int, float)):
            yield value
            return
    for child in ast.iter_child_nodes(node):
        yield from numbers(child)


def figures(text):
    """Numbers of a file that are within 1% of a chip's arithmetic, bandwidth of memory or interconnect."""
    known = {figure for chip in CHIPS for figure in (chip.flops, chip.memory_bandwidth, chip.interconnect)}
    return [value for value in numbers(ast.parse(text)) if any(abs(value - figure) < 0.01 * figure for figure in known)]


def test_figures_of_chips_stand_in_one_place():
    assert figures("a = 3352 * 10**9") and figures("b = (312e12, 1640e9)") and not figures("c = 1e12 * x")
    files = [file for folder in ("lin_jax", "benchmarks", "configs") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if figures(file.read_text(encoding="utf-8"))}
    assert found == {"lin_jax/chips.py"}

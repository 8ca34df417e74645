"""Augmented attention against the same mathematics unfused in JAX and, where it is installed, in eager PyTorch.

    python -m benchmarks.attention [--lengths 1024 4096 16384] [--repeats 10] [--json FILE]

All forms get the same values (relu^2 groups, grouped linear attention, causal convolution a head) and are timed in
turn, forward and forward+backward (gradients with respect to queries, keys, values, alpha and filter), after a check
that outputs and gradients agree. The PyTorch forms get their arrays in the layout they like best, heads before tokens.

- `fused`: `lin_jax`'s augmented_attention, implementation="xla".
- `unfused`: the equations one after another in JAX, under jit, with the quickest of the depthwise convolutions tried.
- `torch`: the official training path, with its centred filter of which the causal half is masked.
- `torch causal`, `torch depthwise`: the same with kinder convolutions, which the official code does not have: a filter
  of the causal taps alone; and that with one channel for every head and value, the quickest on a CPU.

The column "others" is the part of the processor that other programs took meanwhile: with much of it, no figure counts.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import common
from lin_jax.ops.linear_attention import augmented_attention

TOLERANCE = 1e-4
FUSED = "fused"
PASSES = ("forward", "forward+backward")
Arrays = tuple[np.ndarray, ...]
Form = Callable[[], Any]


def make_inputs(options: argparse.Namespace, length: int) -> tuple[Arrays, np.ndarray]:
    """Normalised q and k, v, alpha and filter; and the cotangent of the output. All float32."""
    random = np.random.default_rng(length)
    shape = (options.batch, length, options.heads, options.head_size)
    q, k, v, cotangent = (random.standard_normal(shape, dtype=np.float32) for _ in range(4))
    q, k = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (q, k))
    taps = 0.1 * random.standard_normal((options.taps, options.heads), dtype=np.float32)
    return (q, k, v, np.asarray(0.5, np.float32), taps), cotangent


def fused_attention(group_size: int) -> Callable[..., jax.Array]:
    """(q, k, v, alpha, filter) -> y by the library."""

    def attend(q_BTHD, k_BTHD, v_BTHE, alpha, conv_WH):
        return augmented_attention(
            q_BTHD, k_BTHD, v_BTHE, alpha=alpha, conv_WH=conv_WH, group_size=group_size, implementation="xla"
        )

    return attend


def unfused_attention(group_size: int) -> Callable[..., jax.Array]:
    """(q, k, v, alpha, filter) -> y, one equation after another."""

    def attend(q_BTHD, k_BTHD, v_BTHE, alpha, conv_WH):
        B, T, H, _ = q_BTHD.shape
        q_BNGHD, k_BNGHD, v_BNGHE = (
            array.reshape(B, T // group_size, group_size, H, -1) for array in (q_BTHD, k_BTHD, v_BTHE)
        )
        scores = jnp.einsum("bnihd,bnjhd->bnhij", q_BNGHD, k_BNGHD)
        causal = jnp.tril(jnp.ones((group_size, group_size), bool))
        local = jnp.einsum("bnhij,bnjhe->bnihe", jnp.where(causal, jax.nn.relu(scores) ** 2, 0.0), v_BNGHE)
        states = jnp.einsum("bnjhd,bnjhe->bnhde", k_BNGHD, v_BNGHE)
        before = jnp.cumsum(states, axis=1) - states
        grouped = jnp.einsum("bnihd,bnhde->bnihe", q_BNGHD, before)
        return (local + alpha * grouped).reshape(v_BTHE.shape) + depthwise_convolution(v_BTHE, conv_WH)

    return attend


def depthwise_convolution(v_BTHE: jax.Array, conv_WH: jax.Array) -> jax.Array:
    """Causal convolution of every channel with the filter of its head."""
    B, T, H, E = v_BTHE.shape
    W = conv_WH.shape[0]
    # On a CPU, channels last with one filter a channel is 5 times quicker than heads as channels of an image.
    filters = jnp.repeat(conv_WH[::-1, None, :], E, axis=2)
    y_BTC = lax.conv_general_dilated(
        v_BTHE.reshape(B, T, H * E),
        filters,
        window_strides=(1,),
        padding=[(W - 1, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=H * E,
    )
    return y_BTC.reshape(v_BTHE.shape)


def jax_forms(attend: Callable[..., jax.Array], inputs: Arrays, cotangent: np.ndarray) -> dict[str, Form]:
    """Forward, and forward+backward to (y, gradients), of a JAX function."""

    def forward_backward(inputs, cotangent):
        y, pull = jax.vjp(attend, *inputs)
        return y, *pull(cotangent)

    on_device = jax.device_put((inputs, cotangent))
    forward, both = jax.jit(attend), jax.jit(forward_backward)
    return {"forward": lambda: forward(*on_device[0]), "forward+backward": lambda: both(*on_device)}


def centred_convolution(v: Any, weight: Any) -> Any:
    """The official form: v [B, H, T, E], a filter of 2 W - 1 taps a head, of which the future ones are masked."""
    import torch
    from torch.nn import functional as F

    W = (weight.shape[2] + 1) // 2
    past = (torch.arange(weight.shape[2]) < W)[:, None]
    return F.conv2d(v, weight * past, padding=(W - 1, 0), groups=v.shape[1])


def causal_convolution(v: Any, weight: Any) -> Any:
    """The same with the W causal taps alone."""
    from torch.nn import functional as F

    W = (weight.shape[2] + 1) // 2
    return F.conv2d(F.pad(v, (0, 0, W - 1, 0)), weight[:, :, :W], groups=v.shape[1])


def channel_convolution(v: Any, weight: Any) -> Any:
    """The same with tokens last and every head and value as a channel of its own."""
    from torch.nn import functional as F

    B, H, T, E = v.shape
    W = (weight.shape[2] + 1) // 2
    channels = F.pad(v.transpose(2, 3).reshape(B, H * E, T), (W - 1, 0))
    filters = weight[:, :, :W, 0].repeat_interleave(E, dim=0)
    return F.conv1d(channels, filters, groups=H * E).reshape(B, H, E, T).transpose(2, 3)


TORCH_CONVOLUTIONS = {
    "torch": centred_convolution,
    "torch causal": causal_convolution,
    "torch depthwise": channel_convolution,
}


def torch_forms(
    group_size: int, convolve: Callable[[Any, Any], Any], inputs: Arrays, cotangent: np.ndarray
) -> dict[str, Form]:
    """Forward, and forward+backward to (y, gradients), in eager PyTorch."""
    import torch
    from torch.nn import functional as F

    def attend(q, k, v, alpha, weight):
        q_groups, k_groups, v_groups = (array.unflatten(2, (-1, group_size)) for array in (q, k, v))
        scores = torch.einsum("bhnid,bhnjd->bhnij", q_groups, k_groups)
        causal = torch.ones(group_size, group_size).tril()
        local = torch.einsum("bhnij,bhnje->bhnie", F.relu(scores) ** 2 * causal, v_groups)
        states = torch.einsum("bhnjd,bhnje->bhnde", k_groups, v_groups)
        grouped = torch.einsum("bhnid,bhnde->bhnie", q_groups, states.cumsum(dim=2) - states)
        return (local + alpha * grouped).flatten(2, 3) + convolve(v, weight)

    leaves = torch_inputs(inputs)
    weights = torch.from_numpy(heads_first(cotangent))

    def forward():
        with torch.no_grad():
            return attend(*leaves)

    def forward_backward():
        y = attend(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, weights)

    return {"forward": forward, "forward+backward": forward_backward}


def torch_inputs(inputs: Arrays) -> list[Any]:
    """The inputs as PyTorch leaves: heads before tokens, the filter centred and in cross-correlation order."""
    import torch

    *qkv, alpha, conv_WH = inputs
    W, H = conv_WH.shape
    weight = np.zeros((H, 1, 2 * W - 1, 1), np.float32)
    weight[:, 0, :W, 0] = conv_WH[::-1].T
    arrays = [*(heads_first(array) for array in qkv), alpha, weight]
    return [torch.from_numpy(array).requires_grad_() for array in arrays]


def heads_first(array_BTHD: np.ndarray) -> np.ndarray:
    """[B, T, H, D] -> contiguous [B, H, T, D]."""
    return np.ascontiguousarray(np.swapaxes(array_BTHD, 1, 2))


def torch_results(results: tuple[Any, ...], taps: int) -> list[np.ndarray]:
    """What the PyTorch forward+backward returns, in the layout of the JAX forms."""
    *per_token, alpha, weight = [result.numpy() for result in results]
    return [*(np.swapaxes(array, 1, 2) for array in per_token), alpha, weight[:, 0, :taps, 0].T[::-1]]


def largest_difference(results: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest absolute difference of output and gradients, each relative to its largest value where that exceeds 1."""
    return max(
        float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))
        for ours, theirs in zip(results, expected, strict=True)
    )


def make_forms(options: argparse.Namespace, length: int) -> dict[str, dict[str, Form]]:
    """Form -> pass -> function to time."""
    inputs, cotangent = make_inputs(options, length)
    forms = {
        FUSED: jax_forms(fused_attention(options.group), inputs, cotangent),
        "unfused": jax_forms(unfused_attention(options.group), inputs, cotangent),
    }
    if common.has_torch():
        for name, convolve in TORCH_CONVOLUTIONS.items():
            forms[name] = torch_forms(options.group, convolve, inputs, cotangent)
    return forms


def differences(forms: dict[str, dict[str, Form]], taps: int) -> dict[str, float]:
    """Largest difference of each form from the fused one."""
    results = {}
    for name, passes in forms.items():
        values = passes["forward+backward"]()
        results[name] = torch_results(values, taps) if name.startswith("torch") else [*map(np.asarray, values)]
    return {name: largest_difference(values, results[FUSED]) for name, values in results.items() if name != FUSED}


def check(found: dict[str, float]) -> None:
    """Ends the program when the forms don't compute the same."""
    for name, difference in found.items():
        if not difference <= TOLERANCE:
            sys.exit(f"{name} differs from {FUSED} by {difference:.1e}, more than {TOLERANCE:.0e}: nothing was timed")


def measure(options: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """One row for every pass and form at one length."""
    forms = make_forms(options, length)
    found = differences(forms, options.taps)
    check(found)
    rows = []
    for name in PASSES:
        competition = common.Competition()
        timings = common.time_interleaved({form: passes[name] for form, passes in forms.items()}, options.repeats)
        others = competition.share()
        rows += [
            {
                "length": length,
                "pass": name,
                "form": form,
                "median_ms": 1e3 * timing.median,
                "min_ms": 1e3 * timing.minimum,
                "us_per_token": 1e6 * timing.median / (length * options.batch),
                "fused_is_faster": timings[FUSED].speedup_over(timing),
                "fused_is_faster_by_minimum": timings[FUSED].best_speedup_over(timing),
                "difference": found.get(form, 0.0),
                "used_by_others": others,
            }
            for form, timing in timings.items()
        ]
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of one length."""
    header = [
        "T, pass, form",
        "median ms",
        "min ms",
        "us/token",
        "fused is faster",
        "by minimum",
        "difference",
        "others",
    ]
    cells = [
        [
            f"{row['length']} {row['pass']} {row['form']}",
            f"{row['median_ms']:.2f}",
            f"{row['min_ms']:.2f}",
            f"{row['us_per_token']:.3f}",
            f"{row['fused_is_faster']:.2f} x",
            f"{row['fused_is_faster_by_minimum']:.2f} x",
            f"{row['difference']:.1e}",
            common.percent(row["used_by_others"]),
        ]
        for row in rows
    ]
    common.print_table(header, cells)


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Pass -> the fused form's time a token at the longest length over that at the shortest."""
    fused = [row for row in rows if row["form"] == FUSED]
    per_token = {(row["pass"], row["length"]): row["us_per_token"] for row in fused}
    lengths = sorted({row["length"] for row in fused})
    return {name: per_token[name, lengths[-1]] / per_token[name, lengths[0]] for name in PASSES}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens T")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64, help="D and E")
    parser.add_argument("--group", type=int, default=64, help="tokens G in a group")
    parser.add_argument("--taps", type=int, default=32, help="taps W of the convolution")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    for length in options.lengths:
        if length % options.group:
            parser.error(f"--lengths: {length} is not a multiple of --group {options.group}")
    return options


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    jax.config.update("jax_default_matmul_precision", "highest")
    facts = common.describe_machine()
    common.print_machine(facts)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        new = measure(options, length)
        print_rows(new)
        rows += new
    for name, factor in growth(rows).items() if len(set(options.lengths)) > 1 else ():
        print(f"{name}: time per token at T={max(options.lengths)} is {factor:.2f} x that at T={min(options.lengths)}")
    common.write_json(options.json, {"machine": facts, "options": vars(options), "rows": rows, "growth": growth(rows)})


if __name__ == "__main__":
    main()

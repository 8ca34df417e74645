"""The kernel of the device at hand against XLA's form and softmax attention: correctness, then times of one run.

    python -m benchmarks.kernels [--json FILE]
    python -m benchmarks.kernels --tiny      sizes for a CPU, where the kernel is simulated and times say nothing

At LLaMA-2-7B's attention (32 heads of 128, groups of 64, 32 taps, bfloat16) and T = 2k to 128k: with 128k tokens in a
batch, and with one row. Each cell is the median of several measurements taken in turn with the other forms, after a
warm-up; a measurement is as many calls as take a while, divided by their number.

- `kernel`: augmented attention by the device's Pallas kernel.
- `xla`: augmented attention by XLA's form.
- `cudnn`: causal softmax attention by cuDNN's flash attention, `jax.nn.dot_product_attention`.

GB/s counts every array once: q, k, v and y forward; these, the gradient of y and the gradients of q, k and v in both
passes. It is compared with what a copy reaches in the same run. A form that does not fit or is not there says why.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Timing, describe_machine, print_machine, print_table, time_interleaved, write_json
from lin_jax.ops.linear_attention import augmented_attention

PASSES = ("forward", "forward+backward")
# Calls of one measurement together take about this long, so that their dispatch counts for little.
MEASUREMENT_SECONDS = 0.03
MOST_CALLS = 200
Arrays = dict[str, Any]
Form = Callable[[Arrays], jax.Array]


def make_arrays(options: argparse.Namespace, batch: int, length: int) -> Arrays:
    """Normalised q and k, v, alpha and taps."""
    keys = jax.random.split(jax.random.key(length), 4)
    shape = (batch, length, options.heads, options.head_size)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)).astype(x.dtype)  # noqa: E731
    taps = 0.1 * jax.random.normal(keys[3], (options.taps, options.heads))
    return {
        "q_BTHD": unit(q),
        "k_BTKD": unit(k),
        "v_BTKE": v,
        "alpha": jnp.full((options.heads,), 0.5),
        "conv_WH": taps,
    }


def augmented(implementation: str, group_size: int) -> Form:
    """Augmented attention by one of its implementations."""

    def attend(arrays: Arrays) -> jax.Array:
        return augmented_attention(**arrays, group_size=group_size, implementation=implementation)

    return attend


def cudnn(arrays: Arrays) -> jax.Array:
    """Causal softmax attention."""
    q, k, v = arrays["q_BTHD"], arrays["k_BTKD"], arrays["v_BTKE"]
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def forms(options: argparse.Namespace) -> dict[str, Form]:
    """What is measured."""
    kernel = "pallas_tpu" if jax.default_backend() == "tpu" else "pallas_gpu"
    return {
        "kernel": augmented(kernel, options.group_size),
        "xla": augmented("xla", options.group_size),
        "cudnn": cudnn,
    }


def with_backward(form: Form) -> Callable[[Arrays, jax.Array], Any]:
    """The outputs and all gradients, given that of the outputs."""

    def call(arrays: Arrays, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(form, arrays)
        return y, pull(cotangent)[0]

    return call


# Correctness.


def by_definition(arrays: Arrays, group_size: int) -> jax.Array:
    """The equations with all scores of a row at once, in the type of its arguments."""
    q, k, v = arrays["q_BTHD"], arrays["k_BTKD"], arrays["v_BTKE"]
    index = np.arange(q.shape[1])
    distance, groups = index[:, None] - index, index[:, None] // group_size - index // group_size
    score = jnp.einsum("bthd,bshd->bhts", q, k)
    weights = jnp.where((distance >= 0) & (groups < 1), jnp.square(jnp.maximum(score, 0)), 0)
    weights += jnp.where(groups >= 1, arrays["alpha"][:, None, None] * score, 0)
    taps = arrays["conv_WH"].T
    inside = (distance >= 0) & (distance < taps.shape[1])
    weights += jnp.where(inside, taps[:, np.clip(distance, 0, taps.shape[1] - 1)], 0)
    return jnp.einsum("bhts,bshe->bthe", weights, v)


def errors(options: argparse.Namespace) -> dict[str, float]:
    """Largest difference of outputs and gradients from float64, over the largest entry; bfloat16 inputs."""
    few = argparse.Namespace(**{**vars(options), "heads": min(options.heads, 4)})
    arrays = make_arrays(few, 1, options.check_length)
    cotangent = jax.random.normal(jax.random.key(1), arrays["q_BTHD"].shape, jnp.bfloat16)
    actual = jax.jit(with_backward(forms(options)["kernel"]))(arrays, cotangent)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64), (arrays, cotangent))
        definition = with_backward(lambda arrays: by_definition(arrays, options.group_size))
        expected = jax.tree.map(np.asarray, jax.jit(definition)(*wide))
    names = ["y", *expected[1]]
    pairs = zip([actual[0], *actual[1].values()], [expected[0], *expected[1].values()], strict=True)
    return {name: _error(a, b) for name, (a, b) in zip(names, pairs, strict=True)}


def _error(actual: jax.Array, expected: np.ndarray) -> float:
    """Not a number if any entry is."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


# Times.


def copy_bandwidth(options: argparse.Namespace) -> float:
    """Bytes a second that reading an array and writing another one reaches."""
    x = jnp.zeros(options.copy_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    function, calls = together(lambda: add(x))
    return 2 * x.nbytes * calls / time_interleaved({"copy": function}, options.repeats)["copy"].minimum


def together(function: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
    """A function that makes so many calls that they take a while, and their number; compiles before it counts."""
    for _ in range(2):
        jax.block_until_ready(function())
    start = time.perf_counter()
    jax.block_until_ready(function())
    calls = max(1, min(MOST_CALLS, int(MEASUREMENT_SECONDS / (time.perf_counter() - start))))

    def several() -> Any:
        for _ in range(calls - 1):
            function()
        return function()

    return several, calls


def moved_bytes(arrays: Arrays, direction: str) -> int:
    """Bytes of all arrays with tokens, each once."""
    q, k, v = (arrays[name].size * arrays[name].dtype.itemsize for name in ("q_BTHD", "k_BTKD", "v_BTKE"))
    forward = q + k + 2 * v
    return forward if direction == "forward" else forward + 2 * (q + k + v) + v


def measure(options: argparse.Namespace, batch: int, length: int, direction: str) -> dict[str, Timing | str]:
    """Seconds of each form, or why there are none."""
    arrays = make_arrays(options, batch, length)
    functions: dict[str, Callable[[], Any]] = {}
    calls: dict[str, int] = {}
    found: dict[str, Timing | str] = {}
    for name, form in forms(options).items():
        if name == "cudnn" and jax.default_backend() != "gpu":
            found[name] = "needs a GPU"
            continue
        try:
            functions[name], calls[name] = together(_call(form, arrays, direction))
        except Exception as error:  # what does not fit or does not compile is a result
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    timings = time_interleaved(functions, options.repeats) if functions else {}
    for name, timing in timings.items():
        found[name] = Timing(tuple(seconds / calls[name] for seconds in timing.seconds))
    return found


def _call(form: Form, arrays: Arrays, direction: str) -> Callable[[], Any]:
    if direction == "forward":
        forward = jax.jit(form)
        return lambda: forward(arrays)
    both = jax.jit(with_backward(form))
    cotangent = jnp.ones_like(arrays["v_BTKE"])
    return lambda: both(arrays, cotangent)


def measure_all(options: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """All cells; a line is printed for each as it is done."""
    cells = [(batch, length) for length in options.lengths for batch in sorted({1, max(1, options.tokens // length)})]
    results = []
    for direction in PASSES:
        for batch, length in cells:
            found = measure(options, batch, length, direction)
            bytes_once = moved_bytes(jax.eval_shape(lambda: make_arrays(options, batch, length)), direction)  # noqa: B023
            row = {"pass": direction, "B": batch, "T": length, "bytes": bytes_once, "copy bandwidth": bandwidth}
            row |= {name: list(x.seconds) if isinstance(x, Timing) else x for name, x in found.items()}
            results.append(row)
            print(_progress(row, found), flush=True)
    return results


def _progress(row: dict[str, Any], found: dict[str, Timing | str]) -> str:
    times = (f"{name} {x if isinstance(x, str) else f'{1e3 * x.median:.3f} ms'}" for name, x in found.items())
    return f"{row['pass']} B {row['B']} T {row['T']}: {', '.join(times)}"


def summarise(results: list[dict[str, Any]]) -> None:
    """The table: medians, and what they mean."""
    header = ["pass", "B", "T", "kernel ms", "xla ms", "cudnn ms", "GB/s", "of copy", "xla/kernel", "cudnn/kernel"]
    rows = []
    for row in results:
        median = {n: float(np.median(row[n])) if isinstance(row[n], list) else None for n in ("kernel", "xla", "cudnn")}
        kernel = median["kernel"]
        rate = None if kernel is None else row["bytes"] / kernel
        cells = [row["pass"], str(row["B"]), str(row["T"])]
        cells += ["-" if x is None else f"{1e3 * x:.3f}" for x in median.values()]
        cells += ["-" if rate is None else f"{rate / 1e9:.1f}"]
        cells += ["-" if rate is None else f"{rate / row['copy bandwidth']:.0%}"]
        others = (median["xla"], median["cudnn"])
        cells += ["-" if x is None or kernel is None else f"{x / kernel:.2f}" for x in others]
        rows.append(cells)
    print_table(header, rows)


def main() -> None:
    """Correctness, the bandwidth of a copy, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048 << n for n in range(7)])
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of a batch: B = tokens / T, beside B = 1")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head_size", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--taps", type=int, default=32)
    parser.add_argument(
        "--check_length", type=int, default=1000, help="tokens of the row that is compared with float64"
    )
    parser.add_argument("--copy_bytes", type=int, default=1 << 30)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    if options.tiny:
        sizes = {"lengths": [64, 128], "tokens": 128, "heads": 2, "head_size": 16, "group_size": 16, "taps": 4}
        vars(options).update(sizes, check_length=50, copy_bytes=1 << 20, repeats=2)
    facts = describe_machine()
    print_machine(facts)
    found = errors(options)
    print("relative error against float64: " + ", ".join(f"{name} {error:.1e}" for name, error in found.items()))
    bandwidth = copy_bandwidth(options)
    print(f"a copy reaches {bandwidth / 1e9:.1f} GB/s")
    results = measure_all(options, bandwidth)
    summarise(results)
    write_json(options.json, {"machine": facts, "errors": found, "copy": bandwidth, "results": results})
    if not all(error < 1e-2 for error in found.values()):
        raise SystemExit("the kernel's error against float64 is not below 1e-2")


if __name__ == "__main__":
    main()

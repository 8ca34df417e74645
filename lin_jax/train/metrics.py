"""Metrics of a run: a bar or lines for whoever watches, JSONL and TensorBoard for later, a picture at the end."""

import io
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from lin_jax.chips import chip_of
from lin_jax.paths import write_whole
from lin_jax.settings.base import ConfigError, first_line
from lin_jax.train.distributed import agree_on
from lin_jax.train.step import StepMetrics

METRICS = "metrics.jsonl"
# What differs between two runs of the same settings.
_TIMES = ("step_seconds", "tokens_per_second", "examples_per_second", "mfu")


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s that a device can do at best; None where it is not known."""
    chip = chip_of(device_kind)
    return chip.flops if chip else None


def read_metrics(file: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, up to `last_step`, but for one that was cut off by a kill."""
    lines = file.read_bytes().decode(errors="replace").splitlines() if file.exists() else []
    found = [line for line in map(_parse, lines) if line is not None]
    return [line for line in found if last_step is None or line["step"] <= last_step]


class MetricsLog:
    """Collects metrics without waiting for the device, and writes them down when asked to.

    One line of `metrics.jsonl` a step; a run that resumes drops the lines after its checkpoint, so that every step is
    there once. Only the first process writes.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        steps: int,
        flops_per_token: float,
        measure: str,
        report: Callable[[str], None],
        checksum: int | None = None,
        unit: str = "tokens",
    ):
        """Go on with the metrics of a run.

        Args:
            workdir: where they are.
            step: after which the run goes on.
            steps: of the whole run.
            flops_per_token: operations that a step needs.
            measure: a measure that lines of evaluations hold.
            report: is called with lines for the user.
            checksum: what the metrics had at `step`, where it is known.
            unit: what the weights of a batch count.

        Raises:
            ConfigError: they cannot be written.
        """
        self._steps, self._flops_per_token, self._report = steps, flops_per_token, report
        self._unit = unit
        self._pending: list[tuple[int, StepMetrics]] = []
        self._bar: Any = None
        self._sinks: list[_JsonLines | _Board] = []
        self.checksum, evaluation = 0, None
        if jax.process_index() == 0:
            lines = self._open(workdir, step)
            self.checksum = checksum_of(lines)
            evaluation = next((line for line in reversed(lines) if line.get(measure) is not None), None)
        # All processes must know the same evaluations: they evaluate together.
        found = agree_on([self.checksum, evaluation])
        self._validation: dict[str, Any] | None = found[1]
        if checksum is not None and found[0] != checksum:
            self._validation = None
            self.message(
                f"warning: {workdir / METRICS} is not as it was at step {step}; the run goes on with what it holds"
            )
        self._bar = _make_bar(step, steps) if self._sinks and sys.stderr.isatty() else None
        self._mark = time.perf_counter()

    def _open(self, workdir: Path, step: int) -> list[dict[str, Any]]:
        """Open the files and return the lines up to `step`."""
        try:
            self._sinks = [_JsonLines(workdir / METRICS, step), _Board(workdir / "tensorboard", step)]
            return read_metrics(workdir / METRICS)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be written to {workdir} ({first_line(error)}): move away what is there, or choose "
                "another --config.workdir"
            ) from error

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Keep the metrics of a step, which may still be running."""
        self._pending.append((step, metrics))

    def flush(self) -> int:
        """Wait for the steps added so far and write them; returns the steps skipped in a row until now."""
        if not self._pending:
            return 0
        steps, values = zip(*self._pending, strict=True)
        values = jax.device_get(values)
        self._pending = []
        lines = [_step_line(step, value) for step, value in zip(steps, values, strict=True)]
        lines[-1].update(self._speed(values))
        self._write(lines)
        self._show(lines)
        return int(values[-1].skipped_in_a_row)

    def restart_clock(self) -> None:
        """Leave out what happened since the last flush from the speed: evaluation, saving."""
        self._mark = time.perf_counter()
        if self._bar is not None:
            self._bar.unpause()

    def write_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Note the result of an evaluation."""
        self._validation = {"step": step, **values}
        self._write([self._validation])

    def validation_at(self, step: int) -> dict[str, float] | None:
        """Return the measures of the last evaluation, if it was made at `step`."""
        if self._validation is None or self._validation["step"] != step:
            return None
        return {name: value for name, value in self._validation.items() if name != "step"}

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.clear()
        if self._sinks:
            self._report(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def _speed(self, values: Iterable[StepMetrics]) -> dict[str, float]:
        now = time.perf_counter()
        values = list(values)
        seconds = (now - self._mark) / len(values)
        self._mark = now
        per_second = float(np.mean([value.tokens for value in values])) / seconds
        speed = {"step_seconds": seconds, f"{self._unit}_per_second": per_second}
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is not None and self._unit == "tokens":
            speed["mfu"] = per_second * self._flops_per_token / (peak * jax.device_count())
        return speed

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self.checksum = checksum_of(lines, self.checksum)
        for sink in self._sinks:
            try:
                sink.write(lines)
            except OSError as error:  # A full disk must not end a run; what is left is tried again with the next lines.
                self.message(f"warning: metrics cannot be written ({first_line(error)}); training goes on")

    def _show(self, lines: list[dict[str, Any]]) -> None:
        last = lines[-1]
        left = (self._steps - last["step"]) * last["step_seconds"]
        losses = [line["loss"] for line in lines if math.isfinite(line["loss"])]
        loss = f"loss {np.mean(losses):.4f}" if losses else "loss not finite"
        parts = [loss, f"{last[f'{self._unit}_per_second']:,.0f} {self._unit}/s", f"{last['step_seconds']:.3g} s/step"]
        if "mfu" in last:
            parts.append(f"MFU {last['mfu']:.1%}")
        if "real_tokens" in last:
            real, computed = (sum(line[name] for line in lines) for name in ("real_tokens", "computed_tokens"))
            parts.append(f"{real / computed:.0%} of tokens real")
        if last["skipped"]:
            parts.append(f"{last['skipped']} skipped")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(last["step"] - self._bar.n)
        else:
            self.message(f"step {last['step']}/{self._steps}: {', '.join(parts)}, {_duration(left)} left")


class _JsonLines:
    """Appends to a file; bytes that do not fit on the disk are kept and tried again."""

    def __init__(self, file: Path, step: int):
        """Drop the lines after `step`, which will be written again."""
        self._file, self._unwritten = file, b""
        write_whole(file, _encode(read_metrics(file, step)))

    def write(self, lines: list[dict[str, Any]]) -> None:
        self._unwritten += _encode(lines)
        with self._file.open("ab", buffering=0) as file:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]


class _Board:
    """TensorBoard events of every last line. Written here and now: `SummaryWriter` hangs once its thread has failed."""

    def __init__(self, directory: Path, step: int):
        """Begin a file of events; TensorBoard forgets earlier ones after `step`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(step=step + 1, wall_time=time.time(), session_log=start))

    def write(self, lines: list[dict[str, Any]]) -> None:
        values = dict(lines[-1])
        step = values.pop("step")
        for name, value in values.items():
            if math.isfinite(value):
                event = event_pb2.Event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._writer.write_event(event)
        self._writer.flush()


def checksum_of(lines: Iterable[Mapping[str, Any]], before: int = 0) -> int:
    """Return the CRC-32 of what lines say but for the time it took, after lines with the checksum `before`."""
    learned = [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]
    return zlib.crc32(_encode(learned), before)


def _encode(lines: list[dict[str, Any]]) -> bytes:
    finite = [{name: value if value is None else _finite(value) for name, value in line.items()} for line in lines]
    return "".join(json.dumps(line) + "\n" for line in finite).encode()


def draw_learning_curve(workdir: Path) -> Path:
    """Draw training and validation loss of a run to `learning_curve.png` in its directory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(workdir / METRICS)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    axes.set(xlabel="step", ylabel="loss", title=workdir.name)
    if axes.has_data():
        axes.legend()
    axes.grid(alpha=0.3)
    file, picture = workdir / "learning_curve.png", io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    write_whole(file, picture.getvalue())
    return file


def _step_line(step: int, metrics: StepMetrics) -> dict[str, Any]:
    counted = {}
    if metrics.real_tokens is not None and metrics.computed_tokens is not None:
        counted = {"real_tokens": int(metrics.real_tokens), "computed_tokens": int(metrics.computed_tokens)}
    return {
        "step": step,
        "loss": float(metrics.loss),
        "gradient_norm": float(metrics.gradient_norm),
        "learning_rate": float(metrics.learning_rate),
        "tokens": float(metrics.tokens),
        "skipped": int(metrics.skipped),
        **counted,
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return None
    return values if all(value is None or isinstance(value, (int, float)) for value in values.values()) else None


def _make_bar(step: int, steps: int) -> Any:
    return tqdm.tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""Metrics: files that survive kills and full disks, speed in relation to the device."""

import errno
import json

import pytest
from tensorboardX.proto import event_pb2

from lin_jax.experiment import ConfigError
from lin_jax.train import metrics
from lin_jax.train.metrics import peak_flops, read_metrics


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, flops):
    assert peak_flops(kind) == flops


def test_lines_after_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    lines = metrics._JsonLines(file, 2)
    lines.write([{"step": 3, "loss": float("nan")}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 3, "loss": None},
    ]


def make_log(workdir, step, messages, checksum=None):
    return metrics.MetricsLog(workdir, step, 9, 1.0, "validation_loss", messages.append, checksum)


def test_damaged_metrics_are_noticed_and_times_do_not_count(tmp_path):
    log = make_log(tmp_path, 0, [])
    log._write([{"step": 1, "loss": 2.5, "step_seconds": 1.0}])
    log.write_validation(1, {"validation_loss": 2.25})
    log.close()
    file, messages = tmp_path / "metrics.jsonl", []
    file.write_text(file.read_text().replace('"step_seconds": 1.0', '"step_seconds": 3.0') + '{"step": 2, "lo')
    again = make_log(tmp_path, 1, messages, log.checksum)
    assert again.checksum == log.checksum and not messages and again.validation_at(1)["validation_loss"] == 2.25
    again.close()
    for damaged in (file.read_text().replace("2.25", "2.24"), file.read_text().replace("2.5", "\x00"), ""):
        file.write_text(damaged)
        told = []
        other = make_log(tmp_path, 1, told, log.checksum)
        assert len(told) == 1 and "metrics.jsonl is not as it was at step 1" in told[0]
        assert other.validation_at(1) is None, "what is in doubt is measured again"
        other.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_is_in_the_way_of_metrics_is_named(tmp_path, name):
    if name == "tensorboard":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"metrics cannot be written to .*{name}") as error:
        make_log(tmp_path, 0, [])
    assert "\n" not in str(error.value)


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.file.close()

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.file.write(data[: self.room])
        self.room -= count
        return count


def test_lines_that_did_not_fit_are_written_later(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    lines = metrics._JsonLines(file, 0)
    opened = type(file).open
    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", lambda self, *a, **k: FullDisk(opened(self, *a, **k), 30))
        for step in (1, 2):
            with pytest.raises(OSError, match="No space"):
                lines.write([{"step": step, "loss": 1.25 * step, "name": 0.5}])
    lines.write([{"step": 3}])
    assert read_metrics(file) == [
        {"step": 1, "loss": 1.25, "name": 0.5},
        {"step": 2, "loss": 2.5, "name": 0.5},
        {"step": 3},
    ]


def test_tensorboard_gets_the_last_line(tmp_path):
    board = metrics._Board(tmp_path / "board", 4)
    board.write([{"step": 5, "loss": 2.0}, {"step": 6, "loss": 1.5, "speed": 10.0}])
    events = list(read_events(next((tmp_path / "board").iterdir())))
    start = next(event for event in events if event.HasField("session_log"))
    assert start.step == 5
    values = {v.tag: (event.step, v.simple_value) for event in events for v in event.summary.value}
    assert values == {"loss": (6, 1.5), "speed": (6, 10.0)}


def read_events(file):
    """The records of an event file: length, its checksum, data, its checksum."""
    data = file.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]

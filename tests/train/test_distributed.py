"""How a process finds its place among others, which rows it reads, and what is said of one that died."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, Sharding

import train as train_program
from lin_jax.experiment import DistributedConfig, MeshConfig
from lin_jax.train import end_notice
from lin_jax.train.distributed import find_place
from lin_jax.train.feed import Feed
from lin_jax.train.sharding import make_mesh

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07,09]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("environment", "settings", "place"),
    [
        ({}, {}, None),
        ({}, {"coordinator": "host:1234", "processes": 2, "process": 1}, (1, 2, "host:1234")),
        ({}, {"processes": 1}, None),
        (JAX, {}, (2, 3, "host:1234")),
        (JAX, {"process": 0}, (0, 3, "host:1234")),
        (SLURM, {}, (9, 16, "the address that slurm gives")),
        (SLURM, {"coordinator": "host:1234", "processes": 2, "process": 1}, (1, 2, "host:1234")),
        (OPEN_MPI, {}, (3, 4, "the address that ompi gives")),
    ],
)
def test_a_process_finds_its_place(environment, settings, place, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_place(DistributedConfig(**settings))
    assert (found and (found.process, found.processes, found.where)) == place


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, ["coordinator=h:1"], "config.distributed.processes and config.distributed.process must be set too"),
        (
            {},
            ["processes=2", "process=2"],
            "config.distributed.process must lie between 0 and processes - 1",
        ),
        ({}, ["coordinator=host"], "config.distributed.coordinator must look like HOST:PORT, but is host"),
        (JAX, ["processes=2"], "process must lie between 0 and processes - 1, but is 2 of 2"),
        ({"JAX_PROCESS_ID": "x"}, [], "$JAX_PROCESS_ID must be a number, but is 'x'"),
    ],
)
def test_wrong_places(environment, arguments, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = [f"--config.distributed.{argument}" for argument in arguments]
    assert train_program.main(["--config", "configs/quickstart.py", *given]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_what_is_said_of_a_dead_process():
    assert "another one ended" in end_notice.notice("process 1 of 2", b"\n" + end_notice.ABORTED + b"\n\nCurrent")
    assert "process 1 of 2 was killed" in end_notice.notice("process 1 of 2", b"")
    assert end_notice.notice("process 1 of 2", end_notice.ABORTED + end_notice.DONE) is None


@pytest.mark.parametrize(("end", "said"), [("os.abort()", "another one ended"), ("notice.cancel()", "")])
def test_the_program_beside_a_process_hears_its_end(end, said):
    code = f"import os; from lin_jax.train.end_notice import EndNotice; notice = EndNotice('it'); {end}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said in result.stderr and bool(said) == (result.returncode != 0)
    assert bool(said) == bool(result.stderr)


def test_rows_and_parts_of_rows_go_to_their_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    cut, labels = NamedSharding(mesh, PartitionSpec("data", "fsdp")), NamedSharding(mesh, PartitionSpec("data"))
    feed, rows = Feed({"tokens": cut, "labels": labels}, labels, 6), np.arange(6 * 16).reshape(6, 16)
    np.testing.assert_array_equal(feed.own, np.arange(6))
    batch = feed({"tokens": rows, "labels": rows[:, 0], "left": rows})
    np.testing.assert_array_equal(batch["tokens"], rows)
    np.testing.assert_array_equal(batch["labels"], rows[:, 0])
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(3, 4)}
    assert {shard.data.shape for shard in batch["labels"].addressable_shards} == {(3,)} and len(batch) == 2


def test_a_process_reads_any_rows_that_its_devices_hold(monkeypatch):
    # Devices of a process that are not neighbours in the mesh, two of which hold parts of the same rows.
    parts = [(slice(2, 4), slice(0, 2)), (slice(2, 4), slice(2, 4)), (slice(6, 8), slice(0, 2))]
    monkeypatch.setattr(Sharding, "addressable_devices_indices_map", lambda self, shape: dict(enumerate(parts)))
    made, sharding = [], NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
    whole = jax.numpy.zeros((8, 4))
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, where, part: made.extend(map(part, parts)) or whole
    )
    feed, rows = Feed({"tokens": sharding}, sharding, 8), np.arange(8 * 4).reshape(8, 4)
    np.testing.assert_array_equal(feed.own, [2, 3, 6, 7])
    feed({"tokens": rows[feed.own]})
    for found, index in zip(made, parts, strict=True):
        np.testing.assert_array_equal(found, rows[index])

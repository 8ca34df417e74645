"""Several processes as one run: how they find each other, and how all of them end when one does.

JAX's coordination service, in process 0, notices a process that sends no heartbeats any more, and aborts all others;
they would wait for it forever in their next collective. `end_notice` then says what happened.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lin_jax.settings.base import ConfigError, first_line, require
from lin_jax.settings.distributed import DistributedConfig
from lin_jax.train.end_notice import AGAIN, EndNotice

# Seconds without a heartbeat after which a process counts as dead. JAX's own 100 would exceed a minute.
HEARTBEAT_SECONDS = 30
# Seconds that processes wait for each other at the end, after having met there.
SHUTDOWN_SECONDS = 30
GRACE_SECONDS = 2
# Launchers that JAX knows and that say reliably how many processes they started. In Kubernetes JAX asks the cluster's
# API, which a process that is alone may not be allowed to.
LAUNCHERS = ("gcetpu", "gketpu", "slurm", "ompi")
# What the errors of collectives look like after another process has gone.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection reset", "Connection closed", "Socket closed")


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of a run; `options` are further arguments of `jax.distributed.initialize`."""

    process: int
    processes: int
    where: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}"


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Be one of several processes, if there are several: enter it before anything is computed.

    An error inside ends this process at once, with exit code 2 for a `ConfigError`, else 1, and within about
    `HEARTBEAT_SECONDS` all others, with a message each.

    Raises:
        ConfigError: the settings are incomplete, and there is no launcher that JAX knows.
    """
    place = find_place(config)
    if place is None or place.processes == 1:
        yield
        return
    end_notice = EndNotice(str(place))
    try:
        _join(place, config.timeout, end_notice)
        yield
        wait_for_all("end")
    except BaseException as error:
        _tell(place, error)
        if place.process == 0:
            # Its end ends all others at once: let them say what they have to say.
            time.sleep(GRACE_SECONDS)
        end_notice.cancel()
        _leave(2 if isinstance(error, ConfigError) else 1)
    jax.distributed.shutdown()
    end_notice.cancel()


def find_place(config: DistributedConfig) -> Place | None:
    """This process's place: by the settings, by JAX's environment variables, or by its launcher; None for no other.

    Raises:
        ConfigError: it is only partly set.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(config.processes, "JAX_NUM_PROCESSES")
    process = _number(config.process, "JAX_PROCESS_ID")
    values = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"config.distributed.{name}" for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return _launched()
    if processes == 1:
        return None
    require(not missing, f"{' and '.join(missing)} must be set too, or none of coordinator, processes and process")
    # Once more, for those that came from the environment.
    DistributedConfig(coordinator=coordinator, processes=processes, process=process)
    assert coordinator is not None and processes is not None and process is not None
    options = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    return Place(process, processes, coordinator, {**options, "cluster_detection_method": "deactivate"})


def agree_on(value: Any) -> Any:
    """What process 0 has, on all of them: anything that JSON holds."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    own = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(own))))


def any_process(value: bool) -> bool:
    """Return whether `value` is true in any process; all of them must ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def lost_another(error: BaseException) -> bool:
    """Whether an error of a collective, or of what waits for one, says that another process is gone."""
    return any(sign in str(error) for sign in _LOST)


def settled(result: Any) -> Any:
    """`result`, waited for where programs that do not wait for each other's results must not run at once.

    Gloo, which carries the collectives of CPUs, mixes those of several programs up, and they wait for ever.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(result)
    return result


def wait_for_all(where: str) -> None:
    """Go on when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def require_shared(directory: epath.PathLike, name: str) -> None:
    """Raise `ConfigError` unless `directory`, the value of the setting `name`, is the same for all processes."""
    if jax.process_count() == 1:
        return
    file = epath.Path(directory) / agree_on(f".seen_by_all_{time.time_ns()}")
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    wait_for_all("shared")
    seen = multihost_utils.process_allgather(np.array(file.exists()))
    if jax.process_index() == 0:
        file.unlink()
    blind = ", ".join(map(str, np.flatnonzero(~seen)))
    require(not blind, f"{name}={directory} of process 0 is not there for {blind}: give one that all hosts share")


def only_first(report: Callable[[str], None]) -> Callable[[str], None]:
    """`report` in process 0; silence in the others."""
    return report if jax.process_index() == 0 else lambda line: None


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    require(text.isdecimal(), f"${variable} must be a number, but is {text!r}")
    return int(text)


def _launched() -> Place | None:
    """The place that a launcher has given to this process; JAX has no public function that only asks for it."""
    from jax._src.clusters import ClusterEnv

    found = (kind for kind in ClusterEnv._cluster_types if kind.name in LAUNCHERS and kind.is_env_present())
    launcher = next(found, None)
    if launcher is None:
        return None
    where, options = f"the address that {launcher.name} gives", {"cluster_detection_method": launcher.name}
    return Place(launcher.get_process_id(), launcher.get_process_count(), where, options)


def _join(place: Place, seconds: int, end_notice: EndNotice) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM, which is ours to handle (`lin_jax.train.stop`).
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would abort with pages of text when time is up.
    limit = threading.Timer(seconds, _give_up, (place, seconds, end_notice))
    limit.daemon = True
    limit.start()
    jax.distributed.initialize(
        **place.options,
        initialization_timeout=seconds + 60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    limit.cancel()


def _give_up(place: Place, seconds: int, end_notice: EndNotice) -> NoReturn:
    print(
        f"error: {place} has not met all others at {place.where} within {seconds} s: see that each host runs the "
        "command, and reaches that address (config.distributed.timeout)",
        file=sys.stderr,
    )
    end_notice.cancel()
    _leave(2)


def _tell(place: Place, error: BaseException) -> None:
    text = first_line(error)
    if isinstance(error, ConfigError):
        print(f"error: {place}: {text}", file=sys.stderr)
        return
    if not lost_another(error):
        traceback.print_exception(error)
    print(f"error: {place} has to stop ({text}); {AGAIN}", file=sys.stderr)


def _leave(code: int) -> NoReturn:
    """End without JAX's farewell, in which processes wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

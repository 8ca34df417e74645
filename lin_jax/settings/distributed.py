"""Settings of the processes of a run."""

import dataclasses
import re

from lin_jax.settings.base import require, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig(Settings):
    """The processes of a run. On TPU pods, under SLURM and under Open MPI nothing is to be set."""

    coordinator: str | None = setting(
        None, "HOST:PORT at which all processes reach process 0; else $JAX_COORDINATOR_ADDRESS"
    )
    processes: int | None = setting(
        None, "number of processes, on all hosts together; else $JAX_NUM_PROCESSES", most=2**20
    )
    process: int | None = setting(None, "which one this is, counted from 0; else $JAX_PROCESS_ID", most=2**20)
    timeout: int = setting(300, "seconds in which all processes must have started", most=2**24)

    def _check(self) -> None:
        coordinator, processes, process = self.coordinator, self.processes, self.process
        require(
            coordinator is None or re.fullmatch(r".+:[1-9]\d{0,4}", coordinator) is not None,
            f"coordinator must look like HOST:PORT, but is {coordinator}",
        )
        require(processes is None or processes > 0, f"processes must be greater than 0, but is {processes}")
        require(
            process is None or 0 <= process < (processes or process + 1),
            f"process must lie between 0 and processes - 1, but is {process}"
            + (f" of {processes}" if processes else ""),
        )
        require_positive(self, "timeout")

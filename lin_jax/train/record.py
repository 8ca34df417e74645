"""What a run needs to be repeated, written to `workdir/run.json`: settings, versions, commit, devices."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from lin_jax.experiment import Config
from lin_jax.paths import write_whole
from lin_jax.settings.dictionaries import section_to_dict

RECORD = "run.json"
_PACKAGES = ("lin_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def write_run_record(directory: Path, config: Config, step: int, parameters: int) -> None:
    """Add this start to the run's record; a record that cannot be read is begun anew.

    Args:
        directory: of the record.
        config: the settings of this start.
        step: the step it begins at.
        parameters: numbers that are trained.
    """
    file = directory / RECORD
    starts = [*_earlier_starts(file), _start(step)] if step else [_start(step)]
    record = {"config": section_to_dict(config), "parameters": parameters, "starts": starts}
    write_whole(file, (json.dumps(record, indent=2) + "\n").encode())


def _earlier_starts(file: Path) -> list[Any]:
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


def _start(step: int) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """The commit of the code and whether files differ from it; None outside of a repository."""
    try:
        commit = _run_git("rev-parse", "HEAD").strip()
        return {"commit": commit, "changed": bool(_run_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=10).stdout

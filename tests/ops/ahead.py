"""Programs compiled for devices that are not here."""

import os
import subprocess
import sys


def compile_ahead(target, *options):
    """What `benchmarks.aot` prints, as a mapping; in a process of its own: a compiler serves one target a process."""
    command = [sys.executable, "-m", "benchmarks.aot", "--targets", target, *options]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(line.split(": ", 1) for line in result.stdout.splitlines())

"""The wheel holds all that the package reads."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_data_file_of_the_package_is_in_the_wheel(tmp_path):
    source, ignored = tmp_path / "source", shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "lin_jax", source / "lin_jax", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*build, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("lin_jax-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lin_jax/")}
    files = {str(path.relative_to(source)) for path in (source / "lin_jax").rglob("*") if path.is_file()}
    assert {"lin_jax/py.typed", "lin_jax/ops/linear_attention/gpu/blocks.toml"} <= files
    assert packed == files

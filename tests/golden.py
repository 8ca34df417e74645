"""Numbers computed by the paper's official code and by transformers: where they lie, and how to read them."""

import dataclasses
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures" / "golden"


def directory() -> Path:
    """$LIN_JAX_GOLDEN, or ../shared/golden beside the repository."""
    return ROOT / os.environ.get("LIN_JAX_GOLDEN", "../shared/golden")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case: a pair of .json and .npz files, or a Hugging Face directory with golden.json and golden.npz."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the file without its suffix, or of the directory; begins with the family. An id, and no more."""
        return self.path.name if self.path.is_dir() else self.path.stem

    @property
    def family(self) -> str:
        """flash, llama_train, gpt2, ..."""
        return self.name.split("__")[0]

    @property
    def _files(self) -> Path:
        return self.path / "golden.npz" if self.path.is_dir() else self.path

    @cached_property
    def info(self) -> dict:
        """Config and notes."""
        return json.loads(self._files.with_suffix(".json").read_text())

    @cached_property
    def config(self) -> dict:
        """The settings of the model: those of the official code, or config.json."""
        return json.loads((self.path / "config.json").read_text()) if self.path.is_dir() else self.info["config"]

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix`/, without it."""
        with np.load(self._files.with_suffix(".npz")) as file:
            return {k.removeprefix(prefix + "/"): file[k] for k in file.files if k.startswith(prefix + "/")}


def golden_cases() -> list[Golden]:
    """All cases: those of the golden directory, and the small ones that travel with the tests."""
    found: dict[str, Golden] = {}
    for folder in (directory(), FIXTURES):
        for path in sorted(folder.glob("*__*.npz")) if folder.is_dir() else []:
            found.setdefault(path.stem, Golden(path))
        for path in sorted(folder.glob("*__*/golden.json")) if folder.is_dir() else []:
            found.setdefault(path.parent.name, Golden(path.parent))
    return list(found.values())

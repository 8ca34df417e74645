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
    """One case: a pair of .json and .npz files, or a Hugging Face directory."""

    path: Path

    @property
    def name(self) -> str:
        """The file name without its suffix; begins with the family."""
        return self.path.stem

    @property
    def family(self) -> str:
        """flash, llama_train, gpt2, ..."""
        return self.name.split("__")[0]

    @cached_property
    def info(self) -> dict:
        """Config and notes."""
        return json.loads(self.path.with_suffix(".json").read_text())

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix`/, without it."""
        with np.load(self.path.with_suffix(".npz")) as file:
            return {k.removeprefix(prefix + "/"): file[k] for k in file.files if k.startswith(prefix + "/")}


def golden_cases() -> list[Golden]:
    """All cases: the small ones that travel with the tests, and those of the golden directory."""
    found = {}
    for folder in (FIXTURES, directory()):
        for path in sorted(folder.glob("*.npz")) if folder.is_dir() else []:
            found.setdefault(path.stem, Golden(path))
        for path in sorted(folder.glob("hf__*/golden.json")) if folder.is_dir() else []:
            found.setdefault(path.parent.name, Golden(path.parent))
    return list(found.values())

"""Small corpora, and settings that read them."""

import json
import os
from pathlib import Path

import pytest

from lin_jax.experiment import DataConfig


@pytest.fixture
def shared_data():
    """A folder of real corpora and tokenizers, where there is one."""
    golden = Path(os.environ.get("LIN_JAX_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
    folder = golden.parent / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def text_config(tmp_path):
    """Settings for corpora written as JSON Lines, one for each split."""

    def make(train: list[str], validation: list[str] = ("held out",), **settings) -> DataConfig:
        for name, documents in (("train", train), ("validation", validation)):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        paths = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("train", "validation")}
        return DataConfig(source="text", path=paths["train"], validation_path=paths["validation"], **settings)

    return make

"""Models by their names on the Hugging Face Hub."""

import re
from pathlib import Path

import huggingface_hub

from lin_jax.convert.remote import fetched
from lin_jax.paths import is_remote
from lin_jax.settings.base import ConfigError, require

# Of a directory of Hugging Face, kept in ours so that they can go back as they came.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
    "generation_config.json",
)
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PYTORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
# Seconds to wait for an answer.
_PATIENCE = 5.0


def local_path(source: str) -> Path:
    """`source` where it is a file or directory; else a copy of the remote one, or of that model of the Hub.

    Raises:
        ConfigError: it is neither, or the model cannot be had.
    """
    if is_remote(source):
        return fetched(source)
    path = Path(source).expanduser().absolute()
    if path.exists():
        return path
    a_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None
    require(a_name, f"{source} is neither a file, nor a directory, nor the name of a model on the Hugging Face Hub")
    directory = _download(source, ("config.json", *TOKENIZER_FILES, *_SAFETENSORS))
    if not any(directory.glob("*.safetensors")):
        directory = _download(source, _PYTORCH)
    return directory


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), etag_timeout=_PATIENCE))
    except Exception as error:  # of its client for HTTP, too
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name} is no directory here and cannot be had from the Hugging Face Hub ({first}): give a directory, or "
            "see to the network, the name, and for closed models to `hf auth login`"
        ) from error

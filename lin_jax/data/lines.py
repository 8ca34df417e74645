"""JSON Lines: only line feeds end lines, and a mark of byte order at the beginning is no part of the text."""

import codecs

from etils import epath

from lin_jax.settings.foreign import Fields, line_object, read_bytes

# All lines are held in memory.
MAX_BYTES = 1 << 30


def read_lines(file: epath.PathLike) -> dict[int, Fields]:
    """Return the objects of a JSONL file by the numbers of their lines, from 1 on; blank lines are left out.

    Raises:
        ConfigError: the file cannot be read, or a line holds no JSON object.
    """
    lines = read_bytes(file, MAX_BYTES).removeprefix(codecs.BOM_UTF8).split(b"\n")
    return {number: line_object(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()}

"""Prompts in a JSONL file and their completions in another, written batch by batch, so that a job can be resumed."""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tqdm

from lin_jax.decode.speed import Speed
from lin_jax.decode.text import TextGenerator
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.generate import GenerateConfig

# What a line of the output has besides the fields of the input.
ADDED = ("line", "sample", "completion", "tokens")
# Settings that change how fast texts come, but not which; how many samples there are is counted in the output.
_SPEED = ("samples", "batch_size", "prefill_chunk", "block")
# Nor do these, where only guesses are kept that plain decoding would give.
_GUESSES = ("draft", "tree", "lookup_tokens", "lookup_match", "typical_threshold", "typical_alpha")
# Lines that report progress where there is no terminal.
_LINES = 10

Record = dict[str, Any]
Report = Callable[[str], None]


def print_to_stderr(text: str) -> None:
    """A line beside the output."""
    print(text, file=sys.stderr, flush=True)


def make_job(source: Path | None, target: Path | None, model: str, *, resume: bool, overwrite: bool) -> "Job | None":
    """The job that the arguments of a program mean; None without an input. Raises `ConfigError` as `Job` does."""
    if source is None:
        alone = target is None and not resume and not overwrite
        require(alone, "--output, --resume and --overwrite are for --prompt_file")
        return None
    if target is None:
        raise ConfigError("--prompt_file needs --output OUT.jsonl")
    return Job(source, target, model, resume=resume, overwrite=overwrite)


class Job:
    """The completions of all prompts of a file.

    Every line of the output has all fields of its line of the input, and `line` (the number of that line, from 1 on),
    `sample` (from 0 on), `completion` (without the prompt) and `tokens` (generated). Until all is done its lines have
    the order in which they were completed, then that of the input. Beside an output that is not complete stands
    OUTPUT.settings, so that it is gone on with as it was begun.
    """

    def __init__(self, source: Path, target: Path, model: str = "", *, resume: bool = False, overwrite: bool = False):
        """Read and check the input; nothing is written yet.

        Args:
            source: lines `{"prompt": TEXT, ...}`.
            target: the output.
            model: its name, for the settings.
            resume: keep what the output holds of this input; it may also not exist.
            overwrite: replace the output.

        Raises:
            ConfigError: a line is wrong, or the output exists.
        """
        require(not (resume and overwrite), "--resume keeps the output and --overwrite replaces it: give one of them")
        require(source.absolute() != target.absolute(), f"--output {target} is the input: choose another")
        self.source, self.target, self._model, self._resume = source, target, model, resume
        require(not target.is_dir(), f"--output {target} is a directory: choose another")
        require(target.absolute().parent.is_dir(), f"--output {target}: there is no directory {target.parent}")
        require(
            resume or overwrite or not target.exists(),
            f"{target} exists: give --resume to go on with it, --overwrite to replace it, or another --output",
        )
        self.prompts = read_prompts(source)
        self._results = read_results(target, self.prompts) if resume and target.exists() else []

    def run(self, generator: TextGenerator, report: Report = print_to_stderr) -> None:
        """Complete what is missing; a line counts as done once all its samples are there.

        Raises:
            ConfigError: a prompt is too long, or the output was begun with other settings; nothing is written then.
        """
        settings = self._checked_settings(generator.config)
        done = _done(self._results, generator.config.samples)
        results = [result for result in self._results if result["line"] in done]
        missing = _by_length(generator, {line: self.prompts[line] for line in self.prompts.keys() - done}, self.source)
        if self._resume:
            report(f"{len(done)} of {len(self.prompts)} lines are done already")
        self._settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _write(self.target, results)
        speed = Speed()
        try:
            for result in self._complete(generator, missing, speed, report):
                results.append(result)
        except KeyboardInterrupt:
            count = len(_done(results, generator.config.samples))
            report(f"interrupted: {self.target} has {count} of {len(self.prompts)} lines; --resume goes on")
            raise
        _write(self.target, sorted(results, key=lambda result: (result["line"], result["sample"])))
        self._settings_file.unlink()
        report(f"{len(results)} completions in {self.target}" + (f": {speed}" if missing else ""))

    @property
    def _settings_file(self) -> Path:
        return self.target.with_name(f"{self.target.name}.settings")

    def _checked_settings(self, config: GenerateConfig) -> Record:
        """What decides the texts; raises `ConfigError` if an output that is gone on with was begun otherwise."""
        settings = {"checkpoint": self._model, **_deciding(config)}
        if self._resume and self._settings_file.exists():
            begun = _object(self._settings_file.read_bytes(), str(self._settings_file))
            other = [name for name in settings if begun.get(name) != settings[name]]
            told = ", ".join(f"{name}={begun.get(name)}" for name in other)
            require(not other, f"{self.target} was begun with {told}: give the same, or --overwrite")
        return settings

    def _complete(self, generator: TextGenerator, lines: list[int], speed: Speed, report: Report) -> Iterator[Record]:
        """The results of these lines, each after it was written."""
        keys = ((line, sample) for line in lines for sample in range(generator.config.samples))
        batches = generator.batches([self.prompts[line]["prompt"] for line in lines], lines)
        with (
            self.target.open("a", encoding="utf-8") as file,
            _progress(len(lines) * generator.config.samples, report) as advance,
        ):
            for batch in batches:
                *_, rows = speed.watch(batch)
                # `keys` comes second: zip takes none of it once the rows have ended.
                new = [
                    self.prompts[line] | {"line": line, "sample": sample, "completion": row.text, "tokens": row.tokens}
                    for row, (line, sample) in zip(rows, keys, strict=False)
                ]
                file.write("".join(map(_dump, new)))
                file.flush()
                advance(len(new))
                yield from new


def _deciding(config: GenerateConfig) -> Record:
    """The settings that change texts, in the form in which JSON gives them back."""
    fields = dataclasses.asdict(config)
    fields |= fields.pop("sampling")
    left_out = _SPEED + (_GUESSES if config.acceptance == "exact" else ())
    kept: Record = json.loads(json.dumps({name: value for name, value in fields.items() if name not in left_out}))
    return kept


def read_prompts(file: Path) -> dict[int, Record]:
    """The lines of an input by their numbers; empty ones are left out.

    Raises:
        ConfigError: a line is no JSON, has no prompt, or an empty one.
    """
    lines = enumerate(file.read_bytes().split(b"\n"), 1)
    prompts = {number: _prompt(line, f"{file}, line {number}") for number, line in lines if line.strip()}
    require(bool(prompts), f"{file} has no prompts")
    return prompts


def read_results(file: Path, prompts: dict[int, Record]) -> list[Record]:
    """The lines of an output, without a last one that was not written to its end.

    Raises:
        ConfigError: a line is damaged, or of another input.
    """
    *lines, _ = file.read_bytes().split(b"\n")
    return [_result(line, prompts, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _prompt(line: bytes, place: str) -> Record:
    record = _object(line, place)
    require("prompt" in record, f"{place}: there is no field 'prompt'")
    require(isinstance(record["prompt"], str), f"{place}: the prompt must be a text, but is {record['prompt']!r}")
    require(bool(record["prompt"]), f"{place}: the prompt is empty")
    taken = [name for name in ADDED if name in record]
    require(not taken, f"{place}: the output has fields {', '.join(ADDED)} of its own: rename {', '.join(taken)}")
    return record


def _result(line: bytes, prompts: dict[int, Record], place: str) -> Record:
    result = _object(line, place)
    given = {name: value for name, value in result.items() if name not in ADDED}
    numbered = isinstance(result.get("line"), int) and isinstance(result.get("sample"), int)
    same = numbered and prompts.get(result["line"]) == given
    require(same, f"{place}: is not of this --prompt_file: give the one it was made from, or another --output")
    return result


def _object(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line)
        _dump(record).encode()
    except ValueError as error:
        raise ConfigError(f"{place}: no JSON ({error})") from error
    require(isinstance(record, dict), f'{place}: must be an object such as {{"prompt": "..."}}')
    return record


def _done(results: Iterable[Record], samples: int) -> set[int]:
    """The lines all of whose samples are there."""
    found: dict[int, list[int]] = {}
    for result in results:
        found.setdefault(result["line"], []).append(result["sample"])
    return {line for line, there in found.items() if sorted(there) == list(range(samples))}


def _by_length(generator: TextGenerator, prompts: dict[int, Record], source: Path) -> list[int]:
    """The lines, those with short prompts first; raises `ConfigError` for one that is too long for the model."""
    lengths = {}
    for line, record in prompts.items():
        try:
            lengths[line] = generator.length(record["prompt"])
        except ConfigError as error:
            raise ConfigError(f"{source}, line {line}: {error}") from error
    return sorted(lengths, key=lambda line: (lengths[line], line))


def _write(file: Path, results: Iterable[Record]) -> None:
    """Replace a file as a whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text("".join(map(_dump, results)), encoding="utf-8")
    temporary.replace(file)


def _dump(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _progress(total: int, report: Report) -> Iterator[Callable[[int], Any]]:
    """A function that is told how many more are done: a bar on a terminal, a few lines elsewhere."""
    if sys.stderr.isatty():
        with tqdm.tqdm(total=total, unit="text", dynamic_ncols=True) as bar:
            yield bar.update
        return
    begin, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if math.floor(_LINES * done / total) > math.floor(_LINES * before / total):
            left = (time.perf_counter() - begin) / done * (total - done)
            report(f"{done}/{total} texts, {left:.0f} s left")

    yield advance

"""Prompts in a JSONL file and their completions in another, written batch by batch, so that a job can be resumed."""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tqdm

from lin_jax.data.lines import MAX_BYTES, read_lines
from lin_jax.decode.speed import Speed
from lin_jax.decode.text import TextGenerator
from lin_jax.paths import require_writable, write_whole
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.foreign import Fields, line_object, read_bytes, read_object
from lin_jax.settings.generate import GenerateConfig
from lin_jax.settings.typed import shown

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
            model: its name, which is noted beside the output; what it holds is compared by a checksum.
            resume: keep what the output holds of this input; it may also not exist.
            overwrite: replace the output.

        Raises:
            ConfigError: a line is wrong, or the output exists.
        """
        require(not (resume and overwrite), "--resume keeps the output and --overwrite replaces it: give one of them")
        same = source.absolute() == target.absolute() or (
            target.exists() and source.exists() and source.samefile(target)
        )
        require(not same, f"--output {target} is the input: choose another")
        self.source, self.target, self._model, self._resume = source, target, model, resume
        require_writable(target, "--output")
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
        done = _done(self._results, generator.config.samples)
        results = [result for result in self._results if result["line"] in done]
        settings = self._checked_settings(generator, is_complete=len(done) == len(self.prompts))
        missing = _by_length(generator, {line: self.prompts[line] for line in self.prompts.keys() - done}, self.source)
        if self._resume:
            report(f"{len(done)} of {len(self.prompts)} lines are done already")
        write_whole(self._settings_file, (json.dumps(settings, indent=2) + "\n").encode())
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

    def _checked_settings(self, generator: TextGenerator, *, is_complete: bool) -> Record:
        """Return what decides the texts; raise `ConfigError` if the output that is resumed was begun otherwise."""
        settings = {
            "checkpoint": self._model,
            "model": generator.fingerprint(),
            "prompt_file": hashlib.sha256("".join(map(_dump, self.prompts.values())).encode()).hexdigest()[:32],
            **_deciding(generator.config),
        }
        if not self._resume or not self.target.exists() or is_complete:
            return settings
        fix = "give the same, --overwrite, or another --output"
        require(
            self._settings_file.exists() or not self._results,
            f"{self.target} has no {self._settings_file.name} beside it, which says how it was begun: "
            "give --overwrite, or another --output",
        )
        if self._settings_file.exists():
            begun = read_object(self._settings_file)
            begun.get("checkpoint", str)
            # A model may be reached by another path. As texts, because for Python 1 equals true.
            other = [
                name
                for name in settings.keys() - {"checkpoint"}
                if _dump(begun.values.get(name)) != _dump(settings[name])
            ]
            named = {"model": "another model or tokenizer", "prompt_file": "another --prompt_file"}
            listed = ", ".join(named.get(name, f"{name}={shown(begun.values.get(name))}") for name in sorted(other))
            require(not other, f"{self.target} was begun with {listed}: {fix}")
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
    """Return the lines of an input by their numbers; empty ones are left out.

    Raises:
        ConfigError: a line is no JSON, has no prompt, or an empty one.
    """
    prompts = {number: _prompt(line) for number, line in read_lines(file).items()}
    require(bool(prompts), f"{file} has no prompts")
    return prompts


def read_results(file: Path, prompts: dict[int, Record]) -> list[Record]:
    """Return the lines of an output, without a last one that was not written to its end.

    Raises:
        ConfigError: a line is damaged, or of another input.
    """
    *lines, _ = read_bytes(file, MAX_BYTES).split(b"\n")
    return [_result(line_object(line, f"{file}, line {number}"), prompts) for number, line in enumerate(lines, 1)]


def _prompt(line: Fields) -> Record:
    line.require(bool(line.get("prompt", str)), "prompt is empty: give some text to continue")
    taken = [name for name in ADDED if name in line.values]
    line.require(not taken, f"{', '.join(taken)}: the output has fields of that name: rename it")
    return line.values


def _result(line: Fields, prompts: dict[int, Record]) -> Record:
    given = {name: value for name, value in line.values.items() if name not in ADDED}
    line.get("completion", str)
    line.require(line.get("tokens", int) >= 0, "tokens must be 0 or more")
    same = prompts.get(line.get("line", int)) == given and line.get("sample", int) >= 0
    line.require(same, "is not of this --prompt_file: give the one it was made from, or another --output")
    return line.values


def _done(results: Iterable[Record], samples: int) -> set[int]:
    """The lines all of whose samples are there."""
    found: dict[int, list[int]] = {}
    for result in results:
        found.setdefault(result["line"], []).append(result["sample"])
    return {line for line, there in found.items() if sorted(there) == list(range(samples))}


def _by_length(generator: TextGenerator, prompts: dict[int, Record], source: Path) -> list[int]:
    """Return the lines, those with short prompts first; raise `ConfigError` for what is too long, or too much."""
    lengths = {}
    for line, record in prompts.items():
        try:
            lengths[line] = generator.length(record["prompt"])
        except ConfigError as error:
            raise ConfigError(f"{source}, line {line}: {error}") from error
    if lengths:
        generator.check(max(lengths.values()), len(lengths) * generator.config.samples)
    return sorted(lengths, key=lambda line: (lengths[line], line))


def _write(file: Path, results: Iterable[Record]) -> None:
    """Replace a file as a whole."""
    write_whole(file, "".join(map(_dump, results)).encode())


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

"""Speculative decoding beside plain decoding: tokens a step and a second, bytes of state, and where the time goes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.attentions.registry import preset_attention
from lin_jax.data.lines import MAX_BYTES, read_lines
from lin_jax.data.tokenizers import Tokenizer
from lin_jax.decode.generate import Generated, Generator, Progress, read_rows
from lin_jax.decode.text import stop_ids
from lin_jax.evaluate.direct import DirectIntegration
from lin_jax.evaluate.parts import time_parts
from lin_jax.models.base import require_next_tokens
from lin_jax.models.medusa import MedusaHeads
from lin_jax.models.registry import create_model
from lin_jax.settings.base import ConfigError, require
from lin_jax.settings.foreign import Fields, read_bytes
from lin_jax.settings.generate import GenerateConfig

Method = Literal["plain", "lookup", "medusa", "direct"]
METHODS: tuple[Method, ...] = ("plain", "lookup", "medusa", "direct")
# What each method guesses with; direct is medusa with a state for every candidate.
_DRAFTS: dict[str, Any] = {"plain": "none", "lookup": "lookup", "medusa": "medusa", "direct": "medusa"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One method with one attention.

    Attributes:
        attention: its name.
        method: one of `METHODS`.
        tokens: that were generated.
        steps: passes through the model that they took, summed over texts.
        seconds: of generation, reading the prompts left out.
        state_bytes: of all layers' states of a batch.
        differing: texts that differ from those of plain decoding with the same attention.
        step_seconds: of one step of a batch, the mean.
        parts: seconds of a step and of what it is made of, see `time_parts`. Empty unless asked for.
    """

    attention: str
    method: Method
    tokens: int
    steps: int
    seconds: float
    state_bytes: int
    differing: int
    step_seconds: float
    parts: dict[str, float]

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted length, the token that is always right included."""
        return self.tokens / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Over all texts of a batch."""
        return self.tokens / self.seconds


def read_texts(file: Path, separator: str) -> list[str]:
    """Return the prompts in a file, which hold more than white space.

    Args:
        file: .jsonl with "turns" (MT-Bench, Spec-Bench; the first turn counts), "prompt" or "text" in each line; or a
            text, whose pieces between separators give a prompt each.
        separator: between the pieces of a text.

    Raises:
        ConfigError: there are none, or the file is damaged.
    """
    require(separator != "", "--separator must not be empty")
    if file.suffix == ".jsonl":
        texts = [_prompt(line) for line in read_lines(file).values()]
    else:
        try:
            texts = read_bytes(file, MAX_BYTES).decode("utf-8-sig").split(separator)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
    texts = [text.strip() for text in texts if text.strip()]
    require(bool(texts), f"{file} holds no prompts: it is empty")
    return texts


def _prompt(line: Fields) -> str:
    turns = line.get("turns", list[str], [])
    line.require("turns" not in line or bool(turns), "turns is empty")
    names = [name for name in ("prompt", "text") if name in line]
    line.require(bool(turns or names), "turns, prompt or text: one of them must be there")
    return turns[0] if turns else line.get(names[0], str)


def encode_prompts(texts: Sequence[str], tokenizer: Tokenizer, *, limit: int, longest: int) -> list[np.ndarray]:
    """Return token ids of prompts, each cut to `longest` tokens, the one that begins a text included.

    Args:
        texts: the prompts.
        tokenizer: of the model.
        limit: prompts to take; 0 takes all.
        longest: tokens of a prompt.
    """
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    taken = texts[: limit or None]
    return [np.concatenate([np.array(begin, np.int32), tokenizer.encode(text)])[:longest] for text in taken]


def compare(
    model: Any,
    prompts: Sequence[np.ndarray],
    config: GenerateConfig,
    *,
    methods: Sequence[Method] = ("plain", "medusa"),
    heads: MedusaHeads | None = None,
    stop_ids: Sequence[int] = (),
    name: str = "",
    split: bool = False,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """A row for every method, all on the same prompts. Methods take turns, batch by batch.

    Args:
        model: any language model.
        prompts: token ids.
        config: how to generate; `draft` is each method's own.
        methods: plain is always among them.
        heads: for medusa and direct.
        stop_ids: tokens that end a text.
        name: of the attention, for the rows.
        split: whether to time the parts of a step.
        report: is told of progress.

    Raises:
        ConfigError: a setting does not fit the model.
    """
    plain = ("plain", *(method for method in methods if method != "plain"))
    runs = [_Method(method, model, heads, config, stop_ids) for method in plain]
    for start in range(0, len(prompts), config.batch_size):
        for run in runs:
            run.generate(prompts[start : start + config.batch_size])
        report(f"{name}: {min(start + config.batch_size, len(prompts))}/{len(prompts)} prompts")
    return [run.row(name, runs[0].texts, prompts, split) for run in runs]


def compare_attentions(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    config: GenerateConfig,
    *,
    names: Sequence[str] = (),
    **more: Any,
) -> list[Row]:
    """`compare` for the model with each of some ablations' attention, or with its own where none are named.

    Only the attention is changed: parameters and heads are the model's, however well they suit it.
    """
    require_next_tokens(model)
    stops = sorted(set(stop_ids(tokenizer, config)))
    own = model.config.attention.kind
    models = {name: with_attention(model, name) for name in names} or {own: model}
    rows: list[Row] = []
    for name, other in models.items():
        rows += compare(other, prompts, config, heads=model.medusa, stop_ids=stops, name=name, **more)
    return rows


class _Method:
    """One method, with what it has generated so far."""

    def __init__(
        self, method: Any, model: Any, heads: MedusaHeads | None, config: GenerateConfig, stop_ids: Sequence[int]
    ):
        config = dataclasses.replace(config, draft=_DRAFTS[method])
        self.method, self._heads = method, heads if config.draft == "medusa" else None
        self.generator = Generator(model, config, heads=heads, stop_ids=stop_ids)
        if method == "direct":
            direct = DirectIntegration(model, self.generator.tree)
            self.generator = Generator(direct, config, heads=heads, stop_ids=stop_ids)
        self.texts: list[np.ndarray] = []
        self._steps, self._passes, self._seconds, self._state_bytes = 0, 0, 0.0, 0
        self._compiled: set[tuple[int, ...]] = set()

    def generate(self, prompts: Sequence[np.ndarray]) -> None:
        """Continue a batch, timed; a shape that is new is compiled first."""
        progress = self._start(prompts)
        if progress.text_BX.shape not in self._compiled:
            self._compiled.add(progress.text_BX.shape)
            self.generator.advance(progress)
            progress = self._start(prompts)
        self._state_bytes = sum(x.nbytes for x in jax.tree.leaves(progress.state))
        begin = time.perf_counter()
        while not bool(jnp.all(progress.done_B)):
            progress = self.generator.advance(progress)
        self._seconds += time.perf_counter() - begin
        self._add(read_rows(progress, [len(prompt) for prompt in prompts]))

    def _start(self, prompts: Sequence[np.ndarray]) -> Progress:
        rows = self.generator.config.batch_size
        return jax.block_until_ready(self.generator.start(prompts, [0] * len(prompts), rows=rows))

    def _add(self, rows: Sequence[Generated]) -> None:
        self.texts += [row.tokens for row in rows]
        self._steps += sum(row.steps for row in rows)
        self._passes += max(row.steps for row in rows)

    def row(self, name: str, plain: Sequence[np.ndarray], prompts: Sequence[np.ndarray], split: bool) -> Row:
        """What came out; with `split` the parts of a step are timed, on a batch of `prompts`."""
        return Row(
            attention=name,
            method=self.method,
            tokens=sum(map(len, self.texts)),
            steps=self._steps,
            seconds=self._seconds,
            state_bytes=self._state_bytes,
            differing=sum(not np.array_equal(a, b) for a, b in zip(self.texts, plain, strict=True)),
            step_seconds=self._seconds / self._passes,
            parts=self._parts(prompts) if split else {},
        )

    def _parts(self, prompts: Sequence[np.ndarray]) -> dict[str, float]:
        """Of a generator that does not stop before all is timed."""
        config = dataclasses.replace(self.generator.config, block=1)
        generator = Generator(self.generator.model, config, heads=self._heads)
        progress = self._start(prompts[: config.batch_size])
        endless = dataclasses.replace(progress, left_B=jnp.full_like(progress.left_B, 1 << 30))
        return time_parts(generator, self._heads, endless)


def with_attention(model: Any, name: str) -> Any:
    """The model with the attention of an ablation (a preset's name) and its own parameters, those that it has."""
    attention = preset_attention(model.config.attention, name)
    other = create_model(dataclasses.replace(model.config, attention=attention), nnx.Rngs(0))
    old = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    new = [(path, old.get(path, leaf)) for path, leaf in nnx.to_flat_state(nnx.state(other, nnx.Param))]
    nnx.update(other, nnx.from_flat_state(new))
    return other


def table(rows: Sequence[Row]) -> str:
    """Markdown; the speed-up is against plain decoding with the same attention."""
    lines = [
        "| attention | method | tokens a step | tokens/s | speed-up | ms a step | state MB | differing texts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {row.attention: row for row in rows if row.method == "plain"}
    for row in rows:
        speedup = row.tokens_per_second / plain[row.attention].tokens_per_second
        cells = (
            row.attention,
            row.method,
            f"{row.tokens_per_step:.2f}",
            f"{row.tokens_per_second:.0f}",
            f"{speedup:.2f}",
            f"{1e3 * row.step_seconds:.2f}",
            f"{row.state_bytes / 1e6:.2f}",
            str(row.differing),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_parts_table(rows)])


def _parts_table(rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if row.parts]
    if not timed:
        return []
    lines = ["", f"| ms of a step | method | {' | '.join(timed[0].parts)} |", "|---" * (2 + len(timed[0].parts)) + "|"]
    for row in timed:
        cells = (f"{1e3 * seconds:.2f}" for seconds in row.parts.values())
        lines.append(f"| {row.attention} | {row.method} | {' | '.join(cells)} |")
    return lines

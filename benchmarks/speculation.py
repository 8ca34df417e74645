"""Whether greedy texts depend on the draft, the batch or the type, on many prompts with a real checkpoint.

    python -m benchmarks.speculation MODEL TEXT [--prompts 300] [--tokens 64] [--batches 1 2 3 4 5 6 7 8]
        [--dtypes float32 bfloat16] [--drafts none lookup medusa] [--json FILE]

MODEL is a directory that `lin_jax.load` reads, TEXT a file whose pieces (`--separator`) are cut at random places to
make prompts. The attentions have the model's parameters: softmax with a cache, and augmented attention with groups of
`--group` tokens, a window of each of `--windows` groups, and small numbers as new parameters. Heads for the draft
medusa are new ones, which guess the model's own next token at every depth, so that some guesses are right and most are
wrong. Every text is compared with the one of the same type and attention without a draft, one prompt at a time.

With `--json FILE`, every case is written as it is done, and the same command goes on from there.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import lin_jax
from benchmarks import common
from lin_jax.decode.generate import Generated, Generator
from lin_jax.experiment import AugmentedConfig, GenerateConfig, MedusaConfig
from lin_jax.models.medusa import start_heads
from lin_jax.models.registry import create_model

DRAFTS = ("none", "lookup", "medusa")
CASE = ("dtype", "attention", "draft", "batch")
# What the result depends on beside the case.
SETTINGS = ("separator", "prompts", "longest", "tokens", "group", "seed")


def linearized(model: Any, group_size: int, local_groups: int) -> Any:
    """The model with augmented attention, all of whose branches act."""
    attention = AugmentedConfig(group_size=group_size, local="softmax", local_groups=local_groups)
    other = create_model(dataclasses.replace(model.config, attention=attention), nnx.Rngs(0))
    old = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    leaves = nnx.to_flat_state(nnx.state(other, nnx.Param))
    new = [(path, old.get(path, leaf.replace(leaf[...] + 0.02))) for path, leaf in leaves]
    nnx.update(other, nnx.from_flat_state(new))
    return other


def make_prompts(tokenizer: Any, options: argparse.Namespace) -> list[np.ndarray]:
    """Beginnings of random pieces of the text, 1 to `--longest` tokens long."""
    random = np.random.default_rng(options.seed)
    pieces = [
        piece.strip() for piece in options.text.read_text(encoding="utf-8").split(options.separator) if piece.strip()
    ]
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    prompts = []
    for number in random.integers(0, len(pieces), options.prompts):
        ids = np.concatenate([np.array(begin, np.int32), tokenizer.encode(pieces[number])])
        prompts.append(ids[: random.integers(1, options.longest + 1)])
    return prompts


def continue_all(generator: Generator, prompts: list[np.ndarray], rows: int) -> list[Generated]:
    """Every prompt with its continuation, in batches."""
    found: list[Generated] = []
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        *_, last = generator.stream(part, [0] * len(part), rows=rows)
        found += last
    return found


class Comparison:
    """The cases of one model: a draft and a batch each, beside the plain texts."""

    def __init__(self, model: Any, stop_id: int, prompts: list[np.ndarray], tokens: int):
        self.model, self.stop_id, self.prompts = model, stop_id, prompts
        self.heads = start_heads(MedusaConfig(heads=4), model, nnx.Rngs(0))
        self.config = GenerateConfig(max_new_tokens=tokens, prefill_chunk=64, block=64)
        self.generators: dict[str, Generator] = {}

    @functools.cached_property
    def plain(self) -> list[list[int]]:
        """The texts without a draft, one at a time."""
        return [row.tokens.tolist() for row in self.texts("none", 1)]

    def texts(self, draft: str, batch: int) -> list[Generated]:
        """The texts of a case."""
        if draft not in self.generators:
            config = dataclasses.replace(self.config, draft=draft)
            self.generators[draft] = Generator(self.model, config, heads=self.heads, stop_ids=[self.stop_id])
        return continue_all(self.generators[draft], self.prompts, batch)

    def run(self, draft: str, batch: int) -> dict[str, Any]:
        """What came out of a case."""
        begin = time.perf_counter()
        found = self.texts(draft, batch)
        seconds = time.perf_counter() - begin
        differing = sum(row.tokens.tolist() != text for row, text in zip(found, self.plain, strict=True))
        tokens, steps = sum(len(row.tokens) for row in found), sum(row.steps for row in found)
        return {"differing": differing, "tokens": tokens, "tokens per step": tokens / steps, "seconds": seconds}


def run_all(options: argparse.Namespace, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case in turn, but those that the file of `--json` holds."""
    asked = {name: value for name, value in vars(options).items() if name in SETTINGS}
    asked["model"] = str(options.model)
    rows = _done_before(options.json, asked)
    done = {tuple(row[name] for name in CASE) for row in rows}
    cases = list(itertools.product(options.drafts, options.batches))
    for dtype in options.dtypes:
        model, tokenizer = lin_jax.load(options.model, dtype=dtype)
        prompts = make_prompts(tokenizer, options)
        makers = {"softmax": lambda model=model: model} | {
            f"augmented, R={R}": functools.partial(linearized, model, options.group, R) for R in options.windows
        }
        for attention, make in makers.items():
            left = [case for case in cases if (dtype, attention, *case) not in done]
            comparison = Comparison(make(), tokenizer.end_id, prompts, options.tokens) if left else None
            for draft, batch in left:
                case = dict(zip(CASE, (dtype, attention, draft, batch), strict=True))
                rows.append(case | comparison.run(draft, batch))
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                common.write_json(options.json, {"machine": machine, "asked": asked, "rows": rows})
    return rows


def _done_before(path: str | None, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that was begun with the same command."""
    if path is None or not Path(path).exists():
        return []
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if found["asked"] != asked:
        raise SystemExit(f"error: {path} was begun with {found['asked']}; name another file")
    return found["rows"]


def print_rows(rows: list[dict[str, Any]], batches: list[int]) -> None:
    """Print the number of differing texts, a line for each type, attention and draft, a column for each batch."""
    lines: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["dtype"], row["attention"], row["draft"]), {})[row["batch"]] = row
    table = []
    for case, by_batch in lines.items():
        differing = [str(by_batch[batch]["differing"]) if batch in by_batch else "" for batch in batches]
        first = next(iter(by_batch.values()))
        table.append([*case, *differing, str(first["tokens"]), f"{first['tokens per step']:.2f}"])
    columns = [f"batch {batch}" for batch in batches]
    common.print_table(["dtype", "attention", "draft", *columns, "tokens", "tokens per step"], table)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that lin_jax.load reads")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are generated for each")
    parser.add_argument("--batches", type=int, nargs="+", default=list(range(1, 9)), help="prompts in a batch")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--group", type=int, default=16, help="tokens in a group of augmented attention")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2], help="groups in its local window")
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS), choices=DRAFTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args()


def main() -> None:
    """Compares and prints; the exit status is 1 if any text differs."""
    options = parse_options()
    machine = common.describe_machine()
    common.print_machine(machine)
    rows = run_all(options, machine)
    print_rows(rows, options.batches)
    raise SystemExit(int(any(row["differing"] for row in rows)))


if __name__ == "__main__":
    main()

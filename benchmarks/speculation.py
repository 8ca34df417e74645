"""Whether greedy speculation gives the very tokens of greedy decoding, on many prompts with a real checkpoint.

    python -m benchmarks.speculation MODEL TEXT [--prompts 1000] [--tokens 64] [--drafts lookup medusa] [--json FILE]

MODEL is a directory that `lin_jax.load` reads, TEXT a file whose pieces (`--separator`) are cut at random places to
make prompts. Both attentions are tried with the model's parameters: softmax with a cache, and augmented attention with
groups of `--group` tokens, whose new parameters are small numbers. Heads for the draft medusa are new ones, which
guess the model's own next token at every depth, so that some guesses are right and most are wrong.
"""

import argparse
import dataclasses
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


def linearized(model: Any, group_size: int) -> Any:
    """The model with augmented attention, all of whose branches act."""
    attention = AugmentedConfig(group_size=group_size, local="softmax", local_groups=2)
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


def compare(name: str, model: Any, stop_id: int, prompts: list[np.ndarray], options: argparse.Namespace) -> list[dict]:
    """A row for every draft."""
    heads = start_heads(MedusaConfig(heads=4), model, nnx.Rngs(0))
    config = GenerateConfig(max_new_tokens=options.tokens, prefill_chunk=64, block=64)
    plain: list[Generated] = []
    rows = []
    for draft in ("none", *options.drafts):
        generator = Generator(model, dataclasses.replace(config, draft=draft), heads=heads, stop_ids=[stop_id])
        begin = time.perf_counter()
        found = continue_all(generator, prompts, options.rows)
        plain = plain or found
        differing = sum(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(found, plain, strict=True))
        tokens, steps = sum(len(row.tokens) for row in found), sum(row.steps for row in found)
        row = {"attention": name, "draft": draft, "prompts": len(prompts), "tokens": tokens, "differing": differing}
        rows.append(row | {"tokens a step": tokens / steps, "seconds": time.perf_counter() - begin})
    return rows


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that lin_jax.load reads")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are generated for each")
    parser.add_argument("--rows", type=int, default=50, help="prompts in a batch")
    parser.add_argument("--group", type=int, default=16, help="tokens in a group of augmented attention")
    parser.add_argument("--drafts", nargs="+", default=["lookup", "medusa"], choices=["lookup", "medusa"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the result")
    return parser.parse_args()


def main() -> None:
    """Compares and prints; the exit status is 1 if any prompt differs."""
    options = parse_options()
    facts = common.describe_machine()
    common.print_machine(facts)
    model, tokenizer = lin_jax.load(options.model)
    prompts = make_prompts(tokenizer, options)
    rows: list[dict[str, Any]] = []
    for name, of_kind in {"softmax": model, "augmented": linearized(model, options.group)}.items():
        rows += compare(name, of_kind, tokenizer.end_id, prompts, options)
    table = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    common.print_table(list(rows[0]), table)
    common.write_json(options.json, {"machine": facts, "rows": rows})
    raise SystemExit(int(any(row["differing"] for row in rows)))


if __name__ == "__main__":
    main()

"""Finetuning on GLUE beside the same finetuning in PyTorch with transformers, batch by batch, on one machine.

    python -m benchmarks.glue_torch --model DIR --data GLUE --task sst2 [--config bert] [--examples 8000] [--length 64]
        [--rates 2e-5 5e-5 1e-4] [--seeds 0 1 2] [--epochs 1] [--json FILE]

DIR is a Hugging Face directory, GLUE holds SST-2/train.tsv and so on. Both start from the same parameters, those of the
new head too, take the same batches in turn, without dropout, with AdamW, decay of matrices, clipping at 1 and a linear
decay of the learning rate. Printed for each rate and seed: the largest difference of the losses of the first 50 steps,
accuracy on the validation examples, examples a second of both, their ratio, and how many tokens were no padding.
Compilation is told apart.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common
from lin_jax.convert.hugging_face import ModelWeights, write_hugging_face
from lin_jax.data.glue import GLUE
from lin_jax.experiment import Config, load_config
from lin_jax.layers.parameter import parameters_by_path
from lin_jax.train.optimizer import learning_rate_schedule
from lin_jax.train.parts import Parts, make_parts, make_step
from lin_jax.train.sharding import make_partition
from lin_jax.train.start import completed, new_state, prepare
from lin_jax.train.validation import Evaluator

COMPARED_STEPS = 50


@dataclasses.dataclass
class Side:
    """What one of the two came to."""

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


def settings(options: argparse.Namespace, rate: float, seed: int, directory: str) -> Config:
    """Return the run of configs/glue.py with a few settings of the options."""
    task = GLUE[options.task]
    source = Path(options.data) / task.directory
    if options.examples:
        target = Path(directory) / "glue" / task.directory
        target.mkdir(parents=True, exist_ok=True)
        for file in ("train.tsv", *task.validation.values()):
            lines = (source / file).read_text(encoding="utf-8").split("\n")
            kept = lines[: options.examples + (not task.header)] if file == "train.tsv" else lines
            (target / file).write_text("\n".join(kept).rstrip("\n") + "\n", encoding="utf-8")
        source = target
    return load_config(
        f"configs/glue.py:{options.config},{options.task}",
        [
            f"--config.workdir={directory}/run",
            f"--config.data.path={source.parent}",
            f"--config.data.sequence_length={options.length}",
            f"--config.data.batch_size={options.batch}",
            f"--config.data.seed={seed}",
            f"--config.train.seed={seed}",
            f"--config.train.epochs={options.epochs}",
            f"--config.optimizer.peak_learning_rate={rate}",
            f"--config.finetune.checkpoint={options.model}",
            "--config.model.dropout=0",
            *options.settings,
        ],
    )


class Ours:
    """A run of lin_jax, a batch at a time."""

    def __init__(self, config: Config):
        self.config = completed(config)
        partition = make_partition(self.config.mesh, jax.devices()[:1])
        self.tokenizer = prepare(self.config, partition).tokenizer
        self.parts: Parts = make_parts(self.config, partition)
        self.state = new_state(self.parts)
        self.step, self.compiled, self.compiling = make_step(self.parts), dict[int, Any](), 0.0
        self.evaluator = Evaluator(self.parts, self.tokenizer)

    def write(self, directory: str) -> None:
        """Write the parameters as they are in Hugging Face's form."""
        structure = self.parts.structure
        model = structure.merge(structure.join(self.state.parameters, self.state.frozen), self.state.constants)
        write_hugging_face(Path(directory), ModelWeights(self.config.model, parameters_by_path(model)), None, {})

    def learn(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
        """Return the loss of a batch, which is learned from, and the seconds that it took."""
        fed, length = self.parts.feed(batch), batch["tokens"].shape[1]
        if length not in self.compiled:
            begin = time.perf_counter()
            self.compiled[length] = self.step.lower(self.state, fed).compile()
            self.compiling += time.perf_counter() - begin
        begin = time.perf_counter()
        self.state, metrics = self.compiled[length](self.state, fed)
        jax.block_until_ready(self.state)
        return float(metrics.loss), time.perf_counter() - begin

    def measures(self) -> dict[str, float]:
        """Return the measures of the validation examples."""
        return self.evaluator.measure(self.state)


class Theirs:
    """The same in eager PyTorch."""

    def __init__(self, directory: str, ours: Ours):
        import torch
        import transformers

        # Padding is token 0 in our batches; GPT-2 looks for it.
        how: dict[str, Any] = {"pad_token_id": 0} if ours.config.model.architecture == "gpt2" else {}
        how |= {
            name: 0.0
            for name in (
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
                "resid_pdrop",
                "embd_pdrop",
                "attn_pdrop",
            )
            if name in vars(transformers.AutoConfig.from_pretrained(directory))
        }
        auto: Any = transformers.AutoModelForSequenceClassification
        self.model = auto.from_pretrained(directory, **how).train()
        optimizer = ours.config.optimizer
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for _, p in named if (p.ndim > 1) == matrix], "weight_decay": optimizer.weight_decay * matrix}
            for matrix in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon
        )
        self.schedule = learning_rate_schedule(optimizer, ours.config.train.steps)
        self.clip, self.steps, self.has_types = optimizer.gradient_clip, 0, ours.config.model.architecture == "bert"

    def logits(self, batch: dict[str, np.ndarray]) -> Any:
        """Return the logits of a batch."""
        import torch

        given = {"input_ids": batch["tokens"], "attention_mask": batch["segment_ids"]}
        given |= {"token_type_ids": batch["token_types"]} if self.has_types else {}
        return self.model(**{name: torch.from_numpy(array).long() for name, array in given.items()}).logits

    def learn(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
        """Return the loss of a batch, which is learned from, and the seconds that it took."""
        import torch
        from torch.nn import functional

        begin = time.perf_counter()
        weights, labels = torch.from_numpy(batch["weights"]), torch.from_numpy(batch["labels"])
        logits = self.logits(batch)
        if labels.is_floating_point():
            losses = (logits[:, 0] - labels) ** 2
        else:
            losses = functional.cross_entropy(logits, labels.long(), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedule(self.steps))
        self.optimizer.step()
        self.steps += 1
        return loss.item(), time.perf_counter() - begin

    def measures(self, ours: Ours) -> dict[str, float]:
        """Return the measures of the validation examples."""
        import torch

        self.model.eval()
        found = []
        with torch.no_grad():
            for batch in ours.parts.task.validation_batches("", ours.tokenizer, ours.parts.feed.own):
                kept = {name: batch[name] for name in ("labels", "examples")}
                found.append({"logits": self.logits(batch).numpy(), **kept})
        rows = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        return ours.parts.task.values(rows, ours.tokenizer)


def compare(options: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """Return what both came to."""
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(settings(options, rate, seed, directory))
        start = Path(directory) / "start"
        start.mkdir()
        ours.write(str(start))
        theirs = Theirs(str(start), ours)
        sides, real, computed, learned = {"lin_jax": Side(), "torch": Side()}, 0, 0, 0
        batches = ours.parts.task.training_batches(ours.tokenizer, ours.parts.feed.own)
        try:
            for _ in range(ours.config.train.steps):
                batch = next(batches)
                for name, learn in (("lin_jax", ours.learn), ("torch", theirs.learn)):
                    loss, seconds = learn(batch)
                    sides[name].losses.append(loss)
                    sides[name].seconds += seconds
                real += int((batch["segment_ids"] * batch["weights"][:, None]).sum())
                computed += batch["tokens"].size
                learned += int(batch["weights"].sum())
        finally:
            batches.close()
        sides["lin_jax"].measures, sides["torch"].measures = ours.measures(), theirs.measures(ours)
    pairs = zip(sides["lin_jax"].losses[:COMPARED_STEPS], sides["torch"].losses[:COMPARED_STEPS], strict=True)
    return {
        "rate": rate,
        "seed": seed,
        "steps": ours.config.train.steps,
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "best_by": ours.parts.task.best_by,
        "real_tokens": real / computed,
        "compiling": ours.compiling,
        "ratio": sides["torch"].seconds / sides["lin_jax"].seconds,
        **{
            name: {"seconds": side.seconds, "examples_per_second": learned / side.seconds, **side.measures}
            for name, side in sides.items()
        },
    }


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="GLUE")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--config", default="bert", help="the model of configs/glue.py")
    parser.add_argument("--examples", type=int, default=0, help="training examples; 0 takes all")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="*", default=[], help="further --config.section.field=value")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    facts = common.describe_machine()
    common.print_machine(facts)
    found = []
    for rate in options.rates:
        for seed in options.seeds:
            row = compare(options, rate, seed)
            found.append(row)
            measured = {name: f"{row[name][row['best_by']]:.4f}" for name in ("lin_jax", "torch")}
            speeds = {name: f"{row[name]['examples_per_second']:.1f}" for name in ("lin_jax", "torch")}
            print(
                f"rate {rate:g} seed {seed}: {row['steps']} steps, losses within {row['largest_difference']:.1e}; "
                f"{row['best_by']} {measured['lin_jax']} here, {measured['torch']} in PyTorch; examples/s "
                f"{speeds['lin_jax']} here, {speeds['torch']} in PyTorch, ratio {row['ratio']:.2f}; seconds "
                f"{row['lin_jax']['seconds']:.0f} and {row['torch']['seconds']:.0f}, compiling "
                f"{row['compiling']:.0f}; {row['real_tokens']:.0%} of tokens real",
                flush=True,
            )
    common.write_json(options.json, {"machine": facts, "rows": found})


if __name__ == "__main__":
    main()

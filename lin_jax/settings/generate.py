"""Settings of generation."""

import dataclasses
from typing import Literal

from lin_jax.settings.base import require, require_at_least_zero, require_paths, require_positive, section, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How the next token is chosen from the model's logits; applied in the order of the fields."""

    repetition_penalty: float = setting(
        1.0, "logits of tokens that occurred are divided (positive ones) or multiplied (negative ones) by it"
    )
    temperature: float = setting(0.0, "divisor of the logits; 0 takes the likeliest token")
    top_k: int = setting(0, "keep the likeliest so many tokens; 0 keeps all", most=2**24)
    top_p: float = setting(1.0, "keep the fewest likeliest tokens whose probabilities reach this sum")
    min_p: float = setting(0.0, "keep tokens with at least this part of the likeliest token's probability")
    seed: int = setting(
        0,
        "seed; with the place of a prompt (its line) and the number of a sample it decides all random numbers",
        most=2**32 - 1,
    )

    def _check(self) -> None:
        require_at_least_zero(self, "temperature", "top_k", "seed")
        require_positive(self, "repetition_penalty")
        require(0 < self.top_p <= 1, f"top_p must lie above 0 and up to 1, but is {self.top_p}")
        require(0 <= self.min_p <= 1, f"min_p must lie between 0 and 1, but is {self.min_p}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """How texts are continued."""

    max_new_tokens: int = setting(128, "tokens after which a text ends", most=2**24)
    samples: int = setting(1, "continuations of each prompt", most=2**20)
    sampling: SamplingConfig = section(SamplingConfig, "choice of the next token")
    stop: tuple[str, ...] = setting((), "strings before which a text ends")
    stop_tokens: tuple[str, ...] = setting((), "tokens that end a text, besides the tokenizer's own")
    draft: Literal["none", "lookup", "medusa"] = setting(
        "none",
        "what guesses tokens that the model then verifies in one step: none; lookup: what followed the last tokens "
        "where they occurred before; medusa: the model's Medusa heads",
    )
    tree: str = setting(
        "mc_sim_7b_63",
        "draft=medusa: the tree of guesses: a published one (mc_sim_7b_63, vicuna_7b_stage2), or a .json file with a "
        "list of paths, such as the tree.json that a run of heads writes",
    )
    lookup_tokens: int = setting(7, "draft=lookup: tokens that are guessed at a time", most=1024)
    lookup_match: int = setting(3, "draft=lookup: most tokens that are compared to find where they occurred", most=64)
    acceptance: Literal["exact", "typical"] = setting(
        "exact",
        "which guesses are kept: exact: those that are the very tokens of plain decoding, sampled or not; typical: "
        "also others that the model finds likely enough (Medusa's, needs temperature > 0)",
    )
    typical_threshold: float = setting(0.09, "acceptance=typical: probability that always suffices")
    typical_alpha: float = setting(0.3, "acceptance=typical: or this times exp(-entropy)")
    beams: int = setting(
        1, "beam search: texts that are kept at each token, of which the best one is the result; 1: none", most=1024
    )
    length_penalty: float = setting(
        1.0, "beam search: scores are divided by tokens ** length_penalty, so that more favours longer texts"
    )
    batch_size: int = setting(8, "texts that are continued at a time", most=2**16)
    prefill_chunk: int = setting(512, "tokens of a prompt that are read at a time", most=2**20)
    block: int = setting(16, "steps between looks at what came out, for streaming and stop strings", most=2**16)

    def _check(self) -> None:
        require_positive(self, "max_new_tokens", "samples", "lookup_tokens", "lookup_match")
        require_positive(self, "batch_size", "prefill_chunk", "block", "beams")
        require_at_least_zero(self, "typical_threshold", "typical_alpha")
        require_paths(self, "tree")
        require(all(self.stop), "stop must not hold the empty string")
        plain = self.draft == "none" and self.samples == 1 and self.sampling == SamplingConfig(seed=self.sampling.seed)
        require(
            self.beams == 1 or plain,
            f"beams={self.beams} gives the best text alone, and has neither samples, temperature, repetition_penalty "
            "nor draft: leave them out",
        )
        require(
            self.acceptance == "exact" or self.sampling.temperature > 0,
            "acceptance=typical compares probabilities, which temperature=0 does not have: give a temperature",
        )

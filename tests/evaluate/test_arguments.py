"""The command line of eval.py: what a task does not use is refused, what cannot be written is found out first."""

import json
import os

import pytest

import eval as program
from lin_jax.evaluate.arguments import output_file, parse
from lin_jax.evaluate.tasks.base import Outcome
from lin_jax.evaluate.tasks.perplexity import PerplexityTask
from lin_jax.settings.base import ConfigError

RUN = ["--checkpoint", "run"]
SPECULATIVE = [*RUN, "--task", "speculative", "--prompts", "p.txt"]


def test_options_have_their_defaults():
    known, overrides = parse("", [*RUN, "--config.data.seed=1"])
    assert (known.task, known.batch_size, known.window, known.stride, known.path) == ("perplexity", 8, None, None, None)
    assert overrides == ["--config.data.seed=1"] and not hasattr(known, "limit")
    known, _ = parse("", [*SPECULATIVE, "--batch_size", "3"])
    assert (known.batch_size, known.limit, known.longest, known.methods) == (3, 80, 512, ["plain", "medusa"])
    assert (known.tree, known.attention, known.split, known.max_new_tokens) == ("mc_sim_7b_63", [], False, 128)


def test_the_spelling_of_earlier_versions_still_works():
    known, _ = parse("", [*SPECULATIVE, "--batch-size", "3", "--max-new-tokens", "5"])
    assert (known.batch_size, known.max_new_tokens) == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--prompts", "p"], "--prompts: for --task speculative, not perplexity"),
        ([*RUN, "--tree", "t", "--limit", "1"], "--limit, --tree: for --task speculative"),
        ([*SPECULATIVE, "--window", "8"], "--window: for --task perplexity, not speculative"),
        ([*SPECULATIVE, "--methods", "lookup", "--tree", "t"], "--tree is for --methods medusa and direct"),
        ([*SPECULATIVE[:-1], "p.jsonl", "--separator", "#"], "--separator is for prompts in a text"),
        ([*SPECULATIVE, "--config.data.seed=1"], "unknown argument --config.data.seed=1"),
        ([*RUN, "--task", "speculative"], "needs --prompts FILE"),
        ([*RUN, "--window", "1000000000000"], "--window: must lie between 1 and 16777216, but is 1000000000000"),
        ([*RUN, "--window", "0"], "--window: must lie between 1 and"),
        ([*RUN, "--stride", "-1"], "--stride: must lie between 1 and"),
        ([*RUN, "--batch_size", "1000000000"], "must lie between 1 and 65536"),
        ([*RUN, "--batch_size", "0"], "must lie between 1 and 65536"),
        ([*RUN, "--batch_size", "two"], "invalid whole number value: 'two'"),
        ([*SPECULATIVE, "--limit", "-1"], "--limit: must lie between 0 and"),
        ([*SPECULATIVE, "--longest", "0"], "--longest: must lie between 1 and"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message, capsys):
    assert program.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_the_record_is_written_in_the_run(tmp_path, monkeypatch):
    def place(checkpoint, *more):
        return str(output_file(parse("", ["--checkpoint", str(checkpoint), *more])[0]))

    run = tmp_path / "run"
    (run / "checkpoints" / "12").mkdir(parents=True)
    assert place(run) == str(run / "evaluation.json")
    # A checkpoint's own directory is left as it was saved.
    assert place(run / "checkpoints" / "12") == str(run / "evaluation-12.json")
    # A name on the Hub has no directory here.
    assert place("someone/model") == "evaluation.json"
    assert place(run, "--output", str(tmp_path / "o.json")) == str(tmp_path / "o.json")
    os.mkfifo(tmp_path / "pipe")
    for output, message in (("absent/o.json", "no directory"), ("run", "is a directory"), ("pipe", "is not a file")):
        with pytest.raises(ConfigError, match=message):
            place(run, "--output", str(tmp_path / output))


def test_what_cannot_be_written_is_found_out_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(known, overrides):
        measured.append(known)
        return Outcome("the text", {"a": 1}, {".tsv": "more"})

    monkeypatch.setattr(PerplexityTask, "measure", measure)
    (tmp_path / "run").mkdir()
    arguments = ["--checkpoint", str(tmp_path / "run")]
    assert program.main([*arguments, "--output", str(tmp_path / "results/today/e.json")]) == 2 and not measured
    assert "there is no directory" in capsys.readouterr().err
    assert program.main(arguments) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == {"a": 1}
    assert (tmp_path / "run" / "evaluation.tsv").read_text() == "more"
    assert capsys.readouterr().out.startswith("the text\nwritten to ")


def test_what_was_measured_is_printed_even_if_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    def measure(known, overrides):
        (tmp_path / "run").rmdir()
        (tmp_path / "run").write_text("no directory any more")
        return Outcome("the text", {})

    monkeypatch.setattr(PerplexityTask, "measure", measure)
    (tmp_path / "run").mkdir()
    assert program.main(["--checkpoint", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "the text\n" and printed.err.startswith("error: ") and printed.err.count("\n") == 1

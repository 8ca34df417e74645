"""generate.py as a user calls it: texts that stream, jobs that resume, conversations, and wrong input in one line."""

import contextlib
import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx

import generate as program
import lin_jax
from lin_jax.convert.medusa import write_heads
from lin_jax.data.tokenizers import BytesTokenizer, LibraryTokenizer
from lin_jax.decode.chat import Chat, ChatTemplate
from lin_jax.decode.generate import _rounded, generate_tokens
from lin_jax.decode.jsonl import Job
from lin_jax.decode.speed import Speed
from lin_jax.decode.stream import stream_texts
from lin_jax.decode.text import TextGenerator, make_config
from lin_jax.experiment import (
    AugmentedConfig,
    Config,
    ConfigError,
    GenerateConfig,
    LlamaConfig,
    MedusaConfig,
    SamplingConfig,
    SoftmaxConfig,
)
from lin_jax.models.medusa import MedusaHeads
from lin_jax.models.registry import create_model
from lin_jax.train.saved_model import save_model
from lin_jax.train.workdir import tokenizer_directory
from tests.models.test_t5 import make_config as make_t5

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = LlamaConfig(
    vocabulary_size=257,
    width=16,
    depth=1,
    heads=2,
    key_value_heads=2,
    head_size=8,
    feed_forward_size=16,
    positions=48,
    attention=AugmentedConfig(group_size=8, convolution=4),
)
SOFTMAX = dataclasses.replace(MODEL, attention=SoftmaxConfig())
SAMPLED = {"temperature": 1.0, "max_new_tokens": 12, "block": 4, "prefill_chunk": 8, "batch_size": 3}
FLAGS = [text for name, value in SAMPLED.items() for text in (f"--{name}", str(value))]
CHAT_FLAGS = FLAGS[: FLAGS.index("--batch_size")]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} </s>{% endfor %}{{ 'a' if add_generation_prompt }}"


def save(directory, config, tokenizer):
    model = create_model(config, nnx.Rngs(0))
    # Far from uniform, so that samples of an untrained model have likely and unlikely tokens.
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    parameters["embedding"] = 20 * parameters["embedding"]
    save_model(str(directory), parameters, Config(model=config), tokenizer)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Runs: augmented, softmax with 48 positions, augmented with heads that are too few, and with those of another."""
    root = tmp_path_factory.mktemp("models")
    save(root / "augmented", MODEL, BytesTokenizer())
    save(root / "softmax", SOFTMAX, BytesTokenizer())
    save(root / "source", make_t5("augmented", vocabulary_size=257), BytesTokenizer())
    for name, width in (("few", 16), ("other", 24)):
        shutil.copytree(root / "augmented", root / name)
        write_heads(root / name, MedusaHeads(MedusaConfig(heads=2), width, 257, rngs=nnx.Rngs(0)))
    return root


@pytest.fixture(scope="module")
def loaded(models):
    return lin_jax.load(models / "augmented")


def write_prompts(file, count=7):
    records = [{"id": f"é{i}", "prompt": "ab" * (3 + 5 * i % 7), "nested": {"a": [i]}} for i in range(count)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def refused(arguments, capsys):
    """The one line that says what is wrong."""
    assert program.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_standard_output_is_the_texts_alone(models, loaded, capsys):
    prompts = ["Once upon", "a time é"]
    arguments = ["--checkpoint", str(models / "augmented"), "--samples", "2", *FLAGS, "--prompt", *prompts]
    assert program.main(arguments) == 0
    texts = lin_jax.generate(*loaded, prompts, samples=2, **SAMPLED)
    printed = capsys.readouterr()
    assert printed.out == "\n".join(text + "\n" for text in texts) and len(set(texts)) == 4
    assert printed.err.startswith("48 tokens in ") and printed.err.count("\n") == 1


@pytest.mark.parametrize("flags", [FLAGS, ["--beams", "3", "--max_new_tokens", "12"]])
def test_of_a_source_its_target_alone_is_written(models, tmp_path, capsys, flags):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = write_prompts(source, 5)
    told = ["--checkpoint", str(models / "source"), *flags]
    assert program.main([*told, "--prompt_file", str(source), "--output", str(target)]) == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    capsys.readouterr()
    assert program.main([*told, "--prompt", *(record["prompt"] for record in records)]) == 0
    assert capsys.readouterr().out == "\n".join(line["completion"] + "\n" for line in lines)


def test_pieces_hold_whole_characters_and_come_early(loaded):
    config = make_config({**SAMPLED, "max_new_tokens": 40})
    pieces = list(stream_texts(TextGenerator(*loaded, config), ["é"], Speed()))
    [text] = lin_jax.generate(*loaded, ["é"], **{**SAMPLED, "max_new_tokens": 40})
    # Some of the ten blocks of steps end inside a character, and give nothing.
    assert "".join(pieces) == text + "\n" and len(pieces) == 8
    assert "\ufffd" in text and not any(piece.endswith("\ufffd") for piece in pieces[:-2])


def test_a_job_writes_its_lines_in_order(models, loaded, tmp_path, capsys):
    records = write_prompts(tmp_path / "in.jsonl")
    arguments = ["--prompt_file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert program.main(["--checkpoint", str(models / "augmented"), *FLAGS, *arguments]) == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # The lines' numbers, from 1 on, decide their random numbers; a text before the first takes 0.
    texts = lin_jax.generate(*loaded, ["a", *(record["prompt"] for record in records)], **SAMPLED)[1:]
    assert [result["prompt"] + result["completion"] for result in found] == texts
    assert [(result["line"], result["sample"]) for result in found] == [(number, 0) for number in range(1, 8)]
    assert all(record.items() <= result.items() for record, result in zip(records, found, strict=True))
    printed = capsys.readouterr()
    assert not printed.out and "7 completions in" in printed.err and "s left" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


class Interrupted(TextGenerator):
    """Ctrl-C in the third batch."""

    def batches(self, prompts, numbers=None):
        for number, batch in enumerate(super().batches(prompts, numbers)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch


def test_a_resumed_job_gives_the_file_of_an_undisturbed_one(loaded, tmp_path):
    write_prompts(tmp_path / "in.jsonl")
    config, told = make_config({**SAMPLED, "samples": 2}), []
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    Job(tmp_path / "in.jsonl", whole).run(TextGenerator(*loaded, config), told.append)
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path / "in.jsonl", cut).run(Interrupted(*loaded, config), told.append)
    kept = cut.read_text().splitlines()
    assert len(kept) == 6 and set(kept) < set(whole.read_text().splitlines())
    assert told[-1] == f"interrupted: {cut} has 3 of 7 lines; --resume goes on"
    # Other settings would mix; those that change no text may change.
    other = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, temperature=0.5))
    with pytest.raises(ConfigError, match="was begun with temperature=1.0: give the same, --overwrite"):
        Job(tmp_path / "in.jsonl", cut, resume=True).run(TextGenerator(*loaded, other))
    config = dataclasses.replace(config, batch_size=2, draft="lookup")
    # One sample of a line alone, and a line that was cut off.
    cut.write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20])
    Job(tmp_path / "in.jsonl", cut, resume=True).run(TextGenerator(*loaded, config), told.append)
    assert "2 of 7 lines are done already" in told
    assert cut.read_bytes() == whole.read_bytes() and len(whole.read_text().splitlines()) == 14
    # Nothing is left to do, so no batch is asked for.
    Job(tmp_path / "in.jsonl", cut, resume=True).run(Interrupted(*loaded, config), told.append)
    assert cut.read_bytes() == whole.read_bytes() and told[-1] == f"14 completions in {cut}"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "whole.jsonl", "cut.jsonl"}


def byte_level():
    """A tokenizer of bytes and </s>."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(["</s>", *sorted(alphabet)])}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A run whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("talker") / "run"
    backend = byte_level()
    files = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=TEMPLATE)
    save(directory, MODEL, LibraryTokenizer(backend, end_id=0, begin_id=None))
    files.save_pretrained(tokenizer_directory(str(directory)) / "hugging_face")
    return directory


def test_a_conversation_is_written_by_the_template(talker):
    model, tokenizer = lin_jax.load(talker)
    config = make_config(SAMPLED)
    with contextlib.closing(ChatTemplate(talker / "tokenizer" / "hugging_face")) as template:
        chat = Chat(TextGenerator(model, tokenizer, config), template)
        first = "".join(chat.say("Hi"))
        second = "".join(chat.say("</s>Why?"))

    def answer(*parts):
        """By token ids: 0 wherever </s> stands, which the template and the user write alike."""
        texts = "".join(parts).split("</s>")
        ids = np.concatenate([np.append(0, tokenizer.encode(text)) for text in texts])[1:].astype(np.int32)
        [row] = generate_tokens(model, config, [ids], stop_ids=[0])
        return tokenizer.decode(row.tokens).removesuffix("</s>")

    assert first == answer("u Hi </s>a") != ""
    assert second == answer("u Hi </s>", f"a {first} </s>", "u </s>Why? </s>a")
    assert chat.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "</s>Why?"},
        {"role": "assistant", "content": second},
    ]


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(talker, capsys, monkeypatch):
    said = iter(["Hi", KeyboardInterrupt(), "", "More", EOFError()])

    def read(mark):
        given = next(said)
        if isinstance(given, BaseException):
            raise given
        return given

    reply, calls = TextGenerator.reply, []

    def interrupted(self, tokens):
        calls.append(tokens)
        for number, row in enumerate(reply(self, tokens)):
            if number == 1 and len(calls) == 1:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(TextGenerator, "reply", interrupted)
    assert program.main(["--checkpoint", str(talker), "--chat", *CHAT_FLAGS]) == 0
    first, empty, second, end = capsys.readouterr().out.split("\n")
    assert first and second and not empty and not end and len(calls) == 2
    assert lin_jax.load(talker)[1].decode(calls[1]) == f"u Hi </s>a {first} </s>u More </s>a"


def bad_lines(tmp_path):
    """Inputs and an output that exist, and what is wrong with each."""
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"\n')
    (tmp_path / "field.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n')
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "taken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "a" * 40}) + "\n")
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "null.jsonl").write_text('{"prompt": null}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "a\\ud800"}\n')
    (tmp_path / "deep.jsonl").write_text('{"prompt": "a", "b": ' + "[" * 1000 + "]" * 1000 + "}\n")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "wide.json").write_text(json.dumps([[rank] for rank in range(20_000)]))
    (tmp_path / "deep.json").write_text(json.dumps([[0] * depth for depth in range(1, 500)]))
    (tmp_path / "rank.json").write_text("[[0], [1000000000]]")
    (tmp_path / "begun.jsonl").write_text('{"prompt": "a", "line": 1, "sample": 1, "completion": "", "tokens": 1}\n')
    (tmp_path / "made.jsonl").write_text('{"prompt": "b", "line": 1, "sample": 0, "completion": "", "tokens": 1}\n')


BAD = {
    "beams must be greater than 0, but is 0": ["augmented", "--prompt", "a", "--beams", "0"],
    "beams=2 gives the best text alone": ["source", "--prompt", "a", "--beams", "2", "--samples", "2"],
    "length_penalty is for beams=2 and more": ["source", "--prompt", "a", "--length_penalty", "2"],
    "medusa needs a model with Medusa heads": ["source", "--prompt", "a", "--draft", "medusa"],
    "prompt 0 is empty": ["augmented", "--prompt", ""],
    "52 tokens are more than the positions=48": ["softmax", "--prompt", "a" * 40, "--max_new_tokens", "12"],
    "4 guesses deep, but the model has 2 Medusa heads": ["few", "--prompt", "a", "--draft", "medusa"],
    "the Medusa heads are of another model": ["other", "--prompt", "a", "--draft", "medusa"],
    "needs a model with Medusa heads": ["augmented", "--prompt", "a", "--draft", "medusa"],
    "temperature must be 0 or more, but is -1.0": ["augmented", "--prompt", "a", "--temperature", "-1"],
    "invalid float value: 'hot'": ["augmented", "--prompt", "a", "--temperature", "hot"],
    "invalid choice: 'oak'": ["augmented", "--prompt", "a", "--draft", "oak"],
    "no token '<nothing>'": ["augmented", "--prompt", "a", "--stop_tokens", "<nothing>"],
    "absent is neither a file, nor a directory": ["{}/absent", "--prompt", "a"],
    "one of the arguments --prompt --prompt_file --chat is required": ["augmented"],
    'unexpected argument "--warmth=1"': ["augmented", "--prompt", "a", "--warmth=1"],
    "--output, --resume and --overwrite are for --prompt_file": ["augmented", "--prompt", "a", "--output", "x.jsonl"],
    "--prompt_file needs --output": ["augmented", "--prompt_file", "{}/good.jsonl"],
    "broken.jsonl, line 3 is not JSON": ["augmented", "--prompt_file", "{}/broken.jsonl"],
    "field.jsonl, line 2: prompt is missing": ["augmented", "--prompt_file", "{}/field.jsonl"],
    "none.jsonl has no prompts": ["augmented", "--prompt_file", "{}/none.jsonl"],
    "empty.jsonl, line 1: prompt is empty": ["augmented", "--prompt_file", "{}/empty.jsonl"],
    "list.jsonl, line 1: the line must be an object": ["augmented", "--prompt_file", "{}/list.jsonl"],
    "number.jsonl, line 1: prompt must be text, but is 3": ["augmented", "--prompt_file", "{}/number.jsonl"],
    "taken.jsonl, line 1": ["augmented", "--prompt_file", "{}/taken.jsonl"],
    "long.jsonl, line 2: 52 tokens are more": ["softmax", "--prompt_file", "{}/long.jsonl", "--max_new_tokens", "12"],
    "absent.jsonl": ["augmented", "--prompt_file", "{}/absent.jsonl"],
    "made.jsonl exists: give --resume": ["augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}/made.jsonl"],
    "made.jsonl, line 1: is not of this --prompt_file": [
        *("augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}/made.jsonl", "--resume")
    ],
    "there is no directory": ["augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}/absent/made.jsonl"],
    "is a directory": ["augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}", "--overwrite"],
    "is the input": ["augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}/good.jsonl", "--overwrite"],
    "chat needs a tokenizer in Hugging Face's form": ["augmented", "--chat"],
    "null.jsonl, line 1: prompt is missing": ["augmented", "--prompt_file", "{}/null.jsonl"],
    "half.jsonl, line 1: a text holds half of a surrogate pair": ["augmented", "--prompt_file", "{}/half.jsonl"],
    "deep.jsonl, line 1: arrays and objects are nested": ["augmented", "--prompt_file", "{}/deep.jsonl"],
    "latin.jsonl, line 1 is not UTF-8": ["augmented", "--prompt_file", "{}/latin.jsonl"],
    "pipe.jsonl is not a file": ["augmented", "--prompt_file", "{}/pipe.jsonl"],
    "/dev/zero is not a file": ["augmented", "--prompt_file", "/dev/zero"],
    "begun.jsonl has no begun.jsonl.settings beside it": [
        *("augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}/begun.jsonl", "--resume")
    ],
    "pipe.jsonl is not a file: give another": [
        *("augmented", "--prompt_file", "{}/good.jsonl", "--output", "{}/pipe.jsonl", "--overwrite")
    ],
    "prompt 0 is not UTF-8": ["augmented", "--prompt", "a\udcff"],
    "pipe.json is not a file": ["few", "--prompt", "a", "--draft", "medusa", "--tree", "{}/pipe.json"],
    "wide.json: a tree has at most 4096 nodes": [
        *("few", "--prompt", "a", "--draft", "medusa", "--tree", "{}/wide.json")
    ],
    "deep.json is 499 guesses deep": ["few", "--prompt", "a", "--draft", "medusa", "--tree", "{}/deep.json"],
    "rank.json takes guess 1000000001, but there are 257 tokens": [
        *("few", "--prompt", "a", "--draft", "medusa", "--tree", "{}/rank.json")
    ],
    "max_new_tokens must be at most": ["augmented", "--prompt", "a", "--max_new_tokens", "1000000000000"],
    "samples must be at most": ["augmented", "--prompt", "a", "--samples", "1000000000"],
    "batch_size must be at most": ["augmented", "--prompt", "a", "--batch_size", "1000000000"],
    "lookup_tokens must be at most": [
        *("augmented", "--prompt", "a", "--draft", "lookup", "--lookup_tokens", "100000")
    ],
    "samples must be greater than 0, but is 0": ["augmented", "--prompt", "a", "--samples", "0"],
    "block must be greater than 0, but is -1": ["augmented", "--prompt", "a", "--block", "-1"],
    "GB: lower batch_size, max_new_tokens": [
        *("augmented", "--prompt", "a", "--samples", "65536", "--batch_size", "65536", "--max_new_tokens", "16777216")
    ],
    "tree is for draft=medusa": ["augmented", "--prompt", "a", "--tree", "vicuna_7b_stage2"],
    "lookup_tokens, lookup_match is for draft=lookup": [
        *("augmented", "--prompt", "a", "--lookup_tokens", "7", "--lookup_match", "3")
    ],
    "typical_alpha is for acceptance=typical": ["augmented", "--prompt", "a", "--typical_alpha", "0.1"],
    "acceptance changes nothing without guesses": [
        *("augmented", "--prompt", "a", "--acceptance", "typical", "--temperature", "1")
    ],
    "top_p changes nothing at temperature=0": ["augmented", "--prompt", "a", "--top_p", "0.9", "--top_k", "0"],
    "batch_size is not for --chat": ["augmented", "--chat", "--batch_size", "2"],
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_is_refused_in_one_line(models, tmp_path, capsys, message):
    bad_lines(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    name, *arguments = (text.format(tmp_path) for text in BAD[message])
    if "--prompt_file" in arguments and "--output" not in arguments and message != "--prompt_file needs --output":
        arguments += ["--output", str(tmp_path / "new.jsonl")]
    assert message in refused(["--checkpoint", models / name, *arguments], capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_chat_needs_a_template(talker, tmp_path, capsys):
    shutil.copytree(talker, tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "hugging_face" / "chat_template.jinja").unlink()
    assert "chat needs a chat template, but" in refused(["--checkpoint", tmp_path / "run", "--chat"], capsys)


@pytest.mark.parametrize(
    ("template", "seconds", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", 1, "not end in 1 seconds"),
        ("{{ 'a' * 100000000000 }}", 1, "too much memory"),
        ("{{ 'a' * 5000000 }}", 100, "it gives 5000000 tokens"),
        ("{{ raise_exception('no such role') }}", 100, "no such role"),
        ("{{ 1 // 0 }}", 100, "zero"),
    ],
    ids=["endless", "memory", "tokens", "refuses", "raises"],
)
def test_a_template_that_does_not_end_or_explodes_is_refused(talker, tmp_path, template, seconds, message):
    files = tmp_path / "tokenizer"
    shutil.copytree(talker / "tokenizer" / "hugging_face", files)
    (files / "chat_template.jinja").write_text(template)
    with contextlib.closing(ChatTemplate(files, seconds)) as made, pytest.raises(ConfigError, match=message) as error:
        made.tokens([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(error.value)


def test_a_job_goes_on_with_the_model_and_the_prompts_that_it_was_begun_with(models, loaded, tmp_path):
    """Whatever stands at the model's path, and however the path is written."""
    write_prompts(tmp_path / "in.jsonl")
    config, target = make_config(SAMPLED), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path / "in.jsonl", target, "run").run(Interrupted(*loaded, config))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = create_model(MODEL, nnx.Rngs(0))
    other_tokenizer = LibraryTokenizer(byte_level(), end_id=0, begin_id=None)
    narrow = lin_jax.load(models / "augmented", dtype="bfloat16")
    for model, tokenizer in ((other, loaded[1]), (loaded[0], other_tokenizer), narrow):
        with pytest.raises(ConfigError, match="was begun with another model or tokenizer"):
            Job(tmp_path / "in.jsonl", target, "run", resume=True).run(TextGenerator(model, tokenizer, config))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    lines = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(lines.replace('"nested": {"a": [4]}', '"nested": {"a": [7]}'))
    with pytest.raises(ConfigError, match="was begun with another --prompt_file"):
        Job(tmp_path / "in.jsonl", target, "run", resume=True).run(TextGenerator(*loaded, config))
    (tmp_path / "in.jsonl").write_text(lines)
    Job(tmp_path / "in.jsonl", target, "./run/", resume=True).run(TextGenerator(*loaded, config))
    assert len(target.read_text().splitlines()) == 7


WRONG = ["null", "true", "1", "1.5", '"a"', "[]", "{}", "[1]", '{"a": 1}', "1e999", "NaN", '"\\ud800"', "1" * 400]
WRONG += ["[" * 1000 + "]" * 1000, '"\\u0000"']


def test_settings_of_a_job_of_another_kind_are_refused_in_one_line(loaded, tmp_path):
    """Every field with every wrong value, and the whole file."""
    write_prompts(tmp_path / "in.jsonl")
    config, target = make_config(SAMPLED), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path / "in.jsonl", target).run(Interrupted(*loaded, config))
    settings = tmp_path / "out.jsonl.settings"
    good, generator = json.loads(settings.read_text()), TextGenerator(*loaded, config)
    contents = WRONG + [
        json.dumps(good).replace(f"{json.dumps(field)}: {json.dumps(value)}", f"{json.dumps(field)}: {text}")
        for field, value in good.items()
        for text in WRONG
        # Any text names a checkpoint, and these lists are empty.
        if text != json.dumps(value)
        and (field, text) not in {("checkpoint", '"a"'), ("stop", "[]"), ("stop_tokens", "[]")}
    ]
    assert len(set(contents)) == len(contents) and json.dumps(good) not in contents
    for content in contents:
        settings.write_text(content)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError) as error:
            Job(tmp_path / "in.jsonl", target, resume=True).run(generator)
        assert "out.jsonl" in str(error.value) and "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("field", ["prompt", "line", "sample", "completion", "tokens"])
def test_lines_of_wrong_types_are_refused_in_one_line(tmp_path, field):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    values = {"prompt": '"a"', "line": "1", "sample": "0", "completion": '""', "tokens": "1"}
    right = {"1"} if field in ("line", "sample", "tokens") else {'"a"', '"\\u0000"'}
    for text in set(WRONG) - right:
        fields = values | {field: text}
        source.write_text('{"prompt": ' + (text if field == "prompt" else '"a"') + "}\n")
        target.write_text("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}\n")
        with pytest.raises(ConfigError, match="line 1") as error:
            Job(source, target, resume=True)
        assert "\n" not in str(error.value)


def test_every_setting_is_an_argument_with_its_documentation(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and r"--stop $'\n\n' --draft lookup" in printed
    for section in (GenerateConfig, SamplingConfig):
        for field in dataclasses.fields(section):
            if field.name != "sampling":
                assert f"--{field.name} " in printed and field.metadata["doc"] in printed


def test_few_capacities_serve_most_lengths():
    assert {_rounded(tokens) for tokens in range(1, 1025)} == {128, 256, 384, 512, 768, 1024}
    assert all(tokens <= _rounded(tokens) <= max(tokens + 128, 1.5 * tokens) for tokens in range(1, 5000))


def test_dtype_is_that_of_parameters_and_activations(models):
    model, _ = lin_jax.load(models / "augmented", dtype="bfloat16")
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}
    assert kinds == {"bfloat16"} and model.config.dtype == "bfloat16"


def test_a_checkpoint_of_a_run_can_be_named(models, loaded):
    [step] = (models / "augmented" / "checkpoints").iterdir()
    model, tokenizer = lin_jax.load(step)
    assert tokenizer.decode(np.array([104, 105], np.int32)) == "hi"
    np.testing.assert_array_equal(model.embedding[...], loaded[0].embedding[...])

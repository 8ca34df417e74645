"""Configuration files that fail: one line with the file, its line and what is wrong, and nothing is left."""

import os

import pytest

from lin_jax.settings.base import ConfigError
from lin_jax.settings.config_file import call_get_config


def refused(path):
    with pytest.raises(ConfigError) as error:
        call_get_config(str(path))
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_file_is_run_with_its_argument(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text("def get_config(name='default', *others):\n    return name, __file__\n")
    assert call_get_config(str(file)) == ("default", str(file))
    assert call_get_config(f"{file}:gs://bucket/a.py:b") == ("gs://bucket/a.py:b", str(file))
    assert sorted(os.listdir(tmp_path)) == ["experiment.py"]


GET = "def get_config(): "


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("x = 1\nundefined\n", 2, "NameError: name 'undefined' is not defined"),
        ("import absent_module\n", 1, "ModuleNotFoundError: No module named 'absent_module'"),
        ("from lin_jax.experiment import Confog\n", 1, "ImportError: cannot import name 'Confog'"),
        ("def get_config(:\n", 1, "invalid syntax"),
        ("x = 1\n  y = 2\n", 2, "unexpected indent"),
        ("\nx = 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
        (GET + "\n    raise SystemExit(0)\n", 2, "SystemExit: 0"),
        ("import sys\nsys.exit('tired')\n", 2, "SystemExit: tired"),
        ("raise GeneratorExit\n", 1, "GeneratorExit"),
        (GET + "return get_config()\n", 1, "RecursionError: maximum recursion depth exceeded"),
        (GET + "raise ValueError('two\\nlines')\n", 1, "ValueError: two"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n", 3, "E"),
        ("def f():\n    return {}['a']\ndef get_config():\n    return f()\n", 2, "KeyError: 'a'"),
        (
            "from lin_jax.settings.train import TrainConfig\ndef get_config():\n    return TrainConfig(steps='8')\n",
            3,
            'steps must be a whole number, but is "8"',
        ),
        (
            "def f(): pass\ndef get_config():\n    return f(step=8)\n",
            3,
            "TypeError: f() got an unexpected keyword argument 'step'",
        ),
    ],
)
def test_an_exception_is_told_with_its_line(tmp_path, text, line, message):
    file = tmp_path / "experiment.py"
    file.write_text(text)
    assert refused(file).startswith(f"{file}, line {line}: {message}")
    assert os.listdir(tmp_path) == ["experiment.py"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no get_config()"),
        (b"get_config = 3\n", "has no get_config()"),
        (b"get_config = dict.fromkeys\n", "get_config() of"),
        (b"def get_config(a, b): pass\n", "missing a required argument: 'a'; its argument is given as"),
        (b"x = '\xff'\n", "codec can't decode byte"),
        (b"x = '\0'\n", "null bytes"),
        (b"#" * (1 << 21), "is too large"),
        ("# coding: latin-1\nx = 'é'\n".encode("latin-1"), "has no get_config()"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, message):
    file = tmp_path / "experiment.py"
    file.write_bytes(content)
    told = refused(file)
    assert str(file) in told and message in told


def test_an_argument_that_is_not_taken(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("def get_config():\n    pass\n")
    assert refused(f"{file}:big") == f"get_config() of {file} takes no argument, but has 'big'"


@pytest.mark.parametrize("name", ["absent.py", "pipe.py", "directory.py", "loop.py", "in\0valid.py", "", "device.py"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "directory.py").mkdir()
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "device.py").symlink_to("/dev/zero")
    assert name.partition("\0")[0] in refused(tmp_path / name)


def test_an_interrupt_is_no_error_of_the_file(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        call_get_config(str(file))

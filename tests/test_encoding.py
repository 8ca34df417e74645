"""No file of text is read or written in the encoding of whoever's machine it is: all say encoding="utf-8"."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("lin_jax/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("configs/*.py")]
TEXT_METHODS = ("read_text", "write_text")
OPENERS = ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile", "TextIOWrapper")
PROCESSES = ("run", "Popen", "check_output", "check_call", "call")
TEXT_FLAGS = ("text", "universal_newlines")


def called(call):
    """The last name of what is called, and what it is an attribute of."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr, ast.unparse(call.func.value)
    return (call.func.id, None) if isinstance(call.func, ast.Name) else (None, None)


def is_binary(call, opener, owner):
    """Whether a mode says that bytes are meant; `NamedTemporaryFile` means them unless it is told otherwise."""
    place = 0 if owner is not None and opener == "open" or opener.endswith("File") else 1
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[place : place + 1]
    if not modes:
        return opener.endswith("File")
    return all(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


def without_encoding(tree):
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, owner = called(call)
        words = {word.arg: word.value for word in call.keywords}
        encoded = isinstance(words.get("encoding"), ast.Constant) and words["encoding"].value in ("utf-8", "utf-8-sig")
        is_text = name in TEXT_METHODS
        is_text |= name in OPENERS and owner not in ("os", "webbrowser") and not is_binary(call, name, owner)
        is_text |= name in PROCESSES and any(flag in words for flag in TEXT_FLAGS)
        if is_text and not encoded:
            yield call.lineno


def test_every_file_of_text_names_its_encoding():
    assert len(FILES) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}" for file in FILES for line in without_encoding(ast.parse(file.read_bytes()))
    ]
    assert not found


@pytest.mark.parametrize(
    ("code", "is_wrong"),
    [
        ("open('a')", True),
        ("open('a', 'rb')", False),
        ("open('a', encoding='utf-8')", False),
        ("open('a', encoding='latin-1')", True),
        ("path.open('w')", True),
        ("path.open('wb')", False),
        ("path.read_text()", True),
        ("path.write_text(x, 'utf-8')", True),
        ("subprocess.run(x, text=True)", True),
        ("subprocess.run(x, text=True, encoding='utf-8')", False),
        ("subprocess.run(x)", False),
        ("os.open('a', 0)", False),
        ("tempfile.NamedTemporaryFile(dir=x)", False),
        ("tempfile.NamedTemporaryFile('w')", True),
    ],
)
def test_what_is_found(code, is_wrong):
    assert bool(list(without_encoding(ast.parse(code)))) == is_wrong

"""One name, one meaning: of public classes, and of the letters of axes in names; shapes in annotations are checked."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import lin_jax
from lin_jax.axes import AXES

HOME = Path(lin_jax.__file__).parent
FILES = sorted(HOME.rglob("*.py"))
# The axes at the end of a name, such as BTHD; numbers are sizes. Constants have capitals before it too.
SUFFIX = re.compile(r"(?:^|_)[a-z][a-z0-9]*_([A-Z][A-Z0-9]*)$")
DECLARED = re.compile(r"^# Letters beyond the legend: (.*(?:\n# .*)*)", re.MULTILINE)


def of_file(path: Path) -> str:
    return str(path.relative_to(HOME))


def names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name


def declared(text: str) -> set[str]:
    """The letters of the comment at a file's top."""
    body, lines = ast.parse(text).body, text.splitlines()
    if len(body) < 2:
        return set()
    found = DECLARED.search("\n".join(lines[body[0].end_lineno : body[1].lineno]))
    return set(re.findall(r"\b([A-Z]) =", found[1])) if found else set()


def strays(text: str, legend: set[str]) -> set[tuple[str, str]]:
    """Names with letters that neither the legend nor the file's top explains."""
    known = legend | declared(text)
    found = set()
    for name in names(ast.parse(text)):
        suffix = SUFFIX.search(name)
        found |= (
            {(letter, name) for letter in suffix[1] if letter.isalpha() and letter not in known} if suffix else set()
        )
    return found


def test_public_classes_have_names_of_their_own():
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(of_file(path))
    assert len(homes) > 50
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=of_file)
def test_letters_of_axes_are_those_of_the_legend_or_declared(path):
    assert strays(path.read_text(encoding="utf-8"), set(AXES)) == set()


def test_strays_are_found_and_declarations_read():
    body = "import x\nimport y\ny_BQ = q_BTHD + MAX_Q\nf(z_Z=1)\n"
    assert strays(body, set("BTHD")) == {("Q", "y_BQ"), ("Z", "z_Z")}
    top = '"""Doc."""\n\n# Letters beyond the legend: Q = questions,\n# Z = zebras.\n'
    assert strays(top + body, set("BTHD")) == set()
    assert strays(body + top, set("BTHD")) == {("Q", "y_BQ"), ("Z", "z_Z")}


def test_the_shapes_of_every_package_that_states_some_are_checked(pytestconfig):
    state_shapes = {
        f"lin_jax.{path.relative_to(HOME).parts[0]}" for path in FILES if "from jaxtyping import" in path.read_text()
    }
    *checked, _ = pytestconfig.getoption("jaxtyping_packages").split(",")
    assert set(checked) == state_shapes

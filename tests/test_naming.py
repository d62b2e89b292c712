"""A name says what the value is: words that could stand for anything are no names of values."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = {"own", "found", "some", "rest", "it", "lost", "kept", "given", "first"}

ARGUMENTS = {"diffpeft/model/schedule.py": {"first"}}  # that users name in a call


def sources() -> list[str]:
    paths = (path for folder in ("diffpeft", "converters") for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in paths if "assets" not in path.parts)


def classes() -> Counter[str]:
    """How many files have a class of a name at their top."""
    trees = (ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in sources())
    return Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of what a file gives a value to: variables, arguments, what is imported or caught. Fields of classes are said with their class."""
    for node in ast.walk(tree):
        fields = node.body if isinstance(node, ast.ClassDef) else ()
        for field in fields:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                field.target.ctx = ast.Load()
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield node.lineno, name


def vague(text: str) -> list[tuple[int, str]]:
    return sorted({(line, name) for line, name in bound(ast.parse(text)) if name in WORDS})


def test_names_of_values_say_what_they_are():
    names = {path: vague((ROOT / path).read_text(encoding="utf-8")) for path in sources()}
    wrong = {path: [(n, w) for n, w in places if w not in ARGUMENTS.get(path, ())] for path, places in names.items()}
    assert not {path: places for path, places in wrong.items() if places}


def test_a_class_is_called_like_no_other():
    twice = {name for name, number in classes().items() if number > 1}
    assert not twice


@pytest.mark.parametrize(
    "text, names",
    [
        ("own = 1", ["own"]),
        ("def f(found, *rest, lost=1, **kept): ...", ["found", "kept", "lost", "rest"]),
        ("lambda it: it", ["it"]),
        ("[some for some, _ in x]", ["some"]),
        ("if given := f(): ...", ["given"]),
        ("for first in x: ...", ["first"]),
        ("import os as own", ["own"]),
        ("try: ...\nexcept OSError as found: ...", ["found"]),
        ("match x:\n    case {'a': found, **rest}: ...\n    case [*some]: ...", ["found", "rest", "some"]),
        ("with open(x) as it: ...", ["it"]),
        ("class A:\n    given: int = 0\n    def f(self): self.kept = A.given(first=1)", []),  # fields and keywords
        ("def kept(x): return x.found", []),  # functions and attributes
    ],
)
def test_what_counts_as_a_name_of_a_value(text, names):
    assert sorted(name for _, name in vague(text)) == names

"""How big functions may be, read from the syntax trees: what branches more than this, or is longer, hides a second idea."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import diffpeft

ROOT = Path(diffpeft.__file__).parent.parent
FILES = sorted(
    path for part in ("diffpeft", "converters") for path in (ROOT / part).rglob("*.py") if "assets" not in path.parts
)
COMPLEXITY, LINES = 15, 40
STRAIGHT = 8  # a table or a recipe may be longer if it branches no more than this
# uses of `Any`, which is for what other libraries hand us: only downwards
MOST_ANY = {"converters": 2, "diffpeft": 250}
Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.match_case)


def inside(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function, without the functions and classes in it."""
    todo = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node
            todo += ast.iter_child_nodes(node)


def branches(node: ast.AST) -> int:
    """How many ways a node adds to those through its function."""
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    return int(isinstance(node, BRANCHES))


def complexity(function: Function) -> int:
    """1 + branches, loops, handlers, conditional expressions, boolean operators, clauses of comprehensions and their conditions."""
    return 1 + sum(map(branches, inside(function)))


def lines(function: Function) -> int:
    """From `def` to the end."""
    return (function.end_lineno or 0) - function.lineno + 1


def functions() -> Iterator[tuple[str, Function]]:
    """(`package/file.py name`, function) of all functions, nested ones too."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)} {node.name}", node


def test_the_count_of_complexity():
    (function,) = ast.parse(
        """
async def f(a):
    if a and a.b or a.c: return [x for x in a if x if x.y]
    elif a: assert a
    for x in a:
        try: x
        except ValueError: pass
    def inner():
        if a: pass
    match a:
        case 1: pass
        case _: return 1 if a else 2
    while a: pass
"""
    ).body
    assert complexity(function) == 1 + (1 + 1 + 1) + (1 + 2) + (1 + 1) + 1 + 1 + (2 + 1) + 1
    assert lines(function) == 12


def test_no_function_branches_too_much():
    wrong = {name: n for name, f in functions() if (n := complexity(f)) > COMPLEXITY}
    assert not wrong, f"above {COMPLEXITY}: {wrong}"


def test_no_function_is_long_but_tables_and_recipes():
    wrong = {name: lines(f) for name, f in functions() if lines(f) > LINES and complexity(f) > STRAIGHT}
    assert not wrong, f"above {LINES} lines: {wrong}"


def test_any_is_for_what_other_libraries_hand_us():
    for part, most in MOST_ANY.items():
        trees = [ast.parse(path.read_text()) for path in FILES if path.relative_to(ROOT).parts[0] == part]
        uses = sum(isinstance(n, ast.Name) and n.id == "Any" for tree in trees for n in ast.walk(tree))
        assert uses <= most, f"{uses} uses of Any in {part}"

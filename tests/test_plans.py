"""Operations are plans (docs/decisions/014): who commits, who goes back by hand, and what llm/ may know of layers. Read from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import diffpeft

ROOT = Path(diffpeft.__file__).parent
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

# what llm/ takes of layers/: types, and what tells one layer from another; it edits none
TYPES = {"Bank", "Slot", "Record", "ParameterFactors", "Tokens"}
QUESTIONS = {
    "base_class",
    "op_of",
    "BIAS",
    "BACKENDS",
    "FOUR_BITS",
    "backend_of",
    "backend_of_weight",
    "numbers",
    "site_of",
}

# `except BaseException`: the commit itself, blocks that end whatever happens, files that appear whole, and the weights that a block has taken adapters out of
BY_HAND = {"model/plan.py", "model/mix.py", "model/root.py", "files/commits.py", "llm/tuner.py"}


def calls(tree: ast.AST, name: str) -> bool:
    """Whether `name(...)` or `x.name(...)` is called."""
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(name in (getattr(f, "id", None), getattr(f, "attr", None)) for f in functions)


def test_only_planned_commits_and_locks():
    assert {path for path, tree in TREES.items() if calls(tree, "commit")} <= {"model/plan.py"}
    assert {path for path, tree in TREES.items() if calls(tree, "exclusive")} == {
        "model/plan.py",
        "pipeline/adapters.py",  # a block that claims adapters, and a list of them, change nothing
    }


def test_nothing_goes_back_by_hand():
    def catches(tree):
        handlers = (node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
        return any(kind is None or "BaseException" in ast.unparse(kind) for kind in handlers)

    assert {path for path, tree in TREES.items() if catches(tree)} <= BY_HAND


def test_the_facade_edits_no_layers():
    taken = {
        (path, alias.name)
        for path, tree in TREES.items()
        if path.startswith("llm/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffpeft.layers")
        for alias in node.names
    }
    assert taken and not {(path, name) for path, name in taken if name not in TYPES | QUESTIONS}

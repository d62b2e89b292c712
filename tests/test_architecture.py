"""Who may import whom: downwards only, read from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import converters
import diffpeft

ROOT = Path(diffpeft.__file__).parent.parent
assert Path(converters.__file__).parent.parent == ROOT

LOW = ("errors", "patterns", "files", "methods", "handles", "entries", "definition", "bundle", "io")
FLOORS = {  # each package of ours: what it may import besides itself
    "errors": (),
    "patterns": ("errors",),
    "files": ("errors",),
    "methods": ("errors", "patterns", "files"),
    "handles": ("errors", "files"),
    "entries": ("errors", "methods", "handles"),
    "definition": ("errors", "methods", "handles", "entries"),  # methods inside functions: they bring torch along
    "bundle": ("errors", "handles", "entries", "definition"),
    "io": ("errors", "files", "handles"),
    "converters": LOW,
    "layers": LOW,
    "model": (*LOW, "layers", "converters"),
    "families": (*LOW, "layers", "model", "converters"),
    "pipeline": (*LOW, "layers", "model", "families", "converters"),
    "train": (*LOW, "layers", "model", "families", "pipeline", "converters"),
    "llm": (*LOW, "layers", "model", "families", "pipeline", "train", "converters"),
    "cli": (*LOW, "layers", "model", "families", "pipeline", "train", "llm", "converters"),
}
HEAVY = {"diffusers", "transformers", "accelerate", "bitsandbytes", "click", "peft"}
FILES = sorted(
    p for package in ("diffpeft", "converters") for p in (ROOT / package).rglob("*.py") if "assets" not in p.parts
)


def floor_of(module: str) -> str:
    """The package of ours that a module name belongs to: `diffpeft.model.mix` -> model, `converters.engine` -> converters."""
    head, _, rest = module.partition(".")
    return head if head == "converters" else rest.partition(".")[0]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(nodes, inside: str):
    """Module names that import statements among `nodes` name; `from diffpeft import io` names diffpeft.io."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inside}: a relative import"
            yield from (
                (f"diffpeft.{alias.name}" for alias in node.names) if node.module == "diffpeft" else (node.module,)
            )


def at_import_time(tree: ast.Module):
    """The statements that run when a module is imported: not those in functions, nor under TYPE_CHECKING."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        yield node
        todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downwards_only(path):
    module, tree = name_of(path), ast.parse(path.read_text())
    floor = floor_of(module)
    if floor in ("", "__main__"):  # the lazy table of public names, and the command
        return
    ours = {
        floor_of(name) for name in imports(ast.walk(tree), module) if name.split(".")[0] in ("diffpeft", "converters")
    } - {"", "__version__"}
    assert ours - {floor} <= set(FLOORS[floor])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_low_floors_import_no_heavy_library_at_their_top(path):
    module = name_of(path)
    if floor_of(module) not in ("train", "llm", "cli"):
        assert not {name.split(".")[0] for name in imports(at_import_time(ast.parse(path.read_text())), module)} & HEAVY


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in FILES
        if floor_of(name_of(p)) in ("errors", "files", "handles", "entries", "definition", "bundle", "io", "converters")
    ],
    ids=name_of,
)
def test_the_header_side_imports_no_torch_at_its_top(path):
    module = name_of(path)
    assert not {name.split(".")[0] for name in imports(at_import_time(ast.parse(path.read_text())), module)} & {
        "torch",
        "numpy",
        "safetensors",
    }


@pytest.mark.parametrize("path", [p for p in FILES if floor_of(name_of(p)) == "methods"], ids=name_of)
def test_methods_import_torch_and_errors_only(path):
    import sys

    module, tree = name_of(path), ast.parse(path.read_text())
    assert {name.split(".")[0] for name in imports(ast.walk(tree), module)} - sys.stdlib_module_names <= {
        "torch",
        "diffpeft",
    }


def module_imports() -> dict[str, set[str]]:
    """{module of ours: the modules of ours that it imports, wherever in the file}; `from a import b` names a.b if that is a module, else a."""
    trees = {name_of(path): ast.parse(path.read_text()) for path in FILES}
    imported: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
            whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {whole[name] if whole[name] in trees else node.module for name in whole}
        imported[module] = names & {*trees} - {module}
    return imported


def circles_in(imported: dict[str, set[str]]) -> list[str]:
    """The modules that import each other, and what lies between such; empty if all can be put in an order."""
    left = dict(imported)
    while True:
        wanted = set().union(*left.values())
        inner = {module: others & left.keys() for module, others in left.items() if module in wanted}
        inner = {module: others for module, others in inner.items() if others}
        if len(inner) == len(left):
            return sorted(left)
        left = inner


def test_no_modules_import_each_other_in_a_circle():
    imported = module_imports()
    assert "diffpeft.handles" in imported["diffpeft.io"]
    assert circles_in({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    del imported["diffpeft"]  # the lazy table of public names: what type checkers are told of it is no import
    assert circles_in(imported) == []


def test_every_package_has_a_floor():
    assert {floor_of(name_of(p)) for p in FILES} - {"", "__main__"} <= set(FLOORS)

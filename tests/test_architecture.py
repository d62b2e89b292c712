"""Who may import whom: downwards only, read from the syntax trees."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import diffpeft
from diffpeft import converters

ROOT = Path(diffpeft.__file__).parent.parent
assert Path(converters.__file__).resolve().parent.parent == ROOT

LOW = ("errors", "readable", "patterns", "files", "methods", "handles", "entries", "definition", "bundle", "io")
FLOORS = {  # each package of ours: what it may import besides itself
    "errors": (),
    "readable": ("errors",),
    "patterns": ("errors",),
    "files": ("errors",),
    "methods": ("errors", "patterns", "files"),
    "handles": ("errors", "readable", "files"),
    "entries": ("errors", "readable", "methods", "handles"),
    "definition": ("errors", "methods", "handles", "entries"),  # methods inside functions: they bring torch along
    "bundle": ("errors", "readable", "handles", "entries", "definition"),
    "io": ("errors", "files", "handles"),
    "converters": LOW,
    "layers": LOW,
    "model": (*LOW, "layers", "converters"),
    "families": (*LOW, "layers", "model", "converters"),
    "pipeline": (*LOW, "layers", "model", "families", "converters"),
    "tools": (*LOW, "layers", "model", "families", "pipeline", "converters"),
    "drawing": (*LOW, "layers", "model", "families", "pipeline", "converters"),
    "train": (*LOW, "layers", "model", "families", "pipeline", "drawing", "converters"),
    "llm": (*LOW, "layers", "model", "families", "pipeline", "train", "converters"),
    "cli": (*LOW, "layers", "model", "families", "pipeline", "tools", "drawing", "train", "llm", "converters"),
    # PEFT's modules under their own names: they hand on what is below
    "utils": (*LOW, "layers", "llm", "converters"),
    "functional": (*LOW, "layers", "model", "pipeline", "llm"),
    "tuners": (*LOW, "layers", "llm", "functional"),
    "optimizers": (*LOW, "layers", "model", "llm"),
    "helpers": (*LOW, "layers", "model", "pipeline", "llm"),
    "import_utils": (),
    # diffusers' methods under their own names
    "takeover": (*LOW, "layers", "model", "pipeline", "llm", "converters"),
    "alias": ("errors", "methods"),
}
HEAVY = {"diffusers", "transformers", "accelerate", "bitsandbytes", "click", "peft"}
FILES = sorted(
    p for package in ("diffpeft", "converters") for p in (ROOT / package).rglob("*.py") if "assets" not in p.parts
)


def floor_of(module: str) -> str:
    """The package of ours that a module name belongs to: `diffpeft.model.mix` -> model, `diffpeft.converters.engine` -> converters."""
    return module.partition(".")[2].partition(".")[0]


def name_of(path: Path) -> str:
    """The module that a file is: what is in the folder converters is diffpeft.converters."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "diffpeft" else ("diffpeft", *parts)).removesuffix(".__init__")


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


def wrong(files, foreign) -> dict[str, set[str]]:
    """{module: what it imports that it may not}, by `foreign(module, tree)`."""
    told = {name_of(path): foreign(name_of(path), ast.parse(path.read_text())) for path in files}
    return {module: names for module, names in told.items() if names}


def roots(names) -> set[str]:
    return {name.split(".")[0] for name in names}


def on(*floors) -> list[Path]:
    return [path for path in FILES if floor_of(name_of(path)) in floors]


def test_imports_go_downwards_only():
    def foreign(module, tree):
        floor = floor_of(module)
        if floor in ("", "__main__"):  # the lazy table of public names, and the command
            return set()
        names = [name for name in imports(ast.walk(tree), module) if roots([name]) == {"diffpeft"}]
        return {floor_of(name) for name in names} - {"", "__version__", floor, *FLOORS[floor]}

    assert not wrong(FILES, foreign)


def test_converters_are_imported_by_the_name_that_nobody_else_has():
    """A user's own converters.py may be the first on the path."""
    assert not wrong(FILES, lambda module, tree: roots(imports(ast.walk(tree), module)) & {"converters"})
    assert (ROOT / "diffpeft" / "converters").resolve() == ROOT / "converters"


def test_low_floors_import_no_heavy_library_at_their_top():
    low = [path for path in FILES if path not in on("train", "llm", "cli")]
    assert not wrong(low, lambda module, tree: roots(imports(at_import_time(tree), module)) & HEAVY)


def test_the_header_side_imports_no_torch_at_its_top():
    tensors = {"torch", "numpy", "safetensors"}
    header = on("errors", "files", "entries", "definition", "bundle", "handles", "io", "converters")
    assert not wrong(header, lambda module, tree: roots(imports(at_import_time(tree), module)) & tensors)


def test_methods_import_torch_and_errors_only():
    allowed = sys.stdlib_module_names | {"torch", "diffpeft"}
    assert not wrong(on("methods"), lambda module, tree: roots(imports(ast.walk(tree), module)) - allowed)


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


def test_the_page_on_the_architecture_names_what_exists():
    """Each noun is a class in the file that its row names, and all other files and registries are there."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    nouns = re.findall(r"^\| \*\*(\w+)\*\* \| `([^`]+)` \|", page, re.M)
    assert len(nouns) == 10
    for noun, file in nouns:
        defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef)}
        assert {noun, f"_{noun}"} & defined, (noun, file)
    named = set(re.findall(r"`((?:diffpeft|converters|tests|docs)/[^`]+)`", page))
    assert len(named) > 30 and not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_every_floor_is_on_the_page():
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"\w+", page.split("```")[1]))
    assert drawn == set(FLOORS), drawn ^ set(FLOORS)


def test_no_two_test_files_have_one_name():
    """pytest imports them by that, and would run only the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))

"""Lists in messages are never cut in silence: `listed` and `joined` say how many more there are. Read from the syntax trees."""

from __future__ import annotations

import ast
import logging
import warnings

import pytest
import torch

import diffpeft
import diffpeft.train.progress
from diffpeft import errors
from tests.test_architecture import FILES, ROOT

JOINING = {"listed", "joined"}
BETWEEN = (", ", "; ", " and ", " or ")  # names in a sentence
NEAREST = {"converters/engine.py"}  # names the likeliest three of many, as `near` does


def cut(expression: ast.expr) -> bool:
    """Whether an expression is the beginning of a sequence: names[:5]."""
    return (
        isinstance(expression, ast.Subscript)
        and isinstance(expression.slice, ast.Slice)
        and bool(expression.slice.upper)
    )


def sources(argument: ast.expr):
    """What the texts of an argument are made from: itself, the arguments of a map, what a comprehension walks over."""
    yield argument
    if isinstance(argument, ast.Call):
        for inner in argument.args:
            yield from sources(inner)
    if isinstance(argument, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
        for generator in argument.generators:
            yield from sources(generator.iter)


def cuts_in(text: str) -> list[int]:
    """The lines on which a cut sequence is joined into a text."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and joins(call.func)
        if any(cut(source) for argument in call.args for source in sources(argument))
    ]


def joins(function: ast.expr) -> bool:
    """Whether a function makes a list of names in a sentence: listed, joined, ", ".join."""
    if isinstance(function, ast.Attribute):
        between = function.value.value if isinstance(function.value, ast.Constant) else ""
        return function.attr == "join" and between in BETWEEN
    return isinstance(function, ast.Name) and function.id in JOINING


def test_no_list_in_a_message_is_cut_in_silence():
    files = [path for path in FILES if path.relative_to(ROOT).as_posix() not in NEAREST | {"diffpeft/errors.py"}]
    lines = {path.name: cuts_in(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: numbers for name, numbers in lines.items() if numbers}


@pytest.mark.parametrize(
    "text",
    [
        "', '.join(names[:3])",
        "listed(list(names)[:3])",
        "', '.join(map(shown, names[:5]))",
        "joined(f(n) for n in names[: MOST])",
    ],
)
def test_what_counts_as_cut(text):
    assert cuts_in(text) == [1]
    assert not cuts_in(text.replace("[:3]", "").replace("[:5]", "").replace("[: MOST]", ""))


def categories_in(text: str) -> list[str]:
    """The category of each warning in a source, empty where it has none."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    warned = (call for call in calls if ast.unparse(call.func) in ("warnings.warn", "warn"))
    return [ast.unparse(call.args[1]) if len(call.args) > 1 else "" for call in warned]


def test_every_warning_is_of_a_kind_of_ours():
    """So that a program silences ours, or some of ours, or makes errors of them, without a word on their texts."""
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Warning)}
    assert all(issubclass(kind, errors.DiffpeftWarning) for kind in kinds.values())
    told = {path.name: categories_in(path.read_text(encoding="utf-8")) for path in FILES}
    assert sum(map(len, told.values())) > 50
    assert not {
        name: other
        for name, said in told.items()
        if (other := {*said} - kinds.keys() | ({*said} & {"DiffpeftWarning"}))
    }
    assert {*kinds} <= {*diffpeft.__all__} and {name for said in told.values() for name in said} | {
        "DiffpeftWarning"
    } == {*kinds}


def test_warnings_are_user_warnings_and_pefts_kinds():
    assert issubclass(errors.DiffpeftWarning, UserWarning) and issubclass(errors.PeftWarning, errors.DiffpeftWarning)
    assert issubclass(errors.UnusedPatternWarning, RuntimeWarning) and issubclass(errors.OutdatedWarning, FutureWarning)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", diffpeft.DiffpeftWarning)
        for kind in (errors.CheckpointWarning, errors.OutdatedWarning, errors.UnusedPatternWarning):
            warnings.warn("x", kind, stacklevel=1)
    assert not seen


def test_what_is_done_is_said_on_the_logger_and_printed_nowhere(tmp_path, caplog, capsys):
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("diffpeft").handlers)
    model, file = torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "a.safetensors"
    with caplog.at_level(logging.DEBUG, "diffpeft"):
        diffpeft.attach(model, diffpeft.LoraConfig(r=1, init_lora_weights=False), "a", targets=["0"])
        diffpeft.save_lora(model, file, format="diffusers")
        diffpeft.unload(model)
        diffpeft.load_lora(model, file, name="b")
        diffpeft.replace(model, "b", file)
        diffpeft.set_adapters(model, {"b": 0.5})
        diffpeft.fuse(model)
        diffpeft.unfuse(model)
        with diffpeft.train.progress.shown(None) as watch:
            watch.phase("training")
            watch.figures(lr=1e-4)
            watch.step(1, 2, 0.5)
    records = [record for record in caplog.records if record.name.split(".")[0] == "diffpeft"]
    said = [record.getMessage() for record in records]
    begins = [
        "attached AttachReport(",
        "saved 'a' as diffusers",
        "unloaded a",
        "loaded LoadReport(",
        "replaced by LoadReport(",
    ]
    begins += ["set {'b': 0.5}", "fused all", "unfused", "training", "step 1/2, loss 0.5000, lr 0.0001"]
    for begin in begins:
        assert any(text.startswith(begin) for text in said), (begin, said)
    assert all(len(text) < 400 and "\n" not in text for text in said)
    assert capsys.readouterr() == ("", "")


ANSWERED = ("diffpeft/tools", "diffpeft/drawing", "diffpeft/cli")  # folders whose every error says what to do


def without_remedy(text: str) -> list[int]:
    """The lines on which an error of ours is raised that does not say what to do."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    calls = (node.exc for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise))
    ours = (call for call in calls if isinstance(call, ast.Call) and ast.unparse(call.func) in kinds)
    return [call.lineno for call in ours if not any(word.arg == "remedy" for word in call.keywords)]


def test_what_commands_refuse_has_a_remedy():
    files = [path for path in FILES if path.relative_to(ROOT).as_posix().startswith(ANSWERED)]
    lines = {path.name: without_remedy(path.read_text(encoding="utf-8")) for path in files}
    assert len(files) > 40 and not {name: numbers for name, numbers in lines.items() if numbers}
    assert without_remedy("raise ConfigError('no', where=1)") == [1]

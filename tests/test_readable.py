"""Results read well: one line as `repr`, as `diffpeft inspect` prints it as `str`, a table in notebooks."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import diffpeft
from diffpeft import converters
from diffpeft.cli import cli
from diffpeft.pipeline.open import open_pipeline
from diffpeft.readable import Readable, Residuals, brief, bytes_in_words, ranks_in_words, words
from diffpeft.train.run import TrainRun

MOST = 300


def returned() -> set[type]:
    """The dataclasses that public functions say they return, alone or in something."""
    classes = {TrainRun}  # of diffpeft.train, which is a module
    for home, names in ((diffpeft, diffpeft.__all__), (converters, converters.__all__)):
        for function in filter(inspect.isfunction, (getattr(home, name) for name in names)):
            known = vars(sys.modules[function.__module__])
            said = re.findall(r"\w+", str(function.__annotations__.get("return", "")))
            classes |= {known[name] for name in said if dataclasses.is_dataclass(known.get(name))}
    pefts = {cls for cls in classes if issubclass(cls, diffpeft.PeftConfig) or cls.__module__ == "diffpeft.llm.status"}
    return {cls for cls in classes - pefts if cls.__module__.startswith("diffpeft.")}


def readable() -> list[type]:
    classes, todo = set(), [Readable]
    while todo:
        classes |= {*(inner := todo.pop().__subclasses__())}
        todo += inner
    return sorted(classes, key=lambda cls: cls.__name__)


def test_what_public_functions_return_is_readable():
    results = returned()
    names = {
        "LoadReport",
        "AttachReport",
        "AdapterStatus",
        "Bundle",
        "Inspection",
        "Detection",
        "ConvertReport",
        "TrainRun",
    }
    assert names <= {cls.__name__ for cls in results}
    for cls in results - {converters.Fit} | {diffpeft.Entry, diffpeft.TrainConfig}:
        assert issubclass(cls, Readable) and cls.__repr__ is Readable.__repr__, f"{cls}: class X(Readable), repr=False"


class Shy:
    def __repr__(self):
        return "several\nlines"


@pytest.mark.parametrize(
    "filling", [["x" * 100] * 5000, "y" * 9000, {n: "z" for n in range(999)}, Shy(), torch.ones(99, 99), {"b", "a"}]
)
@pytest.mark.parametrize(
    "cls", [cls for cls in readable() if dataclasses.is_dataclass(cls)], ids=lambda cls: cls.__name__
)
def test_a_repr_is_one_short_line_whatever_a_result_holds(cls, filling):
    result = cls.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(result, field.name, filling)
    text = repr(result)
    assert text.startswith(f"{cls.__name__}(") and text.endswith(")") and len(text) < MOST and "\n" not in text


def test_values_in_brief_and_in_words():
    assert brief("a" * 99) == repr("a" * 57 + "...") and brief(frozenset({"b", "a"})) == "{'a', 'b'}"
    assert brief(range(9)) == "<9 items>" and brief((1, 2)) == "(1, 2)" and brief(Shy()) == "<Shy>"
    assert words({"a": 1.50, None: ("x", "y")}) == "a: 1.5, none: x, y" and words(True) == "yes" and words([]) == ""
    assert words([*range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more" and words("a\x1b[31m") == "a\\x1b[31m"


def test_residuals_are_a_dict_that_reads():
    residuals = Residuals({f"unet.{n}": n / 100 for n in range(20)})
    assert residuals == dict(residuals) and json.loads(json.dumps(residuals)) == dict(residuals)
    assert (
        repr(residuals) == "Residuals(20 layers, at most 0.19)"
        and repr(Residuals()) == "Residuals(0 layers, at most 0)"
    )
    assert "unet.19" in str(residuals) and "12 more, of less" in str(residuals)
    for twin in (copy.deepcopy(residuals), pickle.loads(pickle.dumps(residuals))):
        assert type(twin) is Residuals and twin == residuals


class Cells(HTMLParser):
    """The texts of a table, by tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_a_table_shows_what_a_file_says_and_runs_nothing_of_it():
    evil = "<script>alert('x')</script>"
    report = diffpeft.LoadReport(evil, "kohya", "sd15", frozenset({"lora"}), ("unet.a",), (evil,), (evil, "\x1b[31m"))
    cells = Cells(report._repr_html_())
    assert set(cells.tags) == {"table", "caption", "tr", "th", "td"}
    assert evil in cells.texts and f"1 keys, such as {evil}" in cells.texts and "lora" in cells.texts


def of_the_demo(folder):
    """What public functions return for an adapter of all layers of the embedded base."""
    pipe, file = open_pipeline(), folder / "a.safetensors"
    yield "attach", diffpeft.attach(pipe, diffpeft.LoraConfig(r=8, init_lora_weights=False), "a", targets="full")
    yield "get_adapters", diffpeft.get_adapters(pipe)
    diffpeft.save_lora(pipe, file, name="a")
    diffpeft.unload(pipe)
    yield "load_lora", diffpeft.load_lora(pipe, file)
    yield "replace", diffpeft.replace(pipe, "a", file)
    yield "to_lora", diffpeft.to_lora(pipe, "a", name="b", rank=2)
    yield "combine", diffpeft.combine(pipe, {"a": 1.0, "b": 0.5}, name="c")
    yield "fuse", diffpeft.fuse(pipe, ["a"])
    yield "detect", converters.detect(file)
    yield "inspect", converters.inspect(file, norms=True)
    yield "read", converters.read(file)
    yield "entry", converters.read(file).entries[0]


@pytest.mark.slow
def test_results_of_the_demos_adapter_are_short_and_read_as_inspect_does(tmp_path):
    for name, result in of_the_demo(tmp_path):
        assert len(repr(result)) < MOST and "\n" not in repr(result), name
        if isinstance(result, Readable):
            assert len(str(result).splitlines()) < 60 and "<table>" in result._repr_html_(), name
    file = str(tmp_path / "a.safetensors")
    for options in ([], ["--norms"]):
        printed = CliRunner().invoke(cli, ["inspect", file, *options]).output
        assert printed == f"{converters.inspect(file, norms=bool(options))}\n"
    rows = dict(re.findall(r"^  (.{17}) (.*)$", CliRunner().invoke(cli, ["inspect", file]).output, re.M))
    for line in str(converters.read(file)).splitlines()[1:]:
        assert rows[line[2:19]] == line[20:]  # a Bundle says it in the same words
    assert str(converters.read(file)).splitlines()[0] == file


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 KiB"), (400, "0.4 KiB"), (31744, "31.0 KiB"), (3 << 19, "1.5 MiB"), (5 << 29, "2.5 GiB")],
)
def test_bytes_in_words(size, text):
    assert bytes_in_words(size) == text


def test_no_size_of_a_file_is_told_another_way():
    """A file of a few kilobytes is not 0.0 MiB. Of training, memory is told by its own words."""
    files = [
        p for p in Path(diffpeft.__file__).parent.rglob("*.py") if p.name != "readable.py" and "train" not in p.parts
    ]
    assert not [p.name for p in files if "/ 2**20" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize(("ranks", "text"), [((), ""), ((4,), "rank 4"), ((2, 6), "rank 2-6"), ((4, 4), "rank 4")])
def test_ranks_in_words(ranks, text):
    assert ranks_in_words(ranks) == text

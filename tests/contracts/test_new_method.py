"""A method made outside the package passes the same contracts: that a method is one definition proves itself here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffpeft.methods import METHODS, Fresh, Method
from tests.contracts import kinds, test_cells, test_laws
from tests.contracts.pairs import covering


@dataclass
class GainConfig:
    """A factor for each input column: W' = W diag(1 + g)."""

    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None

    def validate(self):
        pass


class Gain(Method):
    name, config, roles = "gain", GainConfig, ("gain",)

    @classmethod
    def init(cls, config, site, **_):
        return Fresh({"gain": torch.zeros(site.geometry.columns)})

    @classmethod
    def weight(cls, W, p, spec):
        return W * (1 + p["gain"]).view(W.shape[1:])


@pytest.fixture
def gain(monkeypatch):
    """The one line that a new method needs, and a row for the contracts."""
    monkeypatch.setitem(METHODS, "gain", Gain)
    monkeypatch.setitem(kinds.FORMS, "gain", kinds.Form("gain"))


def contracts():
    """{name: (test, {its parameters' names: values})} of every contract that runs over methods."""
    found = {}
    for name, test in {**vars(test_laws), **vars(test_cells)}.items():
        marks = {m.args[0]: m.args[1] for m in getattr(test, "pytestmark", []) if m.name == "parametrize"}
        if (
            name.startswith("test_")
            and any("form" in key for key in marks)
            and not {"dropout", "inductor"} & {*name.split("_")}
        ):
            found[name] = test, marks
    return found


def rows(marks) -> list[dict]:
    """The arguments of each call with the new method in place of all others; on the kinds that a new method meets."""
    calls: list[dict] = [{}]
    for key, values in marks.items():
        names = [key] if isinstance(key, str) else list(key)
        if names == ["form", "kind"]:
            values = covering(["gain"])
        elif "form" in names:
            at = names.index("form")
            values = ["gain"] if isinstance(key, str) else [_with_gain(next(iter(values)), at)]
        calls = [
            {**row, **dict(zip(names, v if len(names) > 1 else [v], strict=True))} for row in calls for v in values
        ]
    return calls


def _with_gain(row, at) -> tuple:
    """The first row of several parameters with the new method in it."""
    row = getattr(row, "values", row)
    return (*row[:at], "gain", *row[at + 1 :])


@pytest.mark.parametrize("name", contracts())
def test_a_toy_method_passes(name, gain, request):
    test, marks = contracts()[name]
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    for row in rows(marks):
        torch.manual_seed(0)
        test(**row, **{arg: request.getfixturevalue(arg) for arg in wanted if arg not in row})


def test_it_is_short():
    lines = Path(__file__).read_text().split("@dataclass")[1].split("@pytest.fixture")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) < 30

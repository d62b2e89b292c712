"""A method made outside the package passes the same contracts: that a method is one definition proves itself here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import kinds
import pytest
import test_laws
import torch

from diffpeft.methods import METHODS, Fresh, Method


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
    monkeypatch.setitem(kinds.FORMS, "gain", ("gain", {}, {}))


def contracts():
    """Every contract that runs over methods, with all its other parameters."""
    for name, test in vars(test_laws).items():
        marks = {m.args[0]: m.args[1] for m in getattr(test, "pytestmark", []) if m.name == "parametrize"}
        form = next((key for key in marks if "form" in str(key)), None)
        if name.startswith("test_") and form and "dropout" not in name:
            yield name, marks, form


@pytest.mark.parametrize("name", [name for name, *_ in contracts()])
def test_a_toy_method_passes(name, gain, request):
    marks = next(m for n, m, _ in contracts() if n == name)
    rows = [{}]
    for key, values in marks.items():
        if "form" in key:  # ("form", "kind") or "form"
            values = (
                ["gain"] if isinstance(key, str) else [("gain", kind) for kind in dict.fromkeys(k for _, k in values)]
            )
        names = [key] if isinstance(key, str) and "," not in key else list(key)
        rows = [{**row, **dict(zip(names, [v] if len(names) == 1 else v, strict=True))} for row in rows for v in values]
    test = getattr(test_laws, name)
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    for row in rows:
        torch.manual_seed(0)
        test(**row, **{arg: request.getfixturevalue(arg) for arg in wanted if arg not in row})


def test_it_is_short():
    lines = Path(__file__).read_text().split("@dataclass")[1].split("@pytest.fixture")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) < 30

"""What doctor says of an installation, with what is missing, too old or in the way."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest

import diffpeft
from diffpeft import doctor
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.tools import diagnosis

REQUIRES = ["torch>=2.6", "click>=8.4.2", "gguf>=0.19; extra == 'llm'", "nothing-like-it>=1; extra == 'video'", "ruff==1; extra == 'dev'"]  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """An installation that needs these, in these versions."""

    def do(versions, requires=REQUIRES):
        monkeypatch.setattr(metadata, "requires", lambda name: requires)
        real = metadata.version
        monkeypatch.setattr(metadata, "version", lambda name: versions[name] if name in versions else real(name))

    return do


def test_versions_extras_and_device(installed):
    installed({"torch": "2.13.0", "click": "8.5.1", "gguf": "0.19.0"})
    seen = doctor()
    assert seen.versions["torch"] == "2.13.0" and seen.versions["diffpeft"] == diffpeft.__version__
    assert seen.extras == {"llm": (), "video": ("nothing-like-it",)} and seen.device["cores"]
    assert not seen.problems


def test_what_is_too_old_or_missing_is_a_problem_with_the_way_out(installed):
    installed({"torch": "2.5.1"}, ["torch>=2.6", "nothing-like-it>=1"])
    old, missing = doctor().problems
    assert "torch is 2.5.1" in old and "pip install 'torch>=2.6'" in old and "nothing-like-it is missing" in missing


def test_another_module_called_converters_is_told(tmp_path, monkeypatch):
    assert not diagnosis._shadowed()
    (tmp_path / "converters.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "converters"]:
        monkeypatch.delitem(sys.modules, name)
    (told,) = diagnosis._shadowed()
    assert str(tmp_path / "converters.py") in told and "from diffpeft import converters" in told


def test_a_checkout_that_is_not_installed_has_a_diagnosis_too(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert not doctor().problems


def test_the_command(installed, capsys, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    installed({"torch": "2.13.0", "click": "8.5.1", "gguf": "0.19.0"})
    assert run(cli, ["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "extra video: lacks nothing-like-it: pip install 'diffpeft[video]'" in out
    installed({"torch": "2.5"})
    assert run(cli, ["doctor", "--json"]) == 1
    assert "torch is 2.5" in json.loads(capsys.readouterr().out)["problems"][0]

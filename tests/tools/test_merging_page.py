"""docs/merging.md: every command and every line of Python on it runs, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import diffpeft
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from tests.converters import factory
from tests.tools.test_extracting import Model

PAGE = Path(diffpeft.__file__).parent.parent / "docs" / "merging.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page names."""
    path = tmp_path_factory.mktemp("page")
    factory.checkpoint("kohya", "sd15", "lora", seed=1, ranks=(8, 6), dtype=torch.float32).save(path, "style")
    factory.checkpoint("kohya", "sd15", "loha", seed=2, dtype=torch.float32).save(path, "person")
    model = Model("sd15")
    model.folder(path / "base-folder", False)
    model.folder(path / "tuned-folder", True)
    model.file(path / "base-model.safetensors", False)
    model.file(path / "my-model.safetensors", True)
    return path


@pytest.mark.slow
def test_the_page_says_what_it_can_do(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    assert len(lines) >= 10
    for line in lines:
        assert run(cli, shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert (folder / "small.safetensors").stat().st_size <= 20_000 and "energy kept" in capsys.readouterr().out


def test_its_python_runs(folder, monkeypatch, tmp_path):
    for name in ("style.safetensors", "person.safetensors", "base-folder", "tuned-folder"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "python":
            exec(text, {"diffpeft": diffpeft})
    assert (tmp_path / "style-08.safetensors").is_file()

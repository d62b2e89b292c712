"""Every command and every line of Python on the page about files does what it says, in order, in a folder with the files that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffpeft
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.pipeline.open import weightless
from tests.tools.test_verifying import lora

PAGE = Path(diffpeft.__file__).parent.parent / "docs" / "files.md"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.S)


def test_the_page_has_a_command_for_each_tool():
    told = {shlex.split(line)[1] for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()}
    assert told >= {"list", "inspect", "prune", "bake", "edit", "diff", "verify", "doctor"}


@pytest.mark.slow
def test_all_of_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    Path("loras").mkdir()
    tensors = lora(weightless(), ("to_q", "fc1", "ff.net.0.proj"))
    save_file(tensors, "loras/style.safetensors", {"format": "pt"})
    Image.new("RGB", (64, 64)).save("picture.png")
    capsys.readouterr()  # what libraries print when they are loaded
    for kind, block in BLOCKS:
        for line in block.splitlines() if kind == "sh" else ():
            code = run(cli, shlex.split(line)[1:])
            told = capsys.readouterr()
            assert code == 0 and not told.err, (line, told.err)
        if kind == "python":
            exec(block, {"diffpeft": diffpeft, "torch": torch})


@pytest.mark.parametrize("name", ["list_adapters", "prune", "bake", "edit", "diff", "verify", "doctor"])
def test_each_is_a_function_too(name):
    assert callable(getattr(diffpeft, name)) and getattr(diffpeft, name).__doc__

"""No command replaces a file that is there, unless it is told to: all that have an output, those that come later among them."""

from __future__ import annotations

import click
import pytest
import torch
from safetensors.torch import save_file

from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.train.checkpoints import SavedState

NEVER = {"fuse"}  # it writes a new folder or none
RUNS = {"train", "sft", "slider"}  # whose folders hold states to go on from: tests/cli/test_resume_command.py
KEY = "lora_unet_down_blocks_0_attentions_0_proj_in"
# {command: (arguments, the files that are there)}
OUTPUTS = {
    "convert": (("convert", "a.safetensors", "b.safetensors", "--to", "diffusers"), ["b.safetensors"]),
    "convert to a folder": (("convert", "a.safetensors", "b", "--to", "peft"), ["b/adapter_config.json"]),
    "generate": (("generate", "-p", "x", "-o", "b.png"), ["b.png"]),
    "demo": (("demo", "-o", "b"), ["b/openmoji.kohya.safetensors"]),
    "prune": (("prune", "a.safetensors", "b.safetensors", "--blocks", "text_encoder"), ["b.safetensors"]),
    "merge": (("merge", "a.safetensors", "-o", "b.safetensors"), ["b.safetensors"]),
    "extract": (("extract", "--base", "a", "--tuned", "c", "-o", "b.safetensors"), ["b.safetensors"]),
    "resize": (("resize", "a.safetensors", "b.safetensors", "--rank", "1"), ["b.safetensors"]),
    "scale": (("scale", "a.safetensors", "b.safetensors", "0.5"), ["b.safetensors"]),
    "bake": (("bake", "a.safetensors", "b.safetensors", "--blocks", "unet=0.5"), ["b.safetensors"]),
    "list": (("list", ".", "--html", "b.html"), ["b.html"]),
    "edit": (("edit", "a.safetensors", "--set", "x=y", "-o", "b.safetensors"), ["b.safetensors"]),
    "average": (("average", "run", "-o", "b"), ["b/x.safetensors"]),
}


def commands(group=cli, above=()):
    """{words: command} of all commands."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


def has_output(command):
    return any(p.name == "out" for p in command.params)


def test_every_command_with_an_output_has_the_option_and_a_case_here():
    with_output = {name for name, command in commands() if has_output(command)} - NEVER
    for name, command in commands():
        assert (name in with_output) == any(p.name == "overwrite" for p in command.params), name
    assert with_output - RUNS == {args[0] for args, _ in OUTPUTS.values()}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with what the commands read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    pair = {f"{KEY}.lora_down.weight": torch.ones(2, 32), f"{KEY}.lora_up.weight": torch.ones(32, 2)}
    save_file(pair, "a.safetensors")
    for step in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"x-step{step:08}"
        folder.mkdir(parents=True)
        save_file(pair, folder / "x.safetensors")
    return tmp_path


@pytest.mark.parametrize("case", OUTPUTS)
def test_what_is_there_stays_and_the_way_out_is_told(case, files, capsys, monkeypatch):
    args, there = OUTPUTS[case]
    monkeypatch.setattr("diffpeft.train.posthoc.states_of", _states)
    for name in there:
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"mine")
    assert run(cli, list(args)) == 2
    told = capsys.readouterr().err
    assert "--overwrite" in told and (there[0].split("/")[-1]) in told
    assert all((files / name).read_bytes() == b"mine" for name in there)


def _states(out):
    return [SavedState(n, folder) for n, folder in enumerate(sorted((out / "checkpoints").iterdir()), start=1)]


@pytest.mark.parametrize("case", ["convert", "convert to a folder"])
def test_with_the_option_it_is_replaced(case, files):
    args, there = OUTPUTS[case]
    for name in there:
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"mine")
    assert run(cli, [*args, "--overwrite"]) == 0
    assert all((files / name).read_bytes() != b"mine" for name in there)

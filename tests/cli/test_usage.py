"""Arguments that a command does not understand are told like every other error: what, and what to do, in a few lines; for all commands."""

from __future__ import annotations

import click
import pytest

from diffpeft import ConfigError, patterns
from diffpeft.cli import SECTIONS, cli
from diffpeft.cli.errors import run
from tests.cli.test_overwrite import commands


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where some files lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    (tmp_path / "loras").mkdir()
    for name in ("style.safetensors", "picture.png"):
        (tmp_path / "loras" / name).write_bytes(b"x")


def lines(args, capsys) -> list[str]:
    assert run(cli, list(args)) == 2
    out, err = capsys.readouterr()
    said = err.splitlines()
    assert not out and said[0].startswith("Error: ") and said[-1].startswith("  try: ") and len(said) <= 3, said
    return said


ALONE = {
    "doctor",
    "demo",
    "train",
    "slider",
    "sft",
    "generate",
    "list",
    "data",
}  # commands that need no argument, or check it themselves


@pytest.mark.parametrize("name", sorted(name for name, _ in commands() if name.split()[0] not in ALONE))
def test_a_command_without_its_arguments(name, capsys):
    assert f"diffpeft {name} --help" in lines(name.split(), capsys)[-1]


CHOICES = [
    (name, option)
    for name, command in commands()
    for option in command.params
    if isinstance(option.type, click.Choice) and isinstance(option, click.Option)
]


@pytest.mark.parametrize(("name", "option"), CHOICES, ids=[f"{name} {option.opts[-1]}" for name, option in CHOICES])
def test_a_word_that_is_no_choice_is_answered_with_the_nearest(name, option, capsys):
    choice = max(option.type.choices, key=len)
    said = lines([*name.split(), option.opts[-1], f"{choice}x"], capsys)
    assert f"'{choice}x'" in said[0] and f"Did you mean '{choice}'" in said[-1]


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("list", "lora"), "'loras'"),
        (("list", "lora/x/y"), "'loras'"),
        (("edit", "loras/style.safetensors", "--thumbnail", "loras/pictur.png"), "'picture.png'"),
        (("edit", "loras", "--set", "a=b"), "'loras/style.safetensors'"),
        (("mrege", "a"), "'merge'"),
        (("diff", "a", "b", "-m", "lora"), "'loras'"),
    ],
)
def test_what_there_is_not_is_answered_with_what_is_near(args, meant, capsys):
    assert meant in lines(args, capsys)[-1]


MISSING = {  # {command: how a file is given to it}
    "inspect": "inspect {}",
    "convert": "convert {} out.safetensors --to kohya",
    "merge": "merge {} -o out.safetensors",
    "extract": "extract --base {} --tuned {} -o out.safetensors",
    "resize": "resize {} out.safetensors --rank 1",
    "scale": "scale {} out.safetensors 0.5",
    "prune": "prune {} out.safetensors --blocks unet",
    "bake": "bake {} out.safetensors --blocks unet=0.5",
    "edit": "edit {} --set a=b",
    "diff": "diff {} loras/style.safetensors",
    "verify": "verify {}",
}


def test_every_command_that_reads_files_is_asked():
    sections = {
        command.name for heading in ("Look at adapter files", "Write adapter files") for command in SECTIONS[heading]
    }
    assert sections == {name.split()[0] for name in MISSING} | {"list"}


@pytest.mark.parametrize("path", ["loras/stile.safetensors", "lorass/style.safetensors"])
@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_is_not_there_is_answered_with_what_is_near(name, path, capsys, tmp_path):
    assert run(cli, MISSING[name].format(*[path] * 2).split()) == 4
    said = capsys.readouterr().err.splitlines()
    assert said[1] == f"  in: {path}", said
    assert ("'loras'" if "lorass" in path else "'style.safetensors'") in said[-1], said
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "args", ["scale {} out 0.5", "scale {} out -0.5", "scale {} out -.5e-1 --family sd15", "scale {} out -- -2"]
)
def test_a_negative_strength_is_no_option(args, capsys):
    assert run(cli, args.format("loras/style.safetensors").split()) == 4
    assert "truncated" in capsys.readouterr().err  # the file is read


def test_a_regular_expression_that_is_none_has_a_remedy():
    with pytest.raises(ConfigError) as error:
        patterns.fullmatch("[", "layers")
    assert error.value.remedy


NUMBERS = [
    (name, option)
    for name, command in commands()
    for option in command.params
    if isinstance(option.type, (click.types.FloatParamType, click.FloatRange))
    and name.split()[0] not in ("train", "slider", "sft", "data")
]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("name", "option"), NUMBERS, ids=[f"{name} {option.opts[-1]}" for name, option in NUMBERS])
def test_a_number_is_finite(name, option, text):
    """Of training, the fields check themselves: tests/train."""
    with pytest.raises(click.BadParameter, match=r"finite|range"):
        option.type.convert(text, option, None)
    assert option.type.convert("0.5", option, None) == 0.5

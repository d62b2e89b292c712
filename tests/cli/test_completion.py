"""Shells complete files and words: no option that names a file, or is one of some words, is a text of any kind. `--debug` stands with every command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete, ShellComplete, get_completion_class

from diffpeft.cli import cli
from diffpeft.cli.completion import listed_words
from diffpeft.methods.layout import LAYOUTS

ROOT = Path(__file__).parent.parent.parent
TEXTS = (  # that nobody but the user knows; a new option that is none of these has a type, or what completes it
    "allow_unchanged author class_prompt description erase filename instance_prompt layers license lr_pattern name negative optimizer_args "
    "blocks pairs positive preserve prior_prompts prompt push_to_hub rank_pattern revision sample_prompt sigma_range base_range subfolder "
    "target token trigger trigger_words unset variant grids max_size more seed"
)
FREE = set(TEXTS.split())


def commands(command=cli, path=()):
    """(names, command) of all that can be typed."""
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name, below in inner.items():
        yield from commands(below, (*path, name))


EVERY = list(commands())


@pytest.mark.parametrize("path, command", EVERY, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_no_option_that_has_words_or_files_is_a_plain_text(path, command):
    texts = [p for p in command.params if isinstance(p.type, click.types.StringParamType)]
    assert not {p.name for p in texts if p._custom_shell_complete is None} - FREE
    assert not {p.name for p in texts if p._custom_shell_complete is not None} & FREE
    for p in command.params:
        says = f"{p.metavar or ''} {getattr(p, 'help', '') or ''}".upper()
        if any(word in says.split() for word in ("FILE", "FILE...", "DIR", "FOLDER")) and p.name not in FREE:
            assert p.name not in {text.name for text in texts if text._custom_shell_complete is None}


@pytest.mark.parametrize("path, command", EVERY, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_debug_is_in_every_commands_options(path, command):
    with click.Context(command, info_name=" ".join(path)) as ctx:
        assert "--debug" in command.get_help(ctx)
    assert len([p for p in command.params if "--debug" in p.opts]) == 1


def offered(*words, begun="", kind=ShellComplete):
    items = kind(cli, {}, "diffpeft", "_DIFFPEFT_COMPLETE").get_completions([*words], begun)
    return [(item.type, item.value) for item in items]


@pytest.mark.parametrize(
    "words, begun, answer",
    [
        (("train", "--method"), "lok", [("plain", "lokr")]),
        (("train", "--formats"), "diffusers,comf", [("plain", "diffusers,comfyui")]),
        (("train", "--targets"), "attn-", [("plain", "attn-mlp")]),
        (("sft", "--targets"), "all", [("plain", "all-linear")]),
        (("train", "--allow"), "steps,ran", [("plain", "steps,rank"), ("plain", "steps,rank_pattern")]),
        (("train", "--memory"), "1", [("plain", "12GB"), ("plain", "16GB")]),
        (("train", "-d"), "pho", [("file", "pho")]),
        (("train", "--resume"), "ou", [("file", "ou")]),
        (("train", "--base-lora"), "a", [("file", "a")]),
        (("generate", "--lora"), "a", [("file", "a")]),
        (("inspect",), "a", [("file", "a")]),
        (("convert", "a", "b", "--to"), "com", [("plain", "comfyui")]),
        (("convert", "a", "b", "--family"), "sdxl_", [("plain", "sdxl_refiner")]),
        (("fuse",), "--deb", [("plain", "--debug")]),
        ((), "insp", [("plain", "inspect")]),
    ],
)
def test_what_is_offered(words, begun, answer):
    assert offered(*words, begun=begun) == answer


def test_methods_and_presets_that_are_offered_are_those_that_there_are():
    from diffpeft.model.target import PRESETS

    assert {value for _, value in offered("train", "--targets")} == {*PRESETS}
    assert {value for _, value in offered("demo", "--method")} <= {*LAYOUTS}
    assert listed_words(["a", "b"])(None, None, "a,") == ["a,b"]


def test_bash_offers_files_where_an_option_has_no_words():
    kind = get_completion_class("bash")
    assert issubclass(kind, BashComplete) and kind is not BashComplete
    assert "-o default -F" in kind.source_template and offered("train", "--name", kind=ShellComplete) == []


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_of_the_page_gives_a_script(shell, tmp_path):
    page = (ROOT / "docs" / "completion.md").read_text()
    assert f"_DIFFPEFT_COMPLETE={shell}_source diffpeft" in page
    program = tmp_path / "diffpeft"
    program.write_text(f"#!{sys.executable}\nfrom diffpeft.cli import main\nmain()\n")
    program.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    source = subprocess.run(
        [program], env=env | {"_DIFFPEFT_COMPLETE": f"{shell}_source"}, capture_output=True, text=True
    )
    assert source.returncode == 0 and "diffpeft" in source.stdout and not source.stderr
    if shell == "bash" and shutil.which("bash"):
        typed = "COMP_WORDS=(diffpeft train --method lok); COMP_CWORD=3; _diffpeft_completion diffpeft"
        script = f"{source.stdout}\n{typed}; echo ${{COMPREPLY[@]}}; complete -p diffpeft"
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
        assert done.stdout.splitlines()[0] == "lokr" and "-o default" in done.stdout, done

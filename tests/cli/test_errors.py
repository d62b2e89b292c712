"""Errors of the system as people see them."""

import errno

import click
import pytest

from diffpeft.cli import cli
from diffpeft.cli.errors import naming, run


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """Other tests of this process keep their warnings."""
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)


def command(raises, path="out/a.safetensors"):
    @click.command()
    def job():
        with naming(path):
            raise raises

    return job


@pytest.mark.parametrize(
    "error, what, where",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", "out/a.safetensors"),
        (PermissionError(errno.EACCES, "Permission denied", "out/.hidden"), "Permission denied", "out/.hidden"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system", "out/a.safetensors"),
    ],
)
def test_what_cannot_be_written_is_named(error, what, where, capsys):
    assert run(command(error), []) == 1
    assert capsys.readouterr().err == f"Error: {what}\n  in: {where}\n"


def test_where_it_was_saved_instead_is_said(capsys):
    error = OSError(errno.ENOSPC, "No space left on device")
    error.add_note("It was saved in /tmp/x.")
    assert run(command(error), []) == 1
    assert capsys.readouterr().err.endswith("  but: It was saved in /tmp/x.\n")


@pytest.mark.parametrize(
    "args, says",
    [
        (("train", "--rnak", "3"), "Did you mean --rank?"),
        (("train", "--learning_rate", "3"), "Here that is --lr."),
        (("train", "--network-dim=3"), "Here that is --rank."),
        (("train", "--max_train_steps", "3"), "Here that is --steps."),
        (("train", "--output_dir", "x"), "Here that is --out."),
        (("sft", "--gradient-accumulation-steps", "3"), "Here that is --accumulate."),
        (("sft", "--per_device_train_batch_size", "3"), "Here that is --batch-size."),
        (("train", "--gradient-accumulation-steps", "3"), "diffpeft train --help"),
        (("generate", "--prmopt", "3"), "Did you mean --prompt?"),
    ],
)
def test_an_unknown_option_is_answered_with_one_that_there_is(args, says, capsys):
    assert run(cli, list(args)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Error: no option --") and says in said[1] and len(said) == 2


def test_a_shell_completes_words_and_files():
    from click.shell_completion import ShellComplete

    def offered(*args):
        *before, begun = args
        items = ShellComplete(cli, {}, "diffpeft", "_D").get_completions(before, begun)
        return [item.value if item.type == "plain" else item.type for item in items]

    assert offered("train", "--method", "lo") == ["lora", "loha", "lokr"]
    assert offered("convert", "a", "b", "--to", "ko") == ["kohya", "kohya-diffusers"]
    assert offered("inspect", "a") == offered("train", "-d", "a") == offered("generate", "--lora", "a") == ["file"]

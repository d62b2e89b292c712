"""Errors of the system as people see them."""

import errno
import re

import click
import pytest

import diffpeft.errors
from diffpeft.cli import cli
from diffpeft.cli.errors import naming, run
from diffpeft.errors import ConfigError, DiffpeftError


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


def classes(root=DiffpeftError):
    """A class and those below it, each under the first of its bases."""
    below = (c for child in root.__subclasses__() if child.__bases__[0] is root for c in classes(child))
    return [root, *below]


@pytest.mark.parametrize("kind", [c for c in classes() if c.__module__ == "diffpeft.errors"], ids=lambda c: c.__name__)
def test_every_error_has_the_exit_code_that_is_drawn_for_it(kind, capsys):
    (drawn,) = re.findall(rf"^[| `-]*{kind.__name__}(?: \(\w+\))? +(\d+)(?: |$)", diffpeft.errors.__doc__, re.MULTILINE)
    assert run(command(kind("it failed", where="a.bin", remedy="Do not.")), []) == kind.exit_code == int(drawn)
    assert capsys.readouterr().err == "Error: it failed\n  in: a.bin\n  try: Do not.\n"


def test_the_tree_is_drawn_whole_and_names_no_class_that_is_not_there():
    drawn = re.findall(r"^[| `-]*(\w+Error)\b", diffpeft.errors.__doc__, re.MULTILINE)
    assert drawn == [c.__name__ for c in classes() if c.__module__ == "diffpeft.errors"]


def test_an_error_of_another_module_has_the_code_of_its_kind(capsys):
    class NewError(ConfigError):
        """One that somebody adds."""

    class Newer(DiffpeftError):
        """One that is of no kind here."""

    assert [run(command(kind("no")), []) for kind in (NewError, Newer)] == [2, 1]


def test_where_it_was_saved_instead_is_said(capsys):
    error = OSError(errno.ENOSPC, "No space left on device")
    error.add_note("It was saved in /tmp/x.")
    assert run(command(error), []) == 1
    assert capsys.readouterr().err.endswith("  but: It was saved in /tmp/x.\n")


@pytest.mark.parametrize(
    "args, says",
    [
        (("train", "--rnak", "3"), "Did you mean --rank?"),
        (("sft", "--learning_rate", "3"), "Here that is --lr."),
        (("sft", "--network-dim=3"), "Here that is --rank."),
        (("sft", "--max_train_steps", "3"), "Here that is --steps."),
        (("sft", "--output_dir", "x"), "Here that is --out."),
        (("sft", "--gradient-accumulation-steps", "3"), "Here that is --accumulate."),
        (("sft", "--per_device_train_batch_size", "3"), "Here that is --batch-size."),
        (("train", "--max-seq-length", "3"), "Here that is --max-length."),
        (("train", "--qlora", "3"), "Here that is --quantize, which is nf4, int8 or fp8."),
        (("sft", "--vae", "3"), "diffpeft sft --help"),
        (("generate", "--prmopt", "3"), "Did you mean --prompt"),
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

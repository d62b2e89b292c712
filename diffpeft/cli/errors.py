"""Errors as people see them: what, where, remedy, a line each; and the exit code that tells scripts which kind it was."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TextIO

import click

from diffpeft.errors import DiffpeftError
from diffpeft.train import machines

SYSTEM, INTERRUPTED = 1, 130  # exit codes; those of our own errors stand on their classes


def run(command: click.Command, args: list[str] | None = None) -> int:
    """Run a command; its exit code. `--debug` anywhere among the arguments shows tracebacks and what libraries print."""
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    # Threads that spin long while they wait make a step a hundred times slower when another program wants the same cores; read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if not debug:
        _quieten()
    try:
        return (
            command.main([a for a in args if a != "--debug"], prog_name="diffpeft", standalone_mode=False, obj=args)
            or 0
        )
    except (KeyboardInterrupt, click.Abort) as error:
        return _interrupted(error)
    except click.ClickException as error:
        if machines.speaks(error.exit_code):
            _show_usage(error)
        return error.exit_code
    except Exception as error:
        code = error.exit_code if isinstance(error, DiffpeftError) else SYSTEM
        if not machines.speaks(code):  # another process of the run had an error before, which this one follows from
            return machines.shared_code(code)
        if not isinstance(error, (DiffpeftError, OSError)):
            raise
        if debug:
            traceback.print_exc()
        if isinstance(error, DiffpeftError):
            show(error)
            return error.exit_code
        _show_system(error)
        return SYSTEM


def _interrupted(error: BaseException) -> int:
    """Say that a command was interrupted, and where it left its state; the exit code. click makes its own exception of it."""
    cause = error.__cause__ or error
    if not machines.world().main:
        return getattr(cause, "exit_code", INTERRUPTED)
    click.echo("interrupted", err=True)
    for note in getattr(cause, "notes", ()):
        click.echo(f"  {note}", err=True)
    return getattr(cause, "exit_code", INTERRUPTED)


def _show_usage(error: click.ClickException) -> None:
    """An argument that the command line does not understand, as any other error: with the near matches, and what it is called here."""
    from diffpeft.cli.options import misunderstood, unknown_option

    if isinstance(error, click.NoSuchOption):
        show(unknown_option(error))
    elif isinstance(error, click.UsageError) and error.ctx:
        show(misunderstood(error, error.ctx))
    else:
        error.show()


def _show_system(error: OSError) -> None:
    """An error of the system, with the file that it is about."""
    click.echo(f"Error: {error.strerror or error}\n  in: {error.filename or 'this machine'}", err=True)
    _show_notes(error)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """What is written in this block is `path`: a full disk does not say so."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def show(error: DiffpeftError) -> None:
    """An error on stderr: what, where, remedy, a line each."""
    for label, text in (("Error:", error.what), ("  in:", error.where), ("  try:", error.remedy)):
        if text:
            click.echo(f"{label} {text}", err=True)
    _show_notes(error)


def _show_notes(error: Exception) -> None:
    """What was added to an error on its way: where something was saved in spite of it."""
    for note in getattr(error, "__notes__", ()):
        click.echo(f"  but: {note}", err=True)


def _quieten() -> None:
    """Libraries speak on stderr about what is no concern of the user's; our own warnings are one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # how processes find each other
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # they miss extensions that nothing here needs
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"diffpeft|converters")
    warnings.showwarning = _one_line


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning on stderr, in place of `warnings.showwarning`; of several processes the main one's."""
    if machines.world().main:
        click.echo(f"warning: {message}", err=True)

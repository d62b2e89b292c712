"""Errors as people see them: what, where, remedy, a line each; and the exit code that tells scripts which kind it was."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import click

from diffpeft.errors import (
    AdapterStateError,
    CannotConvertError,
    CheckpointError,
    ConfigError,
    DataError,
    DiffpeftError,
    DivergedError,
    NothingLearntError,
    UnknownNameError,
)

EXIT_CODES: dict[type[DiffpeftError], int] = {
    ConfigError: 2,
    UnknownNameError: 2,
    DataError: 3,
    CheckpointError: 4,
    CannotConvertError: 4,
    AdapterStateError: 4,
    DivergedError: 5,
    NothingLearntError: 6,
}
INTERRUPTED = 130


def run(command: click.Command, args: list[str] | None = None) -> int:
    """Run a command; its exit code. `--debug` anywhere among the arguments shows tracebacks and what libraries print."""
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    # Threads that spin long while they wait make a step a hundred times slower when another program wants the same cores; read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if not debug:
        _quieten()
    try:
        return command.main(args, prog_name="diffpeft", standalone_mode=False) or 0
    except click.NoSuchOption as error:
        from diffpeft.cli.options import unknown_option

        show(unknown_option(error))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error.strerror or error}\n  in: {error.filename or 'this machine'}", err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(f"  but: {note}", err=True)
        return 1
    except DiffpeftError as error:
        if debug:
            traceback.print_exc()
        show(error)
        return code_of(error)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """What is written in this block is `path`: a full disk does not say so."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def code_of(error: DiffpeftError) -> int:
    """The exit code of an error's kind."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def show(error: DiffpeftError) -> None:
    """An error on stderr: what, where, remedy, a line each."""
    for label, text in (("Error:", error.what), ("  in:", error.where), ("  try:", error.remedy)):
        if text:
            click.echo(f"{label} {text}", err=True)


def _quieten() -> None:
    """Libraries speak on stderr about what is no concern of the user's; our own warnings are one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # they miss extensions that nothing here needs
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"diffpeft|converters")
    warnings.showwarning = _one_line


def _one_line(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    click.echo(f"warning: {message}", err=True)


def quiet_bars() -> None:
    """No progress bars of diffusers and transformers: ours is the only one."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for module in (diffusers.utils.logging, transformers.utils.logging):
        module.disable_progress_bar()
        module.set_verbosity_error()

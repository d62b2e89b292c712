"""The command line in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_LOADED = [
    "torch",
    "diffusers",
    "transformers",
    "tests.cli.process",
]  # what most commands load before they notice a mistake


def diffpeft(*args, cwd, before=""):
    """Run a command as a shell would; with `before`, Python that makes it quicker."""
    program = ["-c", f"{before}; from diffpeft.cli import main; main()"] if before else ["-m", "diffpeft"]
    return subprocess.run(
        [sys.executable, *program, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


def quick(*args, cwd):
    """The same in a fork of a process that has the large libraries already."""
    with tempfile.TemporaryDirectory() as printed:
        return _forked(args, cwd, printed)


def _forked(args, cwd, out):
    """What is printed goes into two files in the folder `out`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    process = context.Process(target=_main, args=(list(map(str, args)), str(cwd), str(out)))
    process.start()
    process.join()
    texts = (Path(out, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(args, process.exitcode, *texts)


def _main(args, cwd, out):
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(out, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = ["diffpeft", *args]
    runpy.run_module("diffpeft", run_name="__main__")

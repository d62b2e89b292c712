"""Several processes of one command, as one: they get its signals, and it ends as the first of them that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from diffpeft.train import machines
from diffpeft.train.config import Options
from diffpeft.train.signals import handled

GRACE = 30.0  # seconds in which the others may end after one has failed
LAUNCHER = "DIFFPEFT_LAUNCHER"  # the process that started this one


def launched(options: Options) -> int | None:
    """Run the command that is running in as many processes as were asked for, and give its exit code; None if it is to be run here."""
    if (options.num_processes or 1) == 1 or machines.world().size > 1:
        return None
    options.validate()  # what is wrong with them is told before a process starts
    machines.check_shards(options)
    args: list[str] = click.get_current_context().find_root().obj
    return run_all([sys.executable, "-m", "diffpeft", *args], options.num_processes or 1)


def run_all(command: Sequence[str], count: int) -> int:
    """Run a command in so many processes; the exit code. Each has a session of its own: what is typed comes through this one."""
    with tempfile.TemporaryDirectory(prefix="diffpeft-") as folder:
        processes: list[subprocess.Popen[bytes]] = []

        def forward(number: int, frame: FrameType | None) -> None:
            for process in processes:
                process.send_signal(number)

        with handled(forward):
            for rank in range(count):
                environment = _environment(rank, count, Path(folder))
                processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
                )
            return _outcome(processes)


def _environment(rank: int, count: int, folder: Path) -> dict[str, str]:
    """What tells a process which of how many it is. Threads are divided between them, where nothing is said."""
    threads = str(max((os.cpu_count() or 1) // count, 1))
    numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, LAUNCHER: os.getpid()}
    return (
        {"OMP_NUM_THREADS": threads}
        | dict(os.environ)
        | {name: str(number) for name, number in numbers.items()}
        | {machines.MEETING: str(folder / "meeting")}
    )


def _outcome(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all, and end those that are still there a while after one has failed; the exit code."""
    failed = None
    while None in (codes := [process.poll() for process in processes]):
        if failed is None and any(codes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > GRACE:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    own_codes = [code for code in codes if code and code > 0]
    if own_codes or not any(codes):
        return max(own_codes, default=0)
    number = max(-(code or 0) for code in codes)
    click.echo(f"Error: the processes of the run were ended by signal {number}", err=True)
    return 128 + number


def follow_launcher() -> None:
    """End this process as SIGTERM does, with its state saved, when the one that started it is gone."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True).start()


def wait_for_main() -> None:
    """In all processes but the main one: wait until it has found options and data well."""
    if not machines.world().main:
        from diffpeft.train.team import meet

        meet()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)

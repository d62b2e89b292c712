"""Processes of one run, as forks of the one that tests."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from diffpeft.train import machines
from diffpeft.train.team import meet
from tests.robustness.kills import forked


def processes(folder: Path, job: Callable[[], object], count: int = 2, seconds: float = 60) -> list[int]:
    """The exit codes of so many processes of a run that do a job, negative the signals that ended them. Those that hang are killed."""
    folder.mkdir(exist_ok=True)
    meeting = folder / f"meeting-{time.time_ns()}"  # one that is left over would mislead them

    def begun(rank: int) -> int:
        numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, machines.MEETING: meeting}
        return forked(lambda: _begin(folder, job, {name: str(value) for name, value in numbers.items()}, seconds))

    pids = [begun(rank) for rank in range(count)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < count:
        for pid in pids:
            ended, status = (0, 0) if pid in codes else os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif pid not in codes and time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _begin(folder: Path, job: Callable[[], object], environment: dict[str, str], seconds: float) -> None:
    rank = environment["RANK"]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stack = open(folder / f"error-{rank}.txt", "w")  # noqa: SIM115 - as long as the process lives
    faulthandler.dump_traceback_later(seconds - 2, file=stack)  # where one is that hangs
    os.environ.update(environment)
    torch.set_num_threads(1)
    meet()
    try:
        job()
    except BaseException as error:
        with open(folder / f"error-{rank}.txt", "w") as f:
            f.write("".join(traceback.format_exception(error)))
        raise
    os._exit(0)

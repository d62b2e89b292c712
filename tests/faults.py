"""Failures and interrupts at any step of an operation: what is there is what was there before, or what the finished operation gives, never between."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import diffpeft
from diffpeft import converters

OURS = tuple(str(Path(package.__file__).parent) for package in (diffpeft, converters))
GENERATOR = inspect.CO_GENERATOR
SPREAD, LAST = 6, 9  # points over the whole of an operation, and of its end, where it commits
FAULTS = {
    "fails": (MemoryError, ("call", "c_call")),  # whatever our code calls, its own functions or C
    "is interrupted": (KeyboardInterrupt, ("call", "return", "c_return")),  # where CPython looks for Ctrl-C
}


class Fault:
    """While it is entered: counts events in our code, and raises at the `at`-th. 0 counts only."""

    def __init__(self, at, error, events):
        self.at, self.error, self.events, self.seen = at, error, events, 0

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _profile(self, frame, event, arg):
        code = frame.f_code
        if event not in self.events or not code.co_filename.startswith(OURS):
            return
        # leaving a lock does not fail, and an interrupt that meets it comes after it; a generator that yields is not at its end
        if getattr(arg, "__name__", "") in ("__exit__", "release") or (event == "return" and code.co_flags & GENERATOR):
            return
        self.seen += 1
        if self.seen == self.at:
            raise self.error("injected")


def points(n: int) -> list[int]:
    """Some points of n: over the whole, and the last ones."""
    return sorted({*range(1, n + 1, max(1, n // SPREAD)), *range(max(1, n - LAST), n + 1)})


def stepped(
    fault: str,
    started: Callable[[], object],
    operate: Callable[[object], object],
    state: Callable[[object], dict],
    restored: Callable[[], None] = lambda: None,
    *,
    chosen: Callable[[int], list[int]] = points,
    changes: bool = True,
) -> tuple[list[str], int]:
    """An operation with a fault at each of the chosen points. -> what is neither begun nor done, in words, and at how many points the fault struck.

    Args:
        started: makes what is operated on.
        state: all by which one state of that can be told from another.
        restored: makes what lies outside of it (files) what it was.
        changes: whether the operation leaves another state.
    """
    error, events = FAULTS[fault]

    def run(subject, at=0):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Fault(at, error, events) as found:
                operate(subject)
        return found.seen

    run(started())  # what is imported and kept once
    restored()
    counted = []
    for _ in range(2):  # a run that tidies too (entries of closed files) takes more steps than those after it
        subject = started()
        before = state(subject)
        counted.append(run(subject))
        after = state(subject)
        restored()
    n = min(counted)
    assert n > 10 and (before != after) == changes
    broken, struck = [], 0
    for at in chosen(n):
        subject = started()
        with contextlib.suppress(error):
            run(subject, at)
            struck -= 1  # it struck where an object was finalised, which Python only reports
        struck += 1
        got = state(subject)
        begun, done = ([part for part in got if got[part] != end[part]] for end in (before, after))
        if begun and done:
            broken.append(f"step {at} of {n}: changed {begun}, not finished {done}")
        restored()
    return broken, struck

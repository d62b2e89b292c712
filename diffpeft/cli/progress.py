"""What the commands show while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from diffpeft.cli.launch import follow_launcher, wait_for_main
from diffpeft.train import machines
from diffpeft.train.config import Options
from diffpeft.train.lock import occupied
from diffpeft.train.progress import Progress
from diffpeft.train.signals import ending
from diffpeft.train.watch import Quiet, Watch

__all__ = ["Progress", "running"]


@contextlib.contextmanager
def running(options: Options) -> Iterator[Watch]:
    """A run, in this process or in one of several: signals end it, its output folder is its own, and it says how it gets on.

    Of several processes the main one prints, and the others begin when it has begun: what it refuses is refused once.
    """
    follow_launcher()
    watching = Progress() if machines.world().main else contextlib.nullcontext(Quiet())
    with ending(), watching as watch, occupied(options.output()):
        wait_for_main()
        yield watch

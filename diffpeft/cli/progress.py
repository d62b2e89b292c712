"""What the commands show while they work."""

import contextlib

from diffpeft.train import machines
from diffpeft.train.progress import Progress
from diffpeft.train.watch import Quiet, Watch

__all__ = ["Progress", "watching"]


def watching() -> contextlib.AbstractContextManager[Watch]:
    """Who prints how a run is getting on; of several processes the main one's does."""
    return Progress() if machines.world().main else contextlib.nullcontext(Quiet())

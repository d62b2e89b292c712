"""What must hold before a run's adapter is worth training, and afterwards worth keeping: ranks that do something, room on the disk, a change."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from diffpeft.errors import ConfigError, NothingLearntError
from diffpeft.layers.carried import effective, op_of
from diffpeft.layers.slot import Slot
from diffpeft.model.target import adapted
from diffpeft.train.config import Options
from diffpeft.train.method import RANKED


def check_rank(config: Options, layers: Iterable[nn.Module]) -> None:
    """Raise ConfigError for a rank that is above both sides of the weights of all these layers."""
    shapes = [op_of(layer).geometry for layer in layers]
    limit = max((min(shape.out, shape.columns) for shape in shapes if not shape.lookup), default=config.rank)
    if config.method in RANKED and config.rank > limit:
        raise ConfigError(
            f"rank is {config.rank}, and the largest layer that was chosen has a rank of {limit}",
            remedy=f"Pass --rank {limit} or less; 4 to 128 is usual.",
        )


def check_room(out: Path, parameters: Sequence[nn.Parameter], files: int) -> None:
    """Raise OSError if the disk of `out` has no room for so many files of these parameters."""
    needed = files * sum(p.numel() * p.element_size() for p in parameters)
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        what = f"{needed / 2**20:.1f} MiB are needed for the adapter, and {free / 2**20:.1f} MiB are free"
        raise OSError(errno.ENOSPC, what, str(out))


def refuse_unlearnt(models: Iterable[nn.Module], name: str) -> None:
    """Raise NothingLearntError if the adapter changes no weight of any layer, in float64."""
    for model in models:
        if any(name in record.slots and _changes(module, record.slots[name]) for _, module, record in adapted(model)):
            return
    raise NothingLearntError(
        "the adapter changes nothing: every layer's change is exactly zero",
        remedy="Train for more steps, or with a higher --lr.",
    )


@torch.no_grad()
def _changes(module: nn.Module, slot: Slot) -> bool:
    """Whether an adapter changes a layer's weight or bias, in float64."""
    op = op_of(module)
    base = {"weight": op.stored(op.weight()).double()}  # a quantised weight as numbers
    base |= {} if op.bias is None else {"bias": op.bias.double()}
    after = effective(module, [(slot, 1.0)], torch.float64, base)
    return any(name not in base or not torch.equal(t, base[name]) for name, t in after.items())


def rescued(write: Callable[[Path], list[Path]], out: Path, name: str) -> list[Path]:
    """What `write` writes into `out`. If that cannot be, it is written into a temporary folder, which the OSError names in a note."""
    try:
        return write(out)
    except OSError as error:
        error.filename = error.filename or str(out)
        with contextlib.suppress(OSError):
            rescue = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            write(rescue)
            error.add_note(f"The adapter is not lost: it was saved in {rescue}.")
        raise

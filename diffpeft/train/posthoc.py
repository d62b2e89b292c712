"""Averages of an adapter over its states, made afterwards: the power function averages of Karras et al. 2024, arXiv:2312.02696, section 3.1.

The average after t steps is (g + 1) / t^(g + 1) times the integral of s^g w(s) from 0 to t: late parameters weigh more, and the more the larger g is. Between
two states the parameters are taken to be those of the later one, so that the weight of a state is the integral over the steps since the one before.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from diffpeft import io
from diffpeft.converters.hashes import hashes, sorted_as_safetensors
from diffpeft.errors import ConfigError
from diffpeft.files import folder, refuse_existing
from diffpeft.handles import Handle
from diffpeft.train.checkpoints import FACTS, MANIFEST, SavedState, checkpoints_in
from diffpeft.train.state import FILE, read

_STATE = {FILE, FACTS, MANIFEST}  # the files of a state that are no adapter's


def exponent(width: float) -> float:
    """g of an average whose weights have this standard deviation over t, from 0 (the last state alone) to 0.28 (all states alike, g = 0)."""
    if not 0 < width <= 1 / math.sqrt(12):
        raise ConfigError(f"width is {width}", remedy="It is above 0 and at most 0.2886; 0.05 to 0.2 is usual.")
    low, high = 0.0, 1e6
    for _ in range(200):  # the deviation falls with g
        g = (low + high) / 2
        low, high = (g, high) if deviation(g) > width else (low, g)
    return low


def deviation(g: float) -> float:
    """The standard deviation, over t, of the weights of an average with exponent g."""
    return math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3))


def weights(steps: Sequence[int], width: float) -> list[float]:
    """The weights of states after these steps, which add up to 1."""
    g, last = exponent(width), steps[-1]
    shares = [(step / last) ** (g + 1) for step in steps]
    return [share - before for share, before in zip(shares, [0.0, *shares], strict=False)]


def states_of(out: Path) -> list[SavedState]:
    """The states of a run, at least two. Raises ConfigError."""
    states = checkpoints_in(out)
    if len(states) < 2:
        raise ConfigError(
            f"there are {len(states)} states to average",
            where=out,
            remedy="Train with --save-every and --keep so that some are kept.",
        )
    return states


def average(run: Path, out: Path, width: float, overwrite: bool = True) -> list[Path]:
    """Write the average over a run's states of the adapter files that they hold, each under its own name; the paths.

    What is equal in all states, such as alphas, and what is no floating-point tensor stays as in the last one; what the files say is
    what the last one says, with hashes of their own. Without `overwrite` files that are there already are a ConfigError. Raises ConfigError or OSError.
    """
    states = states_of(run)
    shares = weights([state.step for state in states], width)
    names = [path.relative_to(states[-1].folder) for path in sorted(states[-1].folder.rglob("*")) if path.is_file()]
    names = [name for name in names if str(name) not in _STATE and all((s.folder / name).is_file() for s in states)]
    refuse_existing([out / name for name in names], overwrite)
    note = json.dumps({"steps": [state.step for state in states], "width": width})
    with folder(out) as temporary:
        for name in names:
            paths = [state.folder / name for state in states]
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if name.suffix != ".safetensors":
                shutil.copyfile(paths[-1], temporary / name)
                continue
            tensors = sorted_as_safetensors(averaged_files(paths, shares))
            metadata = io.header(paths[-1])[1] | {"diffpeft.average": note}
            told = hashes(tensors, metadata) if "sshs_model_hash" in metadata else {}
            io.save(temporary / name, tensors, metadata | told)
    return [out / name for name in names]


def averaged_files(paths: Sequence[Path], shares: Sequence[float]) -> dict[str, Handle]:
    """{key: the weighted sum of the tensors of that name in these files}, in the dtype that they have."""
    files = [read(path) for path in paths]
    out = {}
    for key, last in files[-1].items():
        tensors = [file[key] for file in files]
        if last.is_floating_point() and not all(torch.equal(t, last) for t in tensors):
            sums = sum(share * t.double() for share, t in zip(shares, tensors, strict=True))
            last = torch.as_tensor(sums).to(last.dtype)
        out[key] = io.handle(last.contiguous())
    return out

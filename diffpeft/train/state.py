"""What a run must know to go on to the same bytes, as data: tensors in safetensors files and everything else as JSON, never a pickle.

The tensors are in one file, state.safetensors: `adapter.` before the names of the parameters, `optimizer.` before those of the optimiser's tensors,
`ema.` before those of the averages, `run.` before those of the losses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import io
from diffpeft.errors import CheckpointError, ConfigError, listed

FILE = "state.safetensors"
ADAPTER, OPTIMIZER, EMA, RUN = "adapter", "optimizer", "ema", "run"  # the parts of it
_PLAIN = (bool, int, float, str, type(None))
_KINDS = {"list": list, "tuple": tuple}


def split(value: object, tensors: dict[str, Tensor], where: str) -> object:
    """A value as JSON, with its tensors put into `tensors` under the names of their places. Raises ConfigError for what is neither.

    Numbers, texts and None are themselves; all else is a table with one entry that says what it is, so that `joined` gives back equal types.
    """
    if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
        tensors[where] = value.detach()
        return {"tensor": where, "cpu": value.device.type == "cpu"}
    if type(value) is float and not math.isfinite(value):
        return {"number": repr(value)}
    if type(value) in _PLAIN:
        return value
    for name, kind in _KINDS.items():
        if type(value) is kind:
            return {name: [split(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, split(v, tensors, f"{where}.{key}")] for key, v in value.items()]}
    raise ConfigError(f"it holds a {type(value).__qualname__}", where=where)


def joined(value: object, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """What `split` took apart; tensors on `device`, but for those that were on the CPU."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = ((k, v) for k, v in value.items() if k != "cpu")
    if kind == "tensor":
        return tensors[content].to("cpu" if value["cpu"] else device)
    if kind == "number":
        return float(content)
    if kind == "dict":
        return {key: joined(v, tensors, device) for key, v in content}
    return _KINDS[kind](joined(v, tensors, device) for v in content)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[object, dict[str, Tensor]]:
    """The state of an optimiser as JSON and tensors. Raises ConfigError, which names it, if it holds anything else."""
    tensors: dict[str, Tensor] = {}
    try:
        return split(optimizer.state_dict(), tensors, "optimizer"), tensors
    except ConfigError as error:
        raise ConfigError(
            f"the state of {type(optimizer).__qualname__} cannot be saved: {error.what} at {error.where}",
            remedy="A state is tensors and numbers only. Choose another --optimizer.",
        ) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, table: object, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the state that it had. Raises CheckpointError if it is another's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = joined(table, tensors, torch.device("cpu"))
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the state is not one of {type(optimizer).__qualname__} for these layers ({error})",
            remedy="Go on with the options that the run was started with.",
        ) from error
    places = [place for group in state["param_groups"] for place in group["params"]]
    for parameter, place in zip(parameters, places, strict=True):
        if place in state["state"]:  # load_state_dict casts to the dtype of the parameter; the state has its own
            content = dict(dict(table["dict"])["state"]["dict"])[place]  # type: ignore[index]
            optimizer.state[parameter].update(joined(content, tensors, parameter.device))


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a safetensors file, in the order of their names."""
    handles = {name: io.handle(tensors[name].detach().cpu().contiguous()) for name in sorted(tensors)}
    io.save(path, handles, {})


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of such a file. Raises UnreadableFileError."""
    handles, _ = io.header(path)
    return dict(zip(handles, io.load(handles.values()), strict=True))


def write_parts(path: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write {part: {name: tensor}} into one file, as part.name."""
    write(path, {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()})


def read_parts(path: Path) -> dict[str, dict[str, Tensor]]:
    """What `write_parts` wrote; a part without tensors is empty. Raises UnreadableFileError."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (ADAPTER, OPTIMIZER, EMA, RUN)}
    for key, tensor in read(path).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    return parts


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the parameters the values of a file. Raises CheckpointError if they have other names, shapes or dtypes."""
    if parameters.keys() != tensors.keys():
        raise _other(path, parameters.keys() ^ tensors.keys())
    wrong = [n for n, p in parameters.items() if (p.shape, p.dtype) != (tensors[n].shape, tensors[n].dtype)]
    if wrong:
        raise _other(path, wrong)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _other(path: Path, names: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"the state is of another adapter: {listed(sorted(names), 5)}",
        where=path,
        remedy="Go on with the model, the method, the rank and the targets of the run.",
    )


def fingerprint(*parts: object) -> str:
    """A short hash of what a run reads, to tell whether it reads the same when it goes on."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

"""What must hold before a run's adapter is worth training, and afterwards worth keeping: ranks that do something, room on the disk, a change."""

from __future__ import annotations

import contextlib
import copy
import errno
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffpeft import patterns
from diffpeft.bundle import canonical
from diffpeft.errors import ConfigError, NothingLearntError, listed
from diffpeft.layers.carried import effective, op_of
from diffpeft.layers.hooks import present
from diffpeft.layers.slot import Slot
from diffpeft.model.target import adapted, components
from diffpeft.pipeline.adapters import unload
from diffpeft.pipeline.load import load_lora
from diffpeft.train.config import Options
from diffpeft.train.groups import entries_of, pattern_of
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


def check_room(out: Path, parameters: Sequence[nn.Parameter], files: float, options: Options | None = None) -> None:
    """Raise OSError if the disk of `out` has no room for so many files of these parameters, and for the states that the options ask for.

    A file of numbers of half the length is half a file.
    """
    size = sum(p.numel() * p.element_size() for p in parameters)
    states = (
        0
        if options is None or not options.save_every
        else min(options.keep + 1, -(-options.steps // options.save_every))
    ) + 2 * bool(getattr(options, "heldout", None))  # the best one, and the last beside it
    of_state = (
        3 + files + (options is not None and options.ema is not None)
    )  # the adapter, two moments, its files, its average
    needed = files * size + states * of_state * size
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


def idle_layers(target: object, name: str) -> list[str]:
    """The layers of an adapter that it does not change at all, in float64."""
    return [
        canonical(component, layer)
        for component, model in components(target).items()
        for layer, module, record in adapted(model)
        if name in record.slots and not _changes(module, record.slots[name])
    ]


def refuse_idle(
    target: object, name: str, allowed: str | Sequence[str] | None = None, unread: Collection[str] = ()
) -> None:
    """Raise NothingLearntError for layers without a change, but for those that are `allowed` to have none: names or patterns of layers; or are unread."""
    refuse_unlearnt(components(target).values(), name)
    patterns_ = [pattern_of(entry) for entry in entries_of(allowed)]
    with patterns.limited(where="allow_unchanged"):
        idle = [
            layer
            for layer in idle_layers(target, name)
            if layer not in unread and not any(patterns.ends(p, layer) for p in patterns_)
        ]
    if idle:
        raise NothingLearntError(
            f"the adapter changes nothing in {len(idle)} of its layers: {listed(idle)}",
            remedy="Leave them out with --targets, or say that it may be so: --allow-unchanged.",
        )


def refuse_unread(
    target: object, file: Path, name: str, dtype: torch.dtype = torch.float32, half: str | None = None
) -> None:
    """Raise NothingLearntError if a file, read again, does not hold what adapter `name` has, rounded to the dtype of the file; all of it, or what it has
    on one component, of which the file is.

    Where it gives back the same tensors it changes the same; elsewhere (layers that the format has as one) the changes of weights are compared.
    """
    again = f"{name}-read-again"[-128:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to be said of the adapter was said when it was made
        load_lora(target, file, name=again, trainable=True)  # in float32, whatever the base has
    try:
        other = _other_layers(components(target), name, again, dtype)
        other = [layer for layer in other if half is None or layer.startswith(f"{half}.")]
    finally:
        unload(target, again)
    if other:
        raise NothingLearntError(
            f"the file holds something else than what was learnt in {len(other)} layers: {listed(sorted(other))}",
            where=file,
            remedy="Save it in another format.",
        )


@torch.no_grad()
def _other_layers(models: Mapping[str, nn.Module], name: str, again: str, dtype: torch.dtype) -> list[str]:
    """The layers in which an adapter that was read again does something else than it did, once its numbers are rounded to `dtype`."""
    other = []
    for component, model in models.items():
        for layer, module, record in adapted(model):
            learnt, read = record.slots.get(name), record.slots.get(again)
            if learnt is None and read is None:
                continue
            if learnt is not None and read is not None and _equal(learnt, read, dtype):
                continue
            if not _alike(module, learnt, read, dtype):
                other.append(canonical(component, layer))
    return other


def _equal(slot: Slot, read: Slot, dtype: torch.dtype) -> bool:
    """Whether the tensors of one are those of the other, rounded."""
    mine, theirs = slot.tensors, read.tensors
    return mine.keys() == theirs.keys() and all(
        t.shape == theirs[role].shape and torch.equal(t.to(dtype).float(), theirs[role].float())
        for role, t in mine.items()
    )


def _alike(module: nn.Module, learnt: Slot | None, read: Slot | None, dtype: torch.dtype) -> bool:
    """Whether both change a layer's weight and bias by the same, but for what rounding to `dtype` does; None changes nothing."""
    base, wanted = _changed(module, None if learnt is None else copy.deepcopy(learnt).to(dtype))
    _, got = _changed(module, read)
    roundings = 8 * torch.finfo(dtype).eps
    for part in wanted.keys() | got.keys():
        before = base.get(part, torch.zeros(()).double())
        change = wanted.get(part, before) - before
        error = got.get(part, before) - wanted.get(part, before)
        if error.norm() > roundings * change.norm():
            return False
    return True


def _changed(module: nn.Module, slot: Slot | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's weight and bias in float64, without an adapter and with it. A quantised weight as numbers."""
    op = op_of(module)
    base = {"weight": present(module, lambda: op.stored(gathered(op.weight())).double())}
    base |= {} if op.bias is None else {"bias": gathered(op.bias).double()}
    return base, base if slot is None else effective(module, [(slot, 1.0)], torch.float64, base)


@torch.no_grad()
def _changes(module: nn.Module, slot: Slot) -> bool:
    """Whether an adapter changes a layer's weight or bias, in float64."""
    if _surely(slot):
        return True
    base, after = _changed(module, slot)
    return any(name not in base or not torch.equal(t, base[name]) for name, t in after.items())


def gathered(weight: Tensor) -> Tensor:
    """A weight with the numbers of all processes, where each has a share of them; then all processes must call this."""
    collect = getattr(weight, "full_tensor", None)
    return weight if collect is None else collect()


def _surely(slot: Slot) -> bool:
    """Whether a LoRA changes a weight for sure: B A times a vector is not zero. Else it must be computed."""
    if slot.methods != ("lora",) or {*slot.tensors} != {"lora_A", "lora_B"}:
        return False
    A, B = (slot.tensors[role].double().flatten(1) for role in ("lora_A", "lora_B"))
    probe = torch.linspace(1, 2, A.shape[1], dtype=A.dtype, device=A.device)
    return bool((B @ (A @ probe)).any()) and all(part.spec.alpha != 0 for part in slot.parts)


def check_any_gradient(largest: np.ndarray) -> None:
    """Raise NothingLearntError if the largest norms [n] of a run's gradients say that none ever reached the adapter."""
    if not largest.any():
        raise NothingLearntError(
            "nothing was learnt: no gradient reached the adapter",
            remedy="The loss does not depend on its layers: choose others with --targets.",
        )


def check_every_gradient(largest: Mapping[str, float], step: int) -> None:
    """Raise NothingLearntError for layers without a gradient in step 0, and for tensors without one by step 1.

    In the first step a factor has none whose partner begins as zero. `largest` are the largest norms until now of layer.role.
    """
    without = [name for name, norm in largest.items() if not norm]
    if step == 0:
        reached = {name.rpartition(".")[0] for name, norm in largest.items() if norm}
        without = sorted({name.rpartition(".")[0] for name in without} - reached)
    if without:
        raise NothingLearntError(
            f"no gradient reaches {len(without)} of {len(largest)} tensors: {listed(without)}"
            if step
            else f"no gradient reaches {listed(without)}",
            remedy="The loss does not depend on them: leave them out with --targets.",
        )


def rescued(write: Callable[[Path], list[Path]], out: Path, name: str) -> list[Path]:
    """What `write` writes into `out`. If that cannot be, it is written into a temporary folder, which the OSError names in a note."""
    try:
        return write(out)
    except OSError as error:
        error.filename = error.filename or str(out)
        rescue(write, name, error)
        raise


def rescue(write: Callable[[Path], list[Path]], name: str, error: Exception) -> None:
    """Write into a temporary folder, as far as that can be; an error that ends the run says where in a note."""
    with contextlib.suppress(OSError):
        place = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        write(place)
        error.add_note(f"The adapter is not lost: it was saved in {place}.")

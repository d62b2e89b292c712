"""A module whose copies or patches differ from row to row of a batch: row i has mix (i // images) % number of mixes.

Each mix runs on its own rows. What the model has split further (tokens, one below the other) has several rows for each of the batch, which follow each
other only if they are the rows of what the module around it was given; a module that sees tokens in another order (expert by expert) is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffpeft.errors import AdapterStateError, MixedBatchError, ShapeMismatchError, shown
from diffpeft.layers.mixes import CarrierLike, MomentLike

Value = TypeVar("Value")
Arguments = tuple[object, ...]
Keywords = Mapping[str, object]
Inputs = dict[int, Tensor | None]  # by id of a module: what the module around it was given
_here = (
    threading.local()
)  # `given`: {id of a module: what the module around it was given}, in this thread's `watched` blocks


class Ambiguous(Tensor):
    """What stands for a tensor that each row of a batch has another one of: it tells its shape, dtype and device, and refuses arithmetic."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            raise ambiguous("a tensor")
        return result


def ambiguous(what: str) -> AdapterStateError:
    """The error for what the model reads and rows differ in. No TypeError, which an operator would take for a tensor that it does not know."""
    return AdapterStateError(
        f"the rows of this batch have different adapters, and the model reads {what} that adapters train whole",
        remedy="Run a batch for each adapter.",
    )


class watched:
    """Inside this block modules of a model know what the module around them was given; `names` gives theirs. A class, which no compiler enters."""

    def __init__(self, model: nn.Module, names: Callable[[], Sequence[str]]):
        self.model, self.names = model, names
        self.hooks: list[RemovableHandle] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        names = self.names()
        if not names or _compiled(self.model):
            return
        inputs: Inputs = {}
        self.before = getattr(_here, "given", None)
        for name in names:
            around, _, last = name.rpartition(".")
            parent = self.model.get_submodule(around)
            look = _noting(inputs, id(parent._modules[last]))
            self.hooks.append(parent.register_forward_pre_hook(look, with_kwargs=True))
        _here.given = inputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *error: object) -> None:
        if self.hooks:
            _here.given = self.before
        for hook in self.hooks:
            hook.remove()


def _compiled(model: nn.Module) -> bool:
    return "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None


def _noting(inputs: Inputs, key: int) -> Callable[[nn.Module, Arguments, Keywords], None]:
    def look(module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim())
        inputs[key] = next(tensors, None)

    return look


def by_rows(
    module: nn.Module,
    base: type[nn.Module],
    record: CarrierLike[Value],
    run: Callable[[nn.Module, type[nn.Module], Sequence[Value], Arguments, Keywords], object],
    moment: MomentLike,
    args: Arguments,
    kwargs: Keywords,
) -> object:
    """Each row of the batch through a module (of the class `base`) as its mix says. `run(module, base, what acts, args, kwargs)` runs some.

    Raises ShapeMismatchError or MixedBatchError.
    """
    x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    rows, batch = len(x), moment.batch or len(x)
    if rows % batch or not rows:
        raise ShapeMismatchError(
            f"{rows} rows do not divide into a batch of {batch}", where=f"a {base.__name__} with adapters"
        )
    acting = [record.acting(row) for row in moment.rows]
    owner = [acting[(i // (rows // batch * moment.images)) % len(acting)] for i in range(rows)]
    groups = different(owner)
    if len(groups) == 1:
        return run(module, base, groups[0], args, kwargs)
    _refuse_undivided(module, base, record, x, batch)
    parts = []
    for steps in groups:
        at = torch.tensor([i for i, other in enumerate(owner) if other == steps])
        named = {name: _rows_of(t, at, rows) for name, t in kwargs.items()}
        parts.append((at, run(module, base, steps, tuple(_rows_of(t, at, rows) for t in args), named)))
    return _together(parts, rows, base)


def _rows_of(value: object, at: Tensor, rows: int) -> object:
    """Some rows of an argument that has as many as the batch; any other as it is."""
    return value[at.to(value.device)] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value


def _refuse_undivided(
    module: nn.Module, base: type[nn.Module], record: CarrierLike[Value], x: Tensor, batch: int
) -> None:
    """Raise MixedBatchError for a module whose rows are not on the first axis, or are others than the batch's."""
    if issubclass(base, nn.RNNBase) or not getattr(module, "batch_first", True):
        raise _undivided(base, "not all that it gives has its rows on the first axis")
    if not _in_order(module, x, batch):
        raise MixedBatchError(
            f"module {shown(record.where)} sees the tokens of a batch of {batch} as {len(x)} rows in an order of its own, "
            "and cannot tell which of its adapters each is for",
            remedy="Run a batch for each adapter; in PEFT, too, lora.ParamWrapper does not support mixed adapter batches yet.",
        )


def _in_order(module: nn.Module, x: Tensor, batch: int) -> bool:
    """Whether rows are those of the batch, several for each one below the other. In compiled code nobody knows, and it is taken for granted.

    As many rows as the batch has are its rows, unless they are seen to be turned round. More have to be what the module around was given.
    """
    if torch.compiler.is_compiling():
        return True
    around = (getattr(_here, "given", None) or {}).get(id(module))
    if around is None or len(around) != batch or around.numel() != x.numel():
        return len(x) == batch
    around = around.reshape(x.shape).to(x)
    if torch.equal(around, x):
        return True
    return len(x) == batch and not torch.equal(
        around.reshape(len(x), -1).unique(dim=0), x.reshape(len(x), -1).unique(dim=0)
    )


def _together(parts: Sequence[tuple[Tensor, object]], rows: int, base: type[nn.Module]) -> object:
    """What a module gave for parts of its rows, as for all of them: tensors, and what holds tensors. Raises MixedBatchError for what has no rows."""
    sample = parts[0][1]
    tensors = [(at, t) for at, t in parts if isinstance(t, Tensor) and t.dim() and len(t) == len(at)]
    if len(tensors) == len(parts):
        return _stacked(tensors, rows)
    held = [(at, inside) for at, value in parts if (inside := _held(value)) is not None]
    if len(held) == len(parts) and all(inside.keys() == held[0][1].keys() for _, inside in held):
        whole = {key: _together([(at, inside[key]) for at, inside in held], rows, base) for key in held[0][1]}
        return _holding(sample, whole)
    if _is_plain([value for _, value in parts]):
        return sample
    raise _undivided(base, f"it gives {_told(sample)}, which has no rows")


def _is_plain(values: Sequence[object]) -> bool:
    """Whether values are no tensors and all the same."""
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in values) and len({*values}) == 1


def _stacked(parts: Sequence[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """Rows of a tensor in their places."""
    sample = parts[0][1]
    out = sample.new_empty(rows, *sample.shape[1:])
    for at, t in parts:
        out = out.index_copy(0, at.to(out.device), t.to(out.dtype))
    return out


def _held(value: object) -> dict[object, object] | None:
    """What a container holds; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return None


def _holding(sample: Any, inside: Mapping[Any, object]) -> object:
    """A container like another one that holds something else."""
    if isinstance(sample, Mapping):
        return type(sample)(**inside) if is_dataclass(sample) else type(sample)(inside)  # type: ignore[call-arg]
    if is_dataclass(sample):
        return replace(sample, **inside)  # type: ignore[type-var]
    return type(sample)(*inside.values()) if hasattr(sample, "_fields") else type(sample)(inside.values())


def _told(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


_PEFTS = "Linear, Embedding, Conv1d, Conv2d, Conv3d"


def _undivided(base: type[nn.Module], why: str) -> MixedBatchError:
    """The error for a module that cannot be divided by rows. Its first words are PEFT's."""
    return MixedBatchError(
        f"Mixed batching is only supported for the following modules: {_PEFTS}. Others are divided where all they give has rows",
        where=f"a {base.__name__}: {why}",
        remedy="Run a batch for each adapter.",
    )


def different(values: Sequence[Value]) -> list[Value]:
    """Each value once."""
    return [value for i, value in enumerate(values) if value not in values[:i]]

"""How much memory a step takes, counted on the meta device: every tensor that the step makes is counted, and none of them has numbers.

The step is the real one, forward and backward, with whatever is computed twice; only attention is taken to be a kernel that keeps no scores, as PyTorch's are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on: `live` now, and at their `peak`. Views count once, with what they are of.

    What is made of integers has numbers even if it is to be on the meta device: models read their masks and lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operation, and count what it returns. Whether all of a mask without numbers is set is answered with yes."""
        kwargs = dict(kwargs or {})
        if func in _ANSWERS and isinstance(args[0], Tensor) and args[0].is_meta:
            return _ANSWERS[func](args[0])
        args, kwargs = _arguments(func, args, kwargs)
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **kwargs)
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def gone(_: object) -> None:
            self.live -= size
            self.storages.pop(key, None)

        self.storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _answer(t: Tensor) -> bool:
    """What a number without a number is: yes, if it is a question."""
    if t.dtype == torch.bool:
        return True
    raise RuntimeError("a number was asked for, and there is none")


# {an operation that asks for numbers: what it gives for a tensor without}. A router gives all to one expert, which takes the most
_ANSWERS: dict[object, Callable[[Tensor], object]] = {
    torch.ops.aten._local_scalar_dense.default: _answer,
    torch.ops.aten.bincount.default: lambda t: torch.tensor([t.numel()]),
}
_MOVED = torch.ops.aten._to_copy.default


def _arguments(
    func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of an operation so that integers and bools have numbers, and what is made of what has none has none."""
    meta = any(isinstance(t, Tensor) and t.is_meta for t in tree_iter((args, kwargs)))
    if func is _MOVED and meta:
        return args, {**kwargs, "device": torch.device("meta")}
    name = getattr(getattr(func, "_schema", None), "name", "")
    if name in _NEW or not meta:
        device = kwargs.get("device", "meta" if meta else None)
        if device in _META and _are_integers(args, kwargs):
            return args, {**kwargs, "device": torch.device("cpu")}
    if not meta:
        return args, kwargs
    args, kwargs = tree_map(_without_numbers, (_places(args), kwargs))
    return args, kwargs


def _are_integers(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether what an operation makes is integers or bools: masks, lengths and places."""
    dtype = kwargs.get("dtype")
    if dtype is None and args and isinstance(args[0], Tensor):
        dtype = args[0].dtype
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex)
    numbers = [n for n in args if isinstance(n, (int, float))]
    return bool(numbers) and not any(isinstance(n, float) for n in numbers)


def _places(args: tuple[object, ...]) -> tuple[object, ...]:
    """Arguments of an operation with masks among indices as the places that they say: how many these are, decides a shape.

    A mask without numbers holds everywhere.
    """
    if len(args) < 2 or not isinstance(args[1], (list, tuple)):
        return args
    masks = [t for t in args[1] if isinstance(t, Tensor) and t.dtype == torch.bool]
    if not masks:
        return args
    places: list[object] = []
    for t in args[1]:
        mask = (torch.ones(t.shape) if t.is_meta else t) if any(t is mask for mask in masks) else None
        places += [t] if mask is None else list(mask.nonzero().unbind(1))
    return (args[0], places, *args[2:])


def _without_numbers(value: object) -> object:
    """A tensor as one on the meta device: for an operation with others that have no numbers."""
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta and value.dim() else value


_META = (torch.device("meta"), "meta")
_NEW = {f"aten::new_{kind}" for kind in ("zeros", "ones", "full", "empty")}


class _Attention(torch.autograd.Function):
    """Attention as fused kernels do it: queries, keys, values, the output and one number a row are kept, and no scores."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [..., n, d], k [..., m, d], v [..., m, e] -> [..., n, e], without numbers."""
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the three."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """In this block attention on the meta device keeps no scores. A mode of functions would not do: it is left where a block is computed again."""
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    def stands_for(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        if query.device.type != "meta":
            return attention(query, key, value, *args, **kwargs)
        return cast(Tensor, _Attention.apply(query, key, value))

    autocast, tensor = torch.autocast, cast(Callable[..., Tensor], torch.tensor)

    def with_numbers(data: object, **kwargs: object) -> Tensor:
        made = tensor(data, **{**kwargs, "device": "cpu"})
        return made if not made.is_floating_point() else tensor(data, **kwargs)

    F.scaled_dot_product_attention = stands_for
    torch.autocast, torch.tensor = _Autocast, with_numbers  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        torch.autocast, torch.tensor = autocast, tensor  # type: ignore[misc]


class _Autocast(torch.autocast):
    """Autocast, which some models switch off where they need fp32; the meta device has none."""

    def __init__(self, device_type: str, *args: object, **kwargs: object):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)  # type: ignore[arg-type]


def peak(step: Callable[[], object]) -> int | None:
    """The most bytes of tensors that a step on the meta device makes and holds at once; None for one that asks for the numbers in them."""
    try:
        with fused(), Meter() as meter:
            step()
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    return meter.peak


def size_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

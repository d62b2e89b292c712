"""How much memory a step takes, counted on the meta device: every tensor that the step makes is counted, and none of them has numbers.

The step is the real one, forward and backward, with whatever is computed twice; only attention is taken to be a kernel that keeps no scores, as PyTorch's are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_ITEM = torch.ops.aten._local_scalar_dense.default


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on: `live` now, and at their `peak`. Views count once, with what they are of."""

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
        """Run an operation, and count what it returns. Whether all of a mask is set is answered with yes: captions fill their length."""
        if func is _ITEM and isinstance(args[0], Tensor) and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
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

    F.scaled_dot_product_attention = stands_for
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


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

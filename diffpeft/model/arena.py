"""Memory for the fused weights of one component.

New memory costs more than the arithmetic: the system hands it out a page at a time, each filled with zeros. So it is asked for once a component, in
large pages where the system has them, and what `unfuse` leaves serves the next `fuse`. In between the system may take it back where memory is short.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

ALIGNED = 64  # bytes: where torch's own tensors begin
SMALL = 1 << 20  # bytes that are cheap to find anywhere


class Arena:
    """Main memory of a size, from which tensors are cut. It is free again when the last of them has gone.

    A tensor has a storage of its own, so that copying or saving one does not bring along its neighbours.
    """

    def __init__(self, size: int):
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self.size, self.begin = size, 0
        self._memory = mmap.mmap(-1, size, **flags)
        self._lease: weakref.ref[memoryview] | None = None
        self._advise("MADV_HUGEPAGE")

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a component, or one in a file, asks for memory of its own

    @property
    def is_free(self) -> bool:
        """Whether no tensor lies in it."""
        return self._lease is None or self._lease() is None

    def cut(self, likes: Iterable[Tensor]) -> list[Tensor | None]:
        """Tensors with anything in them that lie in memory as `likes` do; None for one that has gaps. It must be free."""
        assert self.is_free
        lease, begin, tensors = memoryview(self._memory), 0, []
        for like in likes:
            tensors.append(_at(lease, begin, like) if _is_dense(like) else None)
            begin += room_of(like)
        self._lease = weakref.ref(lease, lambda _: self._advise("MADV_FREE"))
        return tensors

    def _advise(self, name: str) -> None:
        """Tell the system something, where it listens."""
        if hasattr(mmap, name):
            with contextlib.suppress(OSError, ValueError):
                self._memory.madvise(getattr(mmap, name))


def room_of(like: Tensor) -> int:
    """The bytes that a tensor takes in an arena."""
    return -(-like.numel() * like.itemsize // ALIGNED) * ALIGNED


def _at(lease: memoryview, begin: int, like: Tensor) -> Tensor:
    flat = torch.frombuffer(lease, dtype=torch.uint8, count=like.numel() * like.itemsize, offset=begin)
    return flat.view(like.dtype).as_strided(like.shape, like.stride())


def _is_dense(like: Tensor) -> bool:
    """Whether a tensor's numbers fill a piece of memory, each once."""
    axes = sorted((step, n) for step, n in zip(like.stride(), like.shape, strict=True) if n > 1)
    return bool(like.numel()) and all(step == math.prod(n for _, n in axes[:i]) for i, (step, _) in enumerate(axes))

"""Memory for the fused weights of one component, kept from `unfuse` to the next `fuse`: new memory costs more than the arithmetic.

It is plain memory, a piece a layer: large pages would have to be made by moving others, which takes longer than they save.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16  # bytes that are cheap to find anywhere


class _Piece:
    """Main memory in which one tensor at a time lies, with all that are views of it."""

    def __init__(self, size: int):
        self.size, self._memory = size, torch.empty(size, dtype=torch.uint8).numpy()
        self._lease: weakref.ref[memoryview] | None = None

    @property
    def is_free(self) -> bool:
        """Whether no tensor lies in it, a user's included."""
        return self._lease is None or self._lease() is None

    def like(self, other: Tensor) -> Tensor:
        """A tensor with a storage of its own, anything in it, that lies in memory as another does."""
        lease = self._memory.data  # the storage holds it
        self._lease = weakref.ref(lease)
        flat = torch.frombuffer(lease, dtype=torch.uint8, count=_size(other))
        return flat.view(other.dtype).as_strided(other.shape, other.stride())


class Arena:
    """The pieces of a component, by layer."""

    def __init__(self, before: Arena | None = None):
        self._pieces: dict[str, _Piece] = {} if before is None else {**before._pieces}

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a component, or one in a file, finds memory of its own

    @property
    def is_free(self) -> bool:
        """Whether no tensor lies in any of them."""
        return all(piece.is_free for piece in self._pieces.values())

    def like(self, layer: str, other: Tensor) -> Tensor:
        """A tensor with anything in it that lies in memory as another does, where that of this layer lay if that has gone."""
        size = _size(other)
        if size < SMALL or other.device.type != "cpu" or not _is_dense(other):
            return torch.empty_like(other)
        piece = self._pieces.get(layer)
        if piece is None or piece.size != size or not piece.is_free:
            piece = self._pieces[layer] = _Piece(size)
        return piece.like(other)


def _size(t: Tensor) -> int:
    return t.numel() * t.itemsize


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor's numbers fill a piece of memory, each once."""
    axes = sorted((step, n) for step, n in zip(t.stride(), t.shape, strict=True) if n > 1)
    return bool(t.numel()) and all(step == math.prod(n for _, n in axes[:i]) for i, (step, _) in enumerate(axes))

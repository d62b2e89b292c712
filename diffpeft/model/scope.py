"""Blocks that hold here: in the thread that entered them, or in the asyncio task, and in what a task hands on with its context (`asyncio.to_thread`).

Several may be open at once, and they end in any order (two tasks, two generators): each ends by itself, and what holds is the last that is still open.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Generic, TypeVar

Value = TypeVar("Value")
Held = TypeVar("Held", covariant=True)


class Block(Generic[Held]):
    """What one block puts in force while it is open."""

    def __init__(self, value: Held):
        self._value, self.open, self.in_task = value, True, _in_task()

    @property
    def value(self) -> Held:
        """What is in force."""
        return self._value


class Scope(Generic[Value]):
    """The blocks of one kind."""

    def __init__(self, name: str):
        self._blocks: ContextVar[tuple[Block[Value], ...]] = ContextVar(name, default=())

    @property
    def blocks(self) -> tuple[Block[Value], ...]:
        """Those that are open here, the first entered first."""
        blocks = self._blocks.get()
        return tuple(block for block in blocks if block.open) if blocks else blocks

    def enter(self, block: Block[Value]) -> None:
        """A block is in force here from now on, until it is no more open."""
        self._blocks.set((*self.blocks, block))

    def forget_ended(self) -> None:
        """Let go of the blocks that have ended. They are in force no more in any case."""
        self._blocks.set(self.blocks)


def _in_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no loop is running in this thread
        return False

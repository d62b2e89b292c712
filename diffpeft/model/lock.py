"""One lock a component: operations on the same modules exclude each other, forwards do not wait.

Locks are kept beside the modules and not on them, so that modules can be copied and pickled.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Mapping

from torch import nn

from diffpeft.model.target import COMPILED

_locks: weakref.WeakKeyDictionary[nn.Module, tuple[int, threading.RLock]] = weakref.WeakKeyDictionary()
_numbers = itertools.count()
_registry = threading.Lock()


@contextlib.contextmanager
def exclusive(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """No other operation changes these components inside this block. The same thread may enter it again.

    Locks are taken in the order in which they were made, so that pipelines which share some components cannot wait for each other.
    """
    with contextlib.ExitStack() as held:
        for _, lock in sorted({_lock_of(model) for model in parts.values()}, key=lambda numbered: numbered[0]):
            held.enter_context(lock)
        yield


def _lock_of(model: nn.Module) -> tuple[int, threading.RLock]:
    model = getattr(model, COMPILED, model)
    with _registry:
        if model not in _locks:
            _locks[model] = next(_numbers), threading.RLock()
        return _locks[model]


def _after_fork() -> None:
    """In a forked process nobody holds a lock that another thread of its parent held."""
    global _registry
    _registry = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

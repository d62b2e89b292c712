"""Where latents and embeddings are kept: in memory, on disk, or nowhere. What is on disk is keyed by all that it depends on, and may serve any run.

An entry of a folder is one safetensors file, which appears whole or not at all. Its name is the digest of its key: what was encoded (the contents of files,
the words of a caption), how it was shown, and what encoded it (config and weights).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import PIL
import torch
from torch import Tensor, nn

from diffpeft.io import replacing
from diffpeft.train.data.find import digest_of

Key = tuple[object, ...]
Tensors = dict[str, Tensor]
FORMAT = 1  # of entries: another number where the same key means other numbers
_RECENT = 3600  # seconds in which an entry was used that is not pruned: another run may want it


class Store(Protocol):
    """Tensors by key. `keeps` is whether what was put is there afterwards, `shared` whether other processes find it too."""

    keeps: bool
    shared: bool

    def of_file(self, path: Path) -> str:
        """What stands for a file in keys."""

    def get(self, key: Key) -> Tensors | None:
        """What was put under a key; None if it is not there, or damaged."""

    def put(self, key: Key, tensors: Tensors) -> None:
        """Keep tensors under a key."""


class Nowhere:
    """Keeps nothing: all is computed each time."""

    keeps, shared = False, False

    def of_file(self, path: Path) -> str:
        """Its name."""
        return str(path)

    def get(self, key: Key) -> Tensors | None:
        """Nothing."""
        return None

    def put(self, key: Key, tensors: Tensors) -> None:
        """Forgets them."""


class Memory:
    """Keeps tensors for one process of a run."""

    keeps, shared = True, False

    def __init__(self) -> None:
        self.entries: dict[Key, Tensors] = {}

    def of_file(self, path: Path) -> str:
        """Its name: a run takes files as they are when it begins."""
        return str(path)

    def get(self, key: Key) -> Tensors | None:
        """The tensors themselves."""
        return self.entries.get(key)

    def put(self, key: Key, tensors: Tensors) -> None:
        """Hold them."""
        self.entries[key] = tensors


class Disk:
    """Keeps tensors in a folder. `identity` says what makes them, and is asked when the first is wanted."""

    keeps, shared = True, True

    def __init__(self, folder: Path, identity: Callable[[], str]):
        self.folder, self._ask = folder, identity
        self._digests: dict[Path, str] = {}

    @cached_property
    def identity(self) -> str:
        """All that the numbers depend on beside their keys."""
        return " ".join((self._ask(), str(FORMAT), torch.__version__, PIL.__version__))

    def of_file(self, path: Path) -> str:
        """The digest of its contents."""
        if path not in self._digests:
            self._digests[path] = digest_of(path)
        return self._digests[path]

    def path(self, key: Key) -> Path:
        """The file of a key."""
        digest = hashlib.blake2b(json.dumps([self.identity, *key]).encode(), digest_size=20).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def get(self, key: Key) -> Tensors | None:
        """Read an entry, which counts as its use."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        try:
            tensors = load(path.read_bytes())
            with contextlib.suppress(OSError):  # a folder that is only read
                os.utime(path)
            return tensors
        except (OSError, SafetensorError):
            return None

    def put(self, key: Key, tensors: Tensors) -> None:
        """Write an entry. Raises OSError if it cannot be written."""
        from safetensors.torch import save

        data = save({name: t.contiguous() for name, t in tensors.items()}, {"key": json.dumps(key)})
        with replacing(self.path(key)) as f:
            f.write(data)


def pruned(folder: Path, most: float) -> int:
    """Remove the entries of a folder that were not used for longest, until all take at most so many bytes; how many were removed."""
    entries = [(path.stat(), path) for path in folder.rglob("*.safetensors")]
    size, removed, now = sum(stat.st_size for stat, _ in entries), 0, time.time()
    for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
        if size <= most or now - stat.st_mtime < _RECENT:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            size, removed = size - stat.st_size, removed + 1
    return removed


def identity_of(model: nn.Module) -> str:
    """What tells a model from others: its class, its config but where it is from, and every bit of its weights."""
    config = getattr(model, "config", {})
    values: Mapping[str, object] = config if isinstance(config, Mapping) else config.to_dict()
    values = {name: value for name, value in values.items() if not name.startswith("_") and "version" not in name}
    digest = hashlib.blake2b(f"{type(model).__name__} {json.dumps(values, sort_keys=True, default=str)}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

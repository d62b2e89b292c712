"""One run at a time in an output folder.

The lock is a file with the process and the machine of its owner, which the owner also locks by the system's means: they end with the process, so that what a
killed run left is taken over at once. A machine that shares the disk and not the locks renews the file's time; another takes it over after an hour of silence.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from diffpeft.errors import AdapterStateError
from diffpeft.train import machines

NAME = ".diffpeft-run.lock"
SILENCE, BEAT = 3600.0, 60.0  # seconds after which another machine's lock is stale, and between signs of life
_owned: dict[Path, tuple[int, int]] = {}  # {lock: (thread, how many blocks deep)}
_guard = threading.Lock()
os.register_at_fork(after_in_child=_owned.clear)  # a child is another process


def _host() -> str:
    return os.uname().nodename


@contextlib.contextmanager
def occupied(out: Path) -> Iterator[None]:
    """No other run writes into this folder while the block runs; inside another such block of the same thread it does nothing.

    Of several processes of a run the main one has the lock.

    Raises AdapterStateError, which names process and machine, if another run is there, OSError if the folder cannot be made.
    """
    if not machines.world().main:
        yield
        return
    path = out.resolve() / NAME
    with _guard:
        thread, depth = _owned.get(path, (threading.get_ident(), 0))
        if thread != threading.get_ident():
            raise _busy(path, {"pid": os.getpid(), "host": _host()})
        _owned[path] = (thread, depth + 1)
    try:
        with _locked(path) if not depth else contextlib.nullcontext():
            yield
    finally:
        with _guard:
            if depth:
                _owned[path] = (thread, depth)
            else:
                del _owned[path]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    made = _folders(path.parent)
    fd = _taken(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)
        for folder in made:  # a run that wrote nothing leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


def _folders(folder: Path) -> list[Path]:
    """Make a folder; those that were not there, the innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _taken(path: Path) -> int:
    """The descriptor of the lock, which is ours. Raises AdapterStateError if it is another's."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(fd)
            os.close(fd)
            raise _busy(path, owner) from None
        if os.fstat(fd).st_nlink:  # else its owner took it away just now
            break
        os.close(fd)
    owner, age = _owner(fd), time.time() - os.fstat(fd).st_mtime
    if owner.get("host", _host()) != _host() and age < SILENCE:
        os.close(fd)
        raise _busy(path, owner)
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": _host()}).encode(), 0)
    return fd


def _owner(fd: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _busy(path: Path, owner: dict[str, object]) -> AdapterStateError:
    return AdapterStateError(
        f"another run writes there: process {owner.get('pid', '?')} on {owner.get('host', '?')}",
        where=path.parent,
        remedy=f"Wait for it, or pass another --out. If it is long gone, delete {path.name} there.",
    )


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)

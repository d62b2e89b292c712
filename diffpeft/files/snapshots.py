"""A file as it was at one instant: all that is read of it comes from one descriptor. And several files of a folder as they all were at one instant.

A folder that is saved over an older one (commits.py) is for a moment in a state between: its new files lie in a folder inside, the journal, which counts
as the files themselves. A writer that was killed leaves it so, and it is read like any other.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from diffpeft.errors import UnreadableFileError, near
from diffpeft.files.tables import MAX_CONFIG, unreadable

Seen = TypeVar("Seen")

JOURNAL = ".diffpeft-saved"  # in a folder: the files that were saved and have not been put into their places yet
MAX_OPEN = 64  # descriptors that are kept: others are opened again when they are needed
MAX_HOLES = 64 << 20  # bytes of a file that nobody has written
_TRIES = 200
_VECTORS = 512  # pieces of memory for one read: systems take 1024
_MISSING = (errno.ENOENT, errno.ENOTDIR)
Identity = tuple[int, int, int, int]  # device, inode, size, time of the last change

_open: OrderedDict[int, weakref.ref[Snapshot]] = (
    OrderedDict()
)  # by id: those with an open descriptor, the last used last
_lock = threading.RLock()


def _unlocked() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_unlocked)  # another thread may have held it


def near_path(path: str | os.PathLike[str]) -> str:
    """`Did you mean 'x'?` for what lies beside the first part of a path that is missing, or nothing."""
    missing = Path(path)
    while missing.parent != missing and not os.path.exists(
        missing.parent
    ):  # which is no error for what cannot be a path
        missing = missing.parent
    there = os.path.isdir(missing.parent) and os.access(missing.parent, os.R_OK)
    siblings = os.listdir(missing.parent) if there else []
    return near(missing.name, siblings)


class Snapshot:
    """A regular file as it was when it was opened. What is read later comes from the same bytes or is refused.

    The descriptor stays open as long as somebody holds the snapshot. Of many files only some stay open; the others, and those that come out of a
    pickle, are opened again by their path, and are refused if it is another file by then.
    """

    __slots__ = ("__weakref__", "_closing", "_fd", "_place", "_readers", "identity", "path")

    def __init__(self, path: Path, identity: Identity, fd: int | None = None, place: Path | None = None):
        self.path, self.identity, self._readers = path, identity, 0
        self._fd: int | None = None
        self._place = (
            path.absolute() if place is None else place
        )  # which a change of the current folder leaves as it is
        if fd is not None:
            with _lock:
                self._keep(fd)

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Snapshot:
        """The file at a path. Raises UnreadableFileError if it is none, or none that can be read."""
        path = Path(path)
        snapshot = opened(path)
        if snapshot is None:
            raise UnreadableFileError("no such file", where=path, remedy=near_path(path) or "Check the path.")
        return snapshot

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity[2]

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, open while the block runs."""
        with _lock:
            if self._fd is None:
                self._keep(self._reopened())
            elif id(self) in _open:
                _open.move_to_end(id(self))
            self._readers += 1
        try:
            yield self._fd  # type: ignore[misc]
        finally:
            with _lock:
                self._readers -= 1

    def _keep(self, fd: int) -> None:
        """Have this descriptor, until nobody needs the snapshot any more or too many others are open."""
        self._fd, self._closing = fd, weakref.finalize(self, os.close, fd)
        self._closing.atexit = False  # the system does it then
        _open[id(self)] = weakref.ref(self)
        if len(_open) > MAX_OPEN:
            for key in [key for key, ref in _open.items() if ref() is None]:
                del _open[key]
            _close(len(_open) - MAX_OPEN)

    def _reopened(self) -> int:
        """A descriptor of the same file as before. Raises UnreadableFileError if it is another one now."""
        fd = _looked(self._place, _descriptor)
        if fd is None or _identity(os.fstat(fd)) != self.identity:
            if fd is not None:
                os.close(fd)
            raise UnreadableFileError(
                "the file was replaced or changed after it was opened", where=self.path, remedy="Read it again."
            )
        return fd

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size). Raises UnreadableFileError if the file has become shorter."""
        buffer = bytearray(size)
        self.fill(start, [memoryview(buffer)])
        return bytes(buffer)

    def fill(self, start: int, pieces: Sequence[memoryview]) -> None:
        """The bytes from `start` on into one piece of memory after the other."""
        todo = [piece for piece in pieces if len(piece)]
        at = 0
        with self.descriptor() as fd:
            while at < len(todo):
                try:
                    n = os.preadv(fd, todo[at : at + _VECTORS], start)
                except OSError as error:
                    raise unreadable(self.path, f"cannot read the file: {error.strerror}") from error
                if n == 0:
                    raise unreadable(self.path, "the file became shorter while it was read")
                start += n
                while at < len(todo) and n >= len(todo[at]):
                    n, at = n - len(todo[at]), at + 1
                if n:
                    todo[at] = todo[at][n:]

    def check(self) -> None:
        """Raise UnreadableFileError if somebody wrote into the file since it was opened."""
        with self.descriptor() as fd:
            if _identity(os.fstat(fd)) != self.identity:
                raise UnreadableFileError(
                    "the file was changed while it was read", where=self.path, remedy="Try again."
                )

    def check_written(self) -> None:
        """Raise UnreadableFileError if much of the file was never written: it takes no room on the disk, and would in memory."""
        with self.descriptor() as fd:
            if holes_in(fd, self.size) > MAX_HOLES:
                raise UnreadableFileError(
                    "large parts of the file were never written",
                    where=self.path,
                    remedy="Download it again: it is not whole.",
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        return f"Snapshot({str(self.path)!r})"

    def __copy__(self) -> Snapshot:
        return self

    def __deepcopy__(self, memo: object) -> Snapshot:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return Snapshot, (self.path, self.identity, None, self._place)


def _close(number: int) -> int:
    """Close so many open snapshots that nobody reads at this moment. -> how many were."""
    idle = [s for s in (ref() for ref in _open.values()) if s is not None and not s._readers][:number]
    for snapshot in idle:
        del _open[id(snapshot)]
        snapshot._fd = None
        snapshot._closing()
    return len(idle)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _descriptor(path: Path) -> int | None:
    """An open descriptor of a regular file; None if nothing is there. A pipe or a device is not even opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableFileError("not a regular file", where=path)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            return os.open(path, flags)
        except OSError as error:
            with _lock:
                if error.errno != errno.EMFILE or not _close(MAX_OPEN):
                    raise
            return os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, UnreadableFileError):
            raise
        if isinstance(error, OSError) and error.errno in _MISSING:
            return None
        why = error.strerror if isinstance(error, OSError) else error
        raise UnreadableFileError(f"cannot read the file: {why}", where=path) from error


def holes_in(fd: int, size: int) -> int:
    """How many bytes of a file nobody has written, counted until there are too many. 0 where the system cannot tell."""
    holes = end = 0
    try:
        while end < size and holes <= MAX_HOLES:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # there are no data after this
                    raise
                return holes + size - end
            holes, end = holes + start - end, os.lseek(fd, start, os.SEEK_HOLE)
    except (OSError, AttributeError):
        return 0
    return holes


# Where a file is


def resolved(path: Path) -> Path:
    """Where the bytes of a file of a folder are: in the folder, or in the journal of one that is being saved."""
    path = path.absolute()
    for inner in (Path(path.name), Path(path.parent.name, path.name)):
        journal = path.parents[len(inner.parts) - 1] / JOURNAL
        try:
            since = os.lstat(journal).st_mtime_ns
            os.lstat(journal / inner)
        except (OSError, ValueError):
            continue
        try:
            if os.lstat(path).st_mtime_ns > since:  # another program wrote it after a writer of ours was killed
                return path
        except OSError:
            pass
        return journal / inner
    return path


def _looked(path: Path, look: Callable[[Path], Seen | None]) -> Seen | None:
    """What `look` says of the file where it is now; None if it is nowhere. A file that is on its way is looked for again."""
    for _ in range(3):
        if (seen := look(resolved(path))) is not None:
            return seen
    return None


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def present(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file, in its place or in a journal."""
    status = _looked(Path(path), _status)
    return status is not None and stat.S_ISREG(status.st_mode)


def opened(path: Path) -> Snapshot | None:
    """The file at a path, wherever it is now; None if there is none. Raises UnreadableFileError if it cannot be read."""
    fd = _looked(path, _descriptor)
    return None if fd is None else Snapshot(path, _identity(os.fstat(fd)), fd)


def config_text(file: Snapshot) -> str:
    """The text of a config. Raises UnreadableFileError for one that is larger than any is, and for what is no text."""
    if file.size > MAX_CONFIG:
        raise UnreadableFileError(
            f"it has {file.size} bytes, and of a config at most {MAX_CONFIG} are read", where=file.path
        )
    try:
        return file.read(0, file.size).decode()
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"it is no text ({error})", where=file.path) from error


def together(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, Snapshot]:
    """{name: snapshot} of those files that a folder has, as they all were at one instant.

    Raises UnreadableFileError if one cannot be read, or if the folder never rests.
    """
    folder, names = Path(folder), list(names)
    for again in range(_TRIES):
        files = {name: opened(folder / name) for name in names}
        now = {name: _looked(folder / name, _status) for name in names}
        if all((f and f.identity) == (s and _identity(s)) for f, s in zip(files.values(), now.values(), strict=True)):
            return {name: file for name, file in files.items() if file is not None}
        time.sleep(min(0.001 * again, 0.02))
    raise UnreadableFileError("the folder is written to all the time", where=folder, remedy="Try again later.")

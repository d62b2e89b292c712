"""Writing: a file, or several of a folder, replace older ones as a whole or not at all.

New bytes go to a temporary entry beside or inside what they will be, which its writer locks as long as it lives: an entry that can be locked is a dead
writer's, and the next writer there removes it. A file is committed by one rename. A folder that is new is, too. The files of a folder that is there
already are committed by renaming the temporary folder to the journal (snapshots.py), which from then on counts as the files themselves; then the old
files are taken away, and only then the new ones are put into their places, so that no program finds old and new ones side by side. Whoever was killed
before the rename has changed nothing; after it, readers find the new files, and the next writer puts them into their places.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffpeft.files.snapshots import JOURNAL

_TEMPORARY = re.compile(r"\.diffpeft-(?P<system>[0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_LONG = 24 * 3600  # seconds after which what another machine left is taken for left
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC  # a link is no new file, so none is followed
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and leaves nothing behind when it does not. A link is replaced, not followed.

    Raises OSError, which names `path`, if it cannot be written.
    """
    path = Path(path)
    with _named(path):
        _prepare(path.parent)
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary, fd = _new_file(path.parent)
        try:
            with open(fd, "wb", closefd=False) as f:
                yield f
                f.flush()
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)


@contextlib.contextmanager
def folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files become those of `path` when the block ends well, all of them at once; it leaves nothing behind when it does not.

    What else `path` holds stays. Links in it are replaced, not followed. Raises OSError, which names `path`, if it cannot be written.
    """
    path = Path(path)
    with _named(path):
        home = path if path.is_dir() else path.parent
        _prepare(home)
        temporary, fd = _new_folder(home)
        try:
            yield temporary
            if home is path or not _renamed(temporary, path):
                _commit(temporary, path)
        finally:
            os.close(fd)
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system name what was to be written, not where it was written for the time being."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not _is_temporary(error.filename)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _is_temporary(name: object) -> bool:
    parts = Path(os.fsdecode(name)).parts if isinstance(name, (str, bytes)) else ()
    return any(_TEMPORARY.fullmatch(part) or part == JOURNAL for part in parts)


def _prepare(home: Path) -> None:
    """Make a folder if it is not there, put what a killed writer has saved into its place, and remove what others have left."""
    home.mkdir(parents=True, exist_ok=True)
    for place in (home.absolute(), home.absolute().parent):
        if os.path.lexists(place / JOURNAL):
            with _alone(place):
                finish(place)
    sweep(home)


# Temporary entries


def _new_file(home: Path) -> tuple[Path, int]:
    """A new file of a short name that this process has locked. Its mode is that of any new file."""
    while True:
        path = home / _name()
        fd = os.open(path, _NEW, 0o666)
        if _locked(fd) and os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # somebody took it for a dead writer's before it was locked


def _new_folder(home: Path) -> tuple[Path, int]:
    """A new folder that this process has locked."""
    while True:
        path = home / _name()
        os.mkdir(path)
        try:
            fd = os.open(path, _FOLDER)
        except FileNotFoundError:
            continue
        if _locked(fd) and path.exists():
            return path, fd
        os.close(fd)


def _locked(fd: int) -> bool:
    """Lock for this process alone; False if another has. Where the system has no locks nobody else can either, and nothing is ever swept."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR)
    return True


@functools.cache
def _system() -> str:
    """What tells the systems apart in which locks hold: this one, since it was started. Containers share it, machines that share a disk do not."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        started = os.uname().nodename
    return f"{zlib.crc32(started.encode()):08x}"


def _name() -> str:
    return f".diffpeft-{_system()}-{secrets.token_hex(8)}.tmp"


def _may_go(name: re.Match[str], entry: os.DirEntry[str]) -> bool:
    """Whether a temporary entry is of this system, where a lock tells whether its writer lives, or a day old."""
    with contextlib.suppress(OSError):
        return name["system"] == _system() or entry.stat(follow_symlinks=False).st_mtime < time.time() - _LONG
    return False


def sweep(home: Path) -> None:
    """Remove temporary entries of writers that live no more."""
    with os.scandir(home) as entries:
        stale = [entry for entry in entries if (name := _TEMPORARY.fullmatch(entry.name)) and _may_go(name, entry)]
    for entry in stale:
        with contextlib.suppress(OSError):  # gone in the meantime, or another user's
            fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
            finally:
                os.close(fd)


# Folders


def _renamed(temporary: Path, path: Path) -> bool:
    """Whether the folder could become `path`, which nobody else has made by now."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other writer of ours commits in this folder meanwhile."""
    fd = os.open(path, _FOLDER)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _commit(temporary: Path, path: Path) -> None:
    """Save the files of a temporary folder over those of another."""
    for name in _files(temporary):
        if (path / name).is_dir() and not (path / name).is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path / name))
    with _alone(path):
        while True:
            finish(path)
            _date(temporary, path)
            if _renamed(temporary, path / JOURNAL):
                break
        finish(path)


def _date(temporary: Path, path: Path) -> None:
    """Make a folder younger than all that it replaces: what is younger than a journal was written after it, by another program."""
    ages = [os.lstat(path / name).st_mtime_ns for name in _files(temporary) if os.path.lexists(path / name)]
    now = max([time.time_ns(), *ages])
    os.utime(temporary, ns=(now, now))


def finish(path: Path) -> None:
    """Put the files of a folder's journal into their places: first all old ones are taken away. May be done again after a kill."""
    journal = path / JOURNAL
    try:
        since = os.lstat(journal).st_mtime_ns
    except FileNotFoundError:
        return
    names = _files(journal)
    for name in names:
        if _is_newer(path / name, since):
            os.unlink(journal / name)
            continue
        _make_way(path, Path(name))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path / name)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(journal / name, path / name)
    shutil.rmtree(journal)


def _files(root: Path) -> list[str]:
    """The names of all files below a folder."""
    return sorted(
        os.path.relpath(os.path.join(where, name), root) for where, _, names in os.walk(root) for name in names
    )


def _is_newer(path: Path, since: int) -> bool:
    """Whether somebody wrote a file after that time."""
    try:
        return os.lstat(path).st_mtime_ns > since
    except OSError:
        return False


def _make_way(path: Path, name: Path) -> None:
    """Take away links and files that stand where a file's folders will be."""
    for parent in list(name.parents)[-2::-1]:
        place = path / parent
        if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
            os.unlink(place)

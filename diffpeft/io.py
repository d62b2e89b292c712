"""safetensors in and out: header first, bytes on demand, atomic writes.

The header is read by hand because detection and inspection must not import torch, and because every fault needs its own message.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from diffpeft.errors import CannotConvertError, UnsafeFileError, shown
from diffpeft.files import Json, Snapshot, folder, parsed, present, replacing, together, unreadable
from diffpeft.handles import (
    CHUNK,
    SIZES,
    Handle,
    beside,
    cast,
    chunks,
    columns,
    count,
    diagonal,
    dtype_of,
    file_of,
    files_of,
    finite,
    handle,
    held,
    load,
    nbytes,
    number,
    of_bytes,
    raw,
    reshaped,
    rows,
    same,
    scalar,
    scaled,
    stacked,
)

__all__ = [
    "SIZES",
    "Snapshot",
    "beside",
    "cast",
    "chunks",
    "columns",
    "count",
    "diagonal",
    "dtype_of",
    "finite",
    "folder",
    "handle",
    "header",
    "held",
    "load",
    "nbytes",
    "number",
    "of_bytes",
    "present",
    "raw",
    "refuse_pickle",
    "replacing",
    "reshaped",
    "rows",
    "same",
    "save",
    "scalar",
    "scaled",
    "stacked",
    "start_of",
    "together",
]

MAX_HEADER, MAX_TENSORS, MAX_METADATA, PIECE = 16 << 20, 1 << 16, 4096, 32 << 20
_ITEMS = 16  # values, keys and brackets of a tensor's row in the header
MAX_ITEMS = _ITEMS * MAX_TENSORS + 4 * MAX_METADATA
_SURROGATE = re.compile("[\ud800-\udfff]")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
Header = tuple[dict[str, Handle], dict[str, str]]  # the tensors by key, the metadata


def header(source: str | os.PathLike[str] | Snapshot) -> Header:
    """The tensors of a safetensors file as handles, and its metadata. Reads the header only; the handles keep the file open.

    Raises UnsafeFileError for pickles, UnreadableFileError for anything else that is not a whole safetensors file.
    """
    file = source if isinstance(source, Snapshot) else Snapshot.of(source)
    start = file.read(0, min(8, file.size))
    length = int.from_bytes(start, "little") if len(start) == 8 else 0
    fits = 2 <= length <= min(MAX_HEADER, file.size - 8)
    _refuse_other_kinds(file.path, b"" if fits else start)
    if not fits:
        raise unreadable(file.path, "the header length does not fit the file: truncated, or no safetensors file")
    try:
        table, metadata = _judged(file.read(8, length).decode())
        handles = {key: _handle(file, row, 8 + length) for key, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(file.path, f"the header is damaged ({error})") from error
    _refuse_gaps(file, handles, 8 + length)
    return handles, metadata


def _judged(text: str) -> tuple[Json, dict[str, str]]:
    """The rows and the metadata that a header says. Raises ValueError for one that is not read, whoever wrote it."""
    if (n := text.count('"data_offsets"')) > MAX_TENSORS:
        raise ValueError(f"{n} tensors are more than {MAX_TENSORS}")
    table = parsed(text, items=_ITEMS * n + 4 * MAX_METADATA)
    metadata = table.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("the metadata is no table of strings")
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"{len(metadata)} keys of metadata are more than {MAX_METADATA}")
    for name in (*table, *metadata, *metadata.values()):
        if not name.isascii() and _SURROGATE.search(name):
            raise ValueError(f"{shown(name)} is no text: it has half of a pair of surrogates")
    return table, metadata


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """By the file's ending, and by its first bytes where they are no header's length (a length may begin like any of these)."""
    refuse_pickle(path, start)
    if start.lstrip()[:1] == b"<":
        raise unreadable(path, "this is a web page, not a safetensors file")
    if start == b"version ":
        raise unreadable(path, "this is a Git LFS pointer, not the file itself")


def refuse_pickle(path: Path, start: bytes = b"") -> None:
    """Raise UnsafeFileError for a pickle, by the file's ending or its first bytes."""
    if path.suffix in _PICKLES or start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise UnsafeFileError(
            "a pickle can run code when it is read, so it is not read",
            where=path,
            remedy="Ask for a .safetensors file.",
        )


def _handle(file: Snapshot, row: Json, offset: int) -> Handle:
    shape, (start, end) = tuple(row["shape"]), row["data_offsets"]
    numbers = count(shape)
    if row["dtype"] not in SIZES or not all(type(n) is int and n >= 0 for n in (start, end)):
        raise ValueError(f"dtype {shown(row['dtype'])}, offsets {shown((start, end))}")
    if end - start != numbers * SIZES[row["dtype"]] or offset + end > file.size:
        raise ValueError("tensor bytes do not fit the file: truncated?")
    return Handle.within(file, row["dtype"], shape, offset + start, offset + end)


def _refuse_gaps(file: Snapshot, handles: Mapping[str, Handle], end: int) -> None:
    """Tensors lie side by side and fill the file: what lies between them could be anything."""
    for handle_ in sorted(handles.values(), key=lambda h: (h.start, h.end)):
        if handle_.start != end:
            raise unreadable(
                file.path,
                "tensors overlap" if handle_.start < end else "there are bytes between the tensors that belong to none",
            )
        end = handle_.end
    if end != file.size:
        raise unreadable(file.path, "there are bytes after the tensors that belong to none")


def save(path: str | os.PathLike[str], tensors: Mapping[str, Handle], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: one tensor in memory at a time, to a temporary file that replaces `path` only when it is whole.

    Raises CannotConvertError for what `header` would not read again, OSError if it cannot be written.
    """
    if "__metadata__" in tensors:
        raise CannotConvertError("no tensor can be called '__metadata__' in a safetensors file", where=path)
    table, end = _table_of(tensors, metadata)
    text = _header_of(table, path)
    with replacing(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        files: set[Snapshot] = set()
        for h in _joined(tensors.values()):
            for file in files_of(h) - files:
                file.check_written()
                files.add(file)
            if h.path is None or not _copied(h, f):
                for chunk in chunks(h):
                    f.write(chunk)
        f.flush()
        if (
            os.fstat(f.fileno()).st_size != 8 + len(text) + end
        ):  # never: whoever puts tensors together sees to it that they fit
            raise CannotConvertError("tensors have other sizes than their shapes say", where=path)
        for file in files:
            file.check()


def start_of(tensors: Mapping[str, Handle], metadata: Mapping[str, str]) -> int:
    """Where the first tensor's bytes begin in a file of these. Raises CannotConvertError as `save` does."""
    return 8 + len(_header_of(_table_of(tensors, metadata)[0], "a file of these tensors"))


def _table_of(tensors: Mapping[str, Handle], metadata: Mapping[str, str]) -> tuple[Json, int]:
    """What a header says of tensors that lie one behind the other, and where the last one ends."""
    table: Json = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, h in tensors.items():
        start, end = end, end + nbytes(h)
        table[key] = {"dtype": h.dtype, "shape": list(h.shape), "data_offsets": [start, end]}
    return table, end


def _header_of(table: Json, path: str | os.PathLike[str]) -> bytes:
    """The text of a header, which `header` reads. Raises CannotConvertError if it would refuse it."""
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    try:
        _judged(text)
        if len(encoded := text.encode()) > MAX_HEADER - 8:
            raise ValueError(f"its header has {len(encoded)} bytes, and at most {MAX_HEADER} are read")
    except (ValueError, TypeError, AttributeError) as error:
        raise CannotConvertError(f"a file like this would not be read again ({error})", where=path) from error
    return encoded + b" " * (-len(encoded) % 8)


def _joined(handles: Iterable[Handle]) -> Iterator[Handle]:
    """The pieces that tensors are made of; those that lie side by side in one file as one."""
    last: Handle | None = None
    for h in (leaf for handle_ in handles for leaf in _leaves(handle_)):
        if last and h.path is not None and (h.path, h.file, h.start) == (last.path, last.file, last.end):
            last = replace(last, end=h.end)
            continue
        if last:
            yield last
        last = h
    if last:
        yield last


def _leaves(handle_: Handle) -> Iterator[Handle]:
    if handle_.parts and not handle_.how:
        for part in handle_.parts:
            yield from _leaves(part)
    else:
        yield handle_


def _copied(handle_: Handle, target: BinaryIO) -> bool:
    """Whether the system could copy bytes of a file to the end of another by itself."""
    if not hasattr(os, "copy_file_range") or handle_.end - handle_.start < CHUNK:
        return False
    file, at = file_of(handle_), handle_.start
    target.flush()
    with file.descriptor() as source:
        while at < handle_.end:
            try:
                n = os.copy_file_range(source, target.fileno(), min(handle_.end - at, PIECE), at)
            except OSError as error:
                if at == handle_.start and error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    return False
                raise
            if not n:
                raise unreadable(file.path, "the file became shorter while it was read")
            at += n
            # starts writing, which the sync at the end waits for
            os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True

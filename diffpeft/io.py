"""safetensors in and out: header first, bytes on demand, atomic writes. The only file I/O of adapters.

The header is read by hand because detection and inspection must not import torch, and because every fault needs its own message.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpeft.bundle import Handle
from diffpeft.errors import CannotConvertError, CheckpointError, UnreadableFileError, UnsafeFileError, shown

if TYPE_CHECKING:
    import torch

MAX_HEADER, MAX_TENSORS, CHUNK, PIECE = 16 << 20, 1 << 16, 1 << 20, 32 << 20
_VECTORS = 512  # pieces of memory for one read: systems take 1024
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# how struct reads one number
_UNPACK = {
    "F64": "<d",
    "F32": "<f",
    "BF16": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
}
_NAMES = {name: code for code, name in _TORCH.items()}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def header(path: str | os.PathLike[str]) -> tuple[dict[str, Handle], dict[str, str]]:
    """The tensors of a safetensors file as handles, and its metadata. Reads the header only.

    Raises UnsafeFileError for pickles, UnreadableFileError for anything else that is not a whole safetensors file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UnreadableFileError("no such file" if not path.exists() else "not a regular file", where=path)
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little") if len(start) == 8 else 0
            fits = 2 <= length <= min(MAX_HEADER, size - 8)
            _refuse_other_kinds(path, b"" if fits else start)
            if not fits:
                raise _unreadable(path, "the header length does not fit the file: truncated, or no safetensors file")
            text = f.read(length)
    except OSError as error:
        raise UnreadableFileError(f"cannot read the file: {error.strerror}", where=path) from error
    try:
        table = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = table.pop("__metadata__", {})
        handles = {key: _handle(path, row, 8 + length, size) for key, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, f"the header is damaged ({error})") from error
    if len(handles) > MAX_TENSORS:
        raise _unreadable(path, f"{len(handles)} tensors are more than {MAX_TENSORS}")
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _unreadable(path, "the metadata is no table of strings")
    _refuse_gaps(path, handles, 8 + length, size)
    return handles, metadata


def _unreadable(path: Path, what: str) -> UnreadableFileError:
    return UnreadableFileError(what, where=path, remedy="Download or export it again as .safetensors.")


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """By the file's ending, and by its first bytes where they are no header's length (a length may begin like any of these)."""
    refuse_pickle(path, start)
    if start.lstrip()[:1] == b"<":
        raise _unreadable(path, "this is a web page, not a safetensors file")
    if start == b"version ":
        raise _unreadable(path, "this is a Git LFS pointer, not the file itself")


def refuse_pickle(path: Path, start: bytes = b"") -> None:
    """Raise UnsafeFileError for a pickle, by the file's ending or its first bytes."""
    if path.suffix in _PICKLES or start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise UnsafeFileError(
            "a pickle can run code when it is read, so it is not read",
            where=path,
            remedy="Ask for a .safetensors file.",
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _handle(path: Path, row: Mapping[str, Any], offset: int, size: int) -> Handle:
    shape, (start, end) = tuple(row["shape"]), row["data_offsets"]
    if row["dtype"] not in SIZES or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"dtype {shown(row['dtype'])}, shape {shown(shape)}")
    if end - start != math.prod(shape) * SIZES[row["dtype"]] or offset + end > size:
        raise ValueError("tensor bytes do not fit the file: truncated?")
    return Handle(row["dtype"], shape, path, offset + start, offset + end)


def _refuse_gaps(path: Path, handles: Mapping[str, Handle], end: int, size: int) -> None:
    """Tensors lie side by side and fill the file: what lies between them could be anything."""
    for handle in sorted(handles.values(), key=lambda h: (h.start, h.end)):
        if handle.start != end:
            raise _unreadable(
                path,
                "tensors overlap" if handle.start < end else "there are bytes between the tensors that belong to none",
            )
        end = handle.end
    if end != size:
        raise _unreadable(path, "there are bytes after the tensors that belong to none")


def chunks(handle_: Handle, files: dict[Path, Any] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, a few at a time. `files` keeps opened files for the next call."""
    if handle_.path is not None:
        kept = {} if files is None else files
        if handle_.path not in kept:
            kept[handle_.path] = open(handle_.path, "rb", buffering=0)  # noqa: SIM115
        yield from _read(kept[handle_.path], handle_)
        if files is None:
            kept[handle_.path].close()
    elif handle_.tensor is not None:
        yield _bytes(handle_.tensor)
    elif handle_.data is not None:
        yield handle_.data
    elif handle_.how[:1] in (("cast",), ("scaled",)):
        for chunk in chunks(handle_.parts[0], files):
            yield _computed(handle_, chunk)
    elif handle_.how:
        yield _assembled(handle_)
    elif handle_.parts:
        for part in handle_.parts:
            yield from chunks(part, files)
    else:
        for at in range(0, nbytes(handle_), CHUNK):
            yield bytes(min(CHUNK, nbytes(handle_) - at))


def _read(file: Any, handle_: Handle) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, handle_.end - handle_.start)))
    for at in range(handle_.start, handle_.end, CHUNK):
        view = buffer[: min(CHUNK, handle_.end - at)]
        done = 0
        file.seek(at)
        while done < len(view):
            if not (n := file.readinto(view[done:])):
                raise _unreadable(Path(file.name), "the file became shorter while it was read")
            done += n
        yield view


def _assembled(handle_: Handle) -> bytes:
    """Matrices put together, or cut, by columns; all numbers are whole bytes, so what they are does not matter."""
    import numpy as np

    def matrix(h: Handle) -> Any:
        return np.frombuffer(raw(h), np.uint8).reshape(h.shape[0], -1)

    size = SIZES[handle_.dtype]
    if handle_.how[0] == "diagonal":
        out = np.zeros((handle_.shape[0], math.prod(handle_.shape[1:]) * size), np.uint8)
        row = column = 0
        for part in handle_.parts:
            block = matrix(part)
            out[row : row + block.shape[0], column : column + block.shape[1]] = block
            row, column = row + block.shape[0], column + block.shape[1]
        return out.tobytes()
    _, first, end = handle_.how
    return np.ascontiguousarray(matrix(handle_.parts[0])[:, first * size : end * size]).tobytes()


def dtype_of(handle_: Handle) -> torch.dtype:
    """The dtype a tensor is stored in, as torch has it."""
    import torch

    return getattr(torch, _TORCH[handle_.dtype])


def nbytes(handle_: Handle) -> int:
    """How many bytes a tensor has."""
    return math.prod(handle_.shape) * SIZES[handle_.dtype]


def load(handles: Iterable[Handle]) -> list[torch.Tensor]:
    """The tensors themselves, on CPU, in the dtype they are stored in. A file is opened once and read from its start to its end."""
    import torch

    out: list[torch.Tensor] = []
    files: dict[Path, Any] = {}
    whole: dict[Path, list[tuple[int, memoryview]]] = {}  # what is read straight into its place
    try:
        for handle in handles:
            if handle.tensor is not None:
                out.append(handle.tensor)
                continue
            dtype = getattr(torch, _TORCH[handle.dtype])
            if handle.path is not None and handle.end > handle.start:
                tensor = torch.empty(handle.shape, dtype=dtype)
                flat: Any = tensor.view(-1).view(torch.uint8).numpy()
                whole.setdefault(handle.path, []).append((handle.start, memoryview(flat)))
                out.append(tensor)
                continue
            data, at = bytearray(nbytes(handle)), 0
            for chunk in chunks(handle, files):
                data[at : at + len(chunk)] = chunk
                at += len(chunk)
            out.append(
                (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(handle.shape)
            )
        for path, places in whole.items():
            _fill(path, places)
    finally:
        for file in files.values():
            file.close()
    return out


def _fill(path: Path, places: list[tuple[int, memoryview]]) -> None:
    """Bytes of a file into memory, each piece from where it starts; neighbours with one call."""
    places.sort(key=lambda place: place[0])
    with open(path, "rb", buffering=0) as file:
        todo: list[memoryview] = []
        start = end = 0
        for at, view in places:
            if todo and (at != end or len(todo) == _VECTORS):
                _scatter(file, start, todo)
                todo = []
            start, end = (start if todo else at), at + len(view)
            todo.append(view)
        _scatter(file, start, todo)


def _scatter(file: Any, start: int, todo: list[memoryview]) -> None:
    """The bytes from `start` on into one piece of memory after the other."""
    file.seek(start)
    done = os.readv(file.fileno(), todo) if hasattr(os, "readv") else 0
    for view in todo:
        if done >= len(view):
            done -= len(view)
            continue
        while done < len(view):
            if not (n := file.readinto(view[done:])):
                raise _unreadable(Path(file.name), "the file became shorter while it was read")
            done += n
        done = 0


def handle(tensor: torch.Tensor) -> Handle:
    """A handle on a tensor in memory."""
    code = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"dtype {tensor.dtype} cannot be stored in a safetensors file")
    return Handle(code, tuple(tensor.shape), tensor=tensor)


def raw(handle_: Handle) -> bytes:
    """The bytes of a tensor."""
    return b"".join(bytes(chunk) for chunk in chunks(handle_))


def held(handles: Iterable[Handle]) -> list[Handle]:
    """The tensors with their bytes in memory, of which there should be few."""
    files: dict[Path, Any] = {}
    try:
        return [
            h if h.path is None else Handle(h.dtype, h.shape, data=b"".join(map(bytes, chunks(h, files))))
            for h in handles
        ]
    finally:
        for file in files.values():
            file.close()


def same(a: Handle, b: Handle) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if a == b if a.tensor is None and b.tensor is None else a.tensor is b.tensor:
        return True
    return (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)


def scalar(value: float) -> Handle:
    """A single number, in float32."""
    return Handle("F32", (), data=struct.pack("<f", value))


def of_bytes(dtype: str, shape: tuple[int, ...], data: bytes) -> Handle:
    """A tensor made of bytes. Raises ValueError if they are not as many as it has."""
    if dtype not in SIZES or len(data) != SIZES[dtype] * math.prod(shape):
        raise ValueError(f"{len(data)} bytes are no {dtype} {shape}")
    return Handle(dtype, shape, data=data)


def reshaped(handle_: Handle, shape: tuple[int, ...]) -> Handle:
    """The same numbers in another shape."""
    tensor = handle_.tensor
    if handle_.how:
        return Handle(handle_.dtype, shape, parts=(handle_,))
    return replace(handle_, shape=shape, tensor=None if tensor is None else tensor.reshape(shape))


def rows(handle_: Handle, ranges: Iterable[tuple[int, int]]) -> Handle:
    """Ranges (first, end) of a tensor's first axis, one after the other."""
    ranges = list(ranges)
    if ranges == [(0, handle_.shape[0])]:
        return handle_
    row = nbytes(handle_) // handle_.shape[0]
    shape = (sum(b - a for a, b in ranges), *handle_.shape[1:])
    cuts = tuple(_cut(handle_, a * row, b * row) for a, b in ranges)
    return replace(cuts[0], shape=shape) if len(cuts) == 1 else Handle(handle_.dtype, shape, parts=cuts)


def _cut(handle_: Handle, start: int, end: int) -> Handle:
    """Bytes [start, end) of a tensor, as a tensor of one axis."""
    shape = ((end - start) // SIZES[handle_.dtype],)
    if handle_.path is not None:
        return replace(handle_, shape=shape, start=handle_.start + start, end=handle_.start + end)
    if handle_.tensor is not None or handle_.data is not None or handle_.how:
        return Handle(handle_.dtype, shape, data=raw(handle_)[start:end])
    found, at = [], 0
    for part in handle_.parts:
        a, b = max(start - at, 0), min(end - at, nbytes(part))
        found += [_cut(part, a, b)] if a < b else []
        at += nbytes(part)
    return Handle(handle_.dtype, shape, parts=tuple(found))


def columns(handle_: Handle, first: int, end: int) -> Handle:
    """Columns [first, end) of a matrix."""
    return Handle(handle_.dtype, (handle_.shape[0], end - first), parts=(handle_,), how=("columns", first, end))


def stacked(parts: Iterable[Handle]) -> Handle:
    """Tensors one under the other. They have one dtype, and the same axes after the first."""
    parts = tuple(parts)
    shape = (sum(h.shape[0] for h in parts), *parts[0].shape[1:])
    return parts[0] if len(parts) == 1 else Handle(parts[0].dtype, shape, parts=parts)


def diagonal(parts: Iterable[Handle]) -> Handle:
    """Matrices along the diagonal of one that is zero elsewhere; trailing axes of 1 are kept."""
    parts = tuple(parts)
    shape = (sum(h.shape[0] for h in parts), sum(h.shape[1] for h in parts), *parts[0].shape[2:])
    return Handle(parts[0].dtype, shape, parts=parts, how=("diagonal",))


def number(alpha: Handle | float | None) -> float | None:
    """A stored or configured alpha as a number; None stays None. For a file of the usual dtypes torch is not needed."""
    if not isinstance(alpha, Handle):
        return alpha
    if math.prod(alpha.shape) != 1:
        raise CheckpointError(f"an alpha of shape {alpha.shape} is no single number", where=alpha.path or "")
    if alpha.dtype not in _UNPACK:
        return float(load([alpha])[0].item())
    data = raw(alpha)
    if len(data) != SIZES[alpha.dtype]:
        raise _unreadable(alpha.path or Path(), "the file became shorter while it was read")
    if alpha.dtype == "BF16":  # the upper half of an F32
        data = b"\0\0" + data
    return float(struct.unpack(_UNPACK[alpha.dtype], data)[0])


def cast(handle_: Handle, dtype: torch.dtype | None, where: str = "") -> Handle:
    """The same tensor in another dtype, if it is a floating point tensor of more than one number (an alpha keeps its dtype).

    It is cast when it is read, which raises CannotConvertError naming `where` if that dtype cannot hold its values.
    """
    if dtype is None or not handle_.shape or handle_.dtype[0] not in "FB" or handle_.dtype == "BOOL":
        return handle_
    return Handle(_NAMES[str(dtype).removeprefix("torch.")], handle_.shape, parts=(handle_,), how=("cast", where))


def scaled(handle_: Handle, factor: float) -> Handle:
    """The tensor times a number, computed in float64 and rounded once, when it is read."""
    return (
        handle_
        if factor == 1
        else replace(handle_, path=None, tensor=None, data=None, parts=(handle_,), how=("scaled", factor))
    )


def _computed(handle_: Handle, chunk: bytes | memoryview) -> bytes:
    """Some bytes of a tensor that is cast or scaled, from those of its part."""
    import torch

    what, value = handle_.how
    tensor = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, _TORCH[handle_.parts[0].dtype]))
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()  # half to half directly is slow
    out = (tensor.double() * value if what == "scaled" else wide).to(getattr(torch, _TORCH[handle_.dtype]))
    if what == "cast" and not torch.stack(out.aminmax()).isfinite().all():
        raise CannotConvertError(
            f"there are values that are not finite in {out.dtype}", where=value, remedy="Save in a wider dtype."
        )
    return _bytes(out)


def save(path: str | os.PathLike[str], tensors: Mapping[str, Handle], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: one tensor in memory at a time, to a temporary file that replaces `path` only when it is whole."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, h in tensors.items():
        start, end = end, end + nbytes(h)
        table[key] = {"dtype": h.dtype, "shape": list(h.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        files: dict[Path, Any] = {}
        try:
            for h in _joined(tensors.values()):
                if h.path is None or not _copied(h, f, files):
                    for chunk in chunks(h, files):
                        f.write(chunk)
        finally:
            for file in files.values():
                file.close()


def _joined(handles: Iterable[Handle]) -> Iterator[Handle]:
    """The pieces that tensors are made of; those that lie side by side in one file as one."""
    last: Handle | None = None
    for h in (leaf for handle_ in handles for leaf in _leaves(handle_)):
        if last and h.path is not None and h.path == last.path and h.start == last.end:
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


def _copied(handle_: Handle, target: Any, files: dict[Path, Any]) -> bool:
    """Whether the system could copy bytes of a file to the end of another by itself."""
    assert handle_.path is not None
    if not hasattr(os, "copy_file_range") or handle_.end - handle_.start < CHUNK:
        return False
    if handle_.path not in files:
        files[handle_.path] = open(handle_.path, "rb", buffering=0)  # noqa: SIM115
    source, at = files[handle_.path].fileno(), handle_.start
    target.flush()
    while at < handle_.end:
        try:
            n = os.copy_file_range(source, target.fileno(), min(handle_.end - at, PIECE), at)
        except OSError as error:
            if at == handle_.start and error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        if not n:
            raise _unreadable(handle_.path, "the file became shorter while it was read")
        at += n
        os.posix_fadvise(
            target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # starts writing, which the sync at the end waits for
    return True


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]):
    """A binary file that becomes `path` when the block ends well, and leaves nothing behind when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(fd, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def folder(path: str | os.PathLike[str]):
    """A temporary folder that becomes `path` when the block ends well, and leaves nothing behind when it does not.

    If `path` is a folder already, the files move into it one by one, and what else it holds stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        if path.exists():
            for file in sorted(temporary.iterdir(), reverse=True):
                os.replace(file, path / file.name)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

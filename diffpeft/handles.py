"""What the tensors of handles are made of, and their bytes: read, cut, put together, cast. Only bytes are read here, and as late as may be."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft.errors import CannotConvertError, CheckpointError
from diffpeft.files import Snapshot
from diffpeft.readable import Readable

if TYPE_CHECKING:
    import numpy as np
    import torch

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
CHUNK = 1 << 20
MAX_AXES, MAX_NUMBERS = 16, 1 << 48  # of a tensor


@dataclass(frozen=True)
class Diagonal:
    """Matrices along the diagonal of one that is zero elsewhere."""


@dataclass(frozen=True)
class Columns:
    """Columns [first, end) of a matrix."""

    first: int
    end: int


@dataclass(frozen=True)
class Beside:
    """Matrices side by side."""


@dataclass(frozen=True)
class Cast:
    """Another dtype; `where` is named if it cannot hold the values."""

    where: str = ""


@dataclass(frozen=True)
class Scaled:
    """Times a number, computed in float64 and rounded once."""

    factor: float


@dataclass(frozen=True, repr=False)
class Handle(Readable):
    """One stored tensor, not yet read: safetensors dtype name, shape, and where the bytes are.

    They are bytes [start, end) of `path`, a tensor, bytes in memory, or made of other handles' (`parts`): their bytes one after the other, or as
    `how` says. Without any: zeros.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    start: int = 0
    end: int = 0
    tensor: torch.Tensor | None = None
    data: bytes | None = None
    parts: tuple[Handle, ...] = ()
    how: Diagonal | Columns | Beside | Cast | Scaled | None = None
    file: Snapshot | None = None  # open, at `path`; without it the path is opened when the bytes are read

    @classmethod
    def within(cls, file: Snapshot, dtype: str, shape: tuple[int, ...], start: int, end: int) -> Handle:
        """Bytes [start, end) of an open file. Written straight: a header has thousands, and a frozen object is slow to set."""
        handle_ = cls.__new__(cls)
        handle_.__dict__.update(dtype=dtype, shape=shape, path=file.path, start=start, end=end, file=file)
        return handle_


def count(shape: Sequence[int]) -> int:
    """How many numbers a tensor of a shape has. Raises ValueError for a shape that no tensor can have, before anything is multiplied."""
    if len(shape) > MAX_AXES:
        raise ValueError(f"a shape of {len(shape)} axes, and at most {MAX_AXES} are read")
    if not all(type(n) is int and 0 <= n <= MAX_NUMBERS for n in shape) or math.prod(filter(None, shape)) > MAX_NUMBERS:
        raise ValueError(f"a shape of {tuple(shape)}")
    return math.prod(shape)


def chunks(handle_: Handle) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, a few at a time."""
    if handle_.path is not None:
        yield from _read(file_of(handle_), handle_)
    elif handle_.tensor is not None:
        yield _bytes(handle_.tensor)
    elif handle_.data is not None:
        yield handle_.data
    elif isinstance(handle_.how, (Cast, Scaled)):
        for chunk in chunks(handle_.parts[0]):
            yield _computed(handle_, handle_.how, chunk)
    elif isinstance(handle_.how, Columns):
        yield _columns(handle_, handle_.how)
    elif isinstance(handle_.how, Beside):
        yield _side_by_side(handle_)
    elif handle_.how:
        yield _diagonal(handle_)
    elif handle_.parts:
        for part in handle_.parts:
            yield from chunks(part)
    else:
        for at in range(0, nbytes(handle_), CHUNK):
            yield bytes(min(CHUNK, nbytes(handle_) - at))


def file_of(handle_: Handle) -> Snapshot:
    """The open file that a handle's bytes are in."""
    assert handle_.path is not None
    return handle_.file or Snapshot.of(handle_.path)


def _read(file: Snapshot, handle_: Handle) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(CHUNK, handle_.end - handle_.start)))
    for at in range(handle_.start, handle_.end, CHUNK):
        view = buffer[: min(CHUNK, handle_.end - at)]
        file.fill(at, [view])
        yield view


def _matrix(handle_: Handle) -> np.ndarray:
    """The bytes of a tensor [rows, ...] as [rows, bytes a row]: numbers are whole bytes, so what they are does not matter to who moves them."""
    import numpy as np

    return np.frombuffer(raw(handle_), np.uint8).reshape(handle_.shape[0], -1)


def _diagonal(handle_: Handle) -> bytes:
    import numpy as np

    out = np.zeros((handle_.shape[0], math.prod(handle_.shape[1:]) * SIZES[handle_.dtype]), np.uint8)
    row = column = 0
    for block in map(_matrix, handle_.parts):
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out.tobytes()


def _columns(handle_: Handle, how: Columns) -> bytes:
    size = SIZES[handle_.dtype]
    return _matrix(handle_.parts[0])[:, how.first * size : how.end * size].tobytes()


def _side_by_side(handle_: Handle) -> bytes:
    import numpy as np

    return np.concatenate([_matrix(part) for part in handle_.parts], 1).tobytes()


def dtype_of(handle_: Handle) -> torch.dtype:
    """The dtype a tensor is stored in, as torch has it."""
    import torch

    return getattr(torch, _TORCH[handle_.dtype])


def nbytes(handle_: Handle) -> int:
    """How many bytes a tensor has."""
    return count(handle_.shape) * SIZES[handle_.dtype]


def load(handles: Iterable[Handle]) -> list[torch.Tensor]:
    """The tensors themselves, on CPU, in the dtype they are stored in. A file is read from its start to its end.

    Raises UnreadableFileError if a file was changed meanwhile, or is not whole.
    """
    import numpy as np
    import torch

    out: list[torch.Tensor] = []
    places: dict[Snapshot, list[tuple[int, memoryview]]] = {}  # what is read straight into its place
    for handle in handles:
        if handle.tensor is not None:
            out.append(handle.tensor)
            continue
        for file in files_of(handle) if handle.file is None else (handle.file,):
            if file not in places:
                file.check_written()
                places[file] = []
        dtype, size = dtype_of(handle), handle.end - handle.start
        if handle.path is not None and size > 0:
            memory = np.empty(size, np.uint8)
            places[handle.file or file_of(handle)].append((handle.start, memory.data))
            out.append(torch.frombuffer(memory, dtype=dtype).view(handle.shape))
            continue
        data, at = bytearray(nbytes(handle)), 0
        for chunk in chunks(handle):
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
        out.append((torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(handle.shape))
    for file, pieces in places.items():
        _fill(file, pieces)
        file.check()
    return out


def finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite, in any dtype that a file may have; torch itself cannot tell for those of 8 bits."""
    return not tensor.is_floating_point() or bool((tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all())


def files_of(handle_: Handle) -> set[Snapshot]:
    """The files that a handle's bytes are in."""
    if handle_.path is not None:
        return {file_of(handle_)}
    return set().union(*map(files_of, handle_.parts))


def _fill(file: Snapshot, places: list[tuple[int, memoryview]]) -> None:
    """Bytes of a file into memory, each piece from where it starts; neighbours with one call."""
    places.sort(key=lambda place: place[0])
    todo: list[memoryview] = []
    start = end = 0
    for at, view in places:
        if todo and at != end:
            file.fill(start, todo)
            todo = []
        start, end = (start if todo else at), at + len(view)
        todo.append(view)
    file.fill(start, todo)


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
    """Single numbers with their bytes in memory; what is no single number stays where it is."""
    return [Handle(h.dtype, h.shape, data=raw(h)) if h.path is not None and count(h.shape) == 1 else h for h in handles]


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
    if dtype not in SIZES or len(data) != SIZES[dtype] * count(shape):
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
    pieces, at = [], 0
    for part in handle_.parts:
        a, b = max(start - at, 0), min(end - at, nbytes(part))
        pieces += [_cut(part, a, b)] if a < b else []
        at += nbytes(part)
    return Handle(handle_.dtype, shape, parts=tuple(pieces))


def columns(handle_: Handle, start: int, end: int) -> Handle:
    """Columns [first, end) of a matrix."""
    return Handle(handle_.dtype, (handle_.shape[0], end - start), parts=(handle_,), how=Columns(start, end))


def stacked(parts: Iterable[Handle]) -> Handle:
    """Tensors one under the other. They have one dtype, and the same axes after the first."""
    parts = tuple(parts)
    shape = (sum(h.shape[0] for h in parts), *parts[0].shape[1:])
    return parts[0] if len(parts) == 1 else Handle(parts[0].dtype, shape, parts=parts)


def beside(parts: Iterable[Handle]) -> Handle:
    """Matrices side by side; trailing axes of 1 are kept. They have one dtype, and the same number of rows."""
    parts = tuple(parts)
    shape = (parts[0].shape[0], sum(h.shape[1] for h in parts), *parts[0].shape[2:])
    return parts[0] if len(parts) == 1 else Handle(parts[0].dtype, shape, parts=parts, how=Beside())


def diagonal(parts: Iterable[Handle]) -> Handle:
    """Matrices along the diagonal of one that is zero elsewhere; trailing axes of 1 are kept."""
    parts = tuple(parts)
    shape = (sum(h.shape[0] for h in parts), sum(h.shape[1] for h in parts), *parts[0].shape[2:])
    return Handle(parts[0].dtype, shape, parts=parts, how=Diagonal())


def number(alpha: Handle | float | None) -> float | None:
    """A stored or configured alpha as a number; None stays None. For a file of the usual dtypes torch is not needed."""
    if not isinstance(alpha, Handle):
        return alpha
    if count(alpha.shape) != 1:
        raise CheckpointError(f"an alpha of shape {alpha.shape} is no single number", where=alpha.path or "")
    if alpha.dtype not in _UNPACK:
        return float(load([alpha])[0].item())
    data = raw(alpha)
    if alpha.dtype == "BF16":  # the upper half of an F32
        data = b"\0\0" + data
    return float(struct.unpack(_UNPACK[alpha.dtype], data)[0])


def cast(handle_: Handle, dtype: torch.dtype | None, where: str = "") -> Handle:
    """The same tensor in another dtype, if it is a floating point tensor of more than one number (an alpha keeps its dtype).

    It is cast when it is read, which raises CannotConvertError naming `where` if that dtype cannot hold its values.
    """
    if dtype is None or not handle_.shape or handle_.dtype[0] not in "FB" or handle_.dtype == "BOOL":
        return handle_
    return Handle(_NAMES[str(dtype).removeprefix("torch.")], handle_.shape, parts=(handle_,), how=Cast(where))


def scaled(handle_: Handle, factor: float) -> Handle:
    """The tensor times a number, computed in float64 and rounded once, when it is read."""
    return handle_ if factor == 1 else Handle(handle_.dtype, handle_.shape, parts=(handle_,), how=Scaled(factor))


def _computed(handle_: Handle, how: Cast | Scaled, chunk: bytes | memoryview) -> bytes:
    """Some bytes of a tensor that is cast or scaled, from those of its part."""
    import torch

    tensor = torch.frombuffer(bytearray(chunk), dtype=dtype_of(handle_.parts[0]))
    if isinstance(how, Scaled):
        out = (tensor.double() * how.factor).to(dtype_of(handle_))
    else:
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()  # half to half directly is slow
        out = wide.to(dtype_of(handle_))
    if out.numel() and not finite(torch.stack((out if out.itemsize > 1 else out.float()).aminmax())):
        where = how.where if isinstance(how, Cast) else ""
        raise CannotConvertError(
            f"there are values that are not finite in {out.dtype}", where=where, remedy="Save in a wider dtype."
        )
    return _bytes(out)


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

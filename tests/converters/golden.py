"""What files of every method become in every format, by their bytes: golden.json holds a hash of each, or that the conversion is refused.

    python -m tests.converters.golden         writes it anew

Nobody's file may change unseen. Where it must, write golden.json anew, and say in CHANGELOG.md what changed. The adapters are factory.py's, their
numbers simple fractions instead of random ones, so that no version of torch draws others. Conversions that compute (L1) are left to the matrix.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from diffpeft import CannotConvertError, converters
from diffpeft.converters import FORMATS
from tests.converters.factory import METHODS, Checkpoint, checkpoint
from tests.converters.test_matrix import SOURCES, WHERE, exists, output, plain, weights

PATH = Path(__file__).parent / "golden.json"
WRITABLE = tuple(name for name, format in FORMATS.items() if format.writable)
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
REFUSED, COMPUTED = "refused", "computed"


def sources() -> list[tuple[str, str, str]]:
    """(method, family, format): each method in each of its formats once, its families in turn."""
    rows = []
    for method in METHODS:
        for number, format in enumerate(SOURCES[method]):
            families = [family for family in WHERE[method] if exists(format, family)]
            rows.append((method, families[number % len(families)], format))
    return rows


def made(method: str, family: str, format: str) -> Checkpoint:
    """An adapter of fractions."""
    file = checkpoint(format, family, method, layers=lambda site: plain(site, method))
    for number, (key, tensor) in enumerate(file.tensors.items()):
        if tensor.is_floating_point() and not key.endswith(".alpha"):
            values = (torch.arange(tensor.numel()) * 7 + number) % 31 - 15
            file.tensors[key] = (values / 64).to(tensor.dtype).reshape(tensor.shape)
    return file


def saved(file: Checkpoint, folder: Path) -> Path:
    """The adapter in files whose bytes are its own: safetensors' writer puts metadata in any order."""
    path = file.save(folder)
    header: dict[str, object] = {"__metadata__": dict(sorted((file.metadata or {}).items()))}
    data = b""
    for key, tensor in sorted(file.tensors.items()):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        span = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        data += raw
    text = json.dumps(header).encode()
    weights(path).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def digest(path: Path) -> str:
    """Of a file, or of all in a folder."""
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            sha.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return sha.hexdigest()[:12]


def results(method: str, family: str, format: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(format, what becomes of the adapter there)."""
    path = saved(made(method, family, format), folder)
    for to in WRITABLE:
        out = output(folder, to, f"to-{to}")
        try:
            report = converters.convert(path, out, to=to, family=family)
        except CannotConvertError:
            yield to, REFUSED
        else:
            yield to, digest(out) if report.level == "L0" else COMPUTED


def table() -> dict[str, dict[str, str]]:
    """All of it."""
    rows = {}
    for source in sources():
        with tempfile.TemporaryDirectory() as folder:
            rows[" ".join(source)] = dict(results(*source, Path(folder)))
    return rows


if __name__ == "__main__":
    lines = (f"{json.dumps(source)}: {json.dumps(row)}" for source, row in table().items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")

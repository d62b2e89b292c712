"""safetensors by hand: what is refused and how, and agreement with the library."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffpeft import io
from diffpeft.bundle import Handle
from diffpeft.errors import CheckpointError, DiffpeftError, UnreadableFileError, UnsafeFileError

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def built(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def row(**changes):
    return {"x": {**ROW, **changes}}


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "seven bytes": (lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0"), "truncated"),
    "no header": (lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0\0"), "truncated"),
    "length of 2^63": (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "header length"),
    "length over the limit": (lambda p: built(p, b"{}" + b" " * (io.MAX_HEADER + 1)), "header length"),
    "tensor cut": (lambda p: built(p, row(), b"\0" * 7), "truncated"),
    "header cut": (lambda p: built(p, b'{"x":'), "damaged"),
    "header of another kind": (lambda p: built(p, b"[1, 2]"), "damaged"),
    "header in UTF-16": (lambda p: built(p, json.dumps(row()).encode("utf-16")), "damaged"),
    "header too deep": (lambda p: built(p, b"[" * 100_000), "damaged"),
    "a key twice": (lambda p: built(p, b'{"x":%s,"x":%s}' % ((json.dumps(ROW).encode(),) * 2)), "twice"),
    "a field twice": (
        lambda p: built(p, b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "twice",
    ),
    "a field missing": (lambda p: built(p, {"x": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
    "unknown dtype": (lambda p: built(p, row(dtype="F31")), "dtype"),
    "dtype of another kind": (lambda p: built(p, row(dtype=["F32"])), "damaged"),
    "negative shape": (lambda p: built(p, row(shape=[-2])), "shape"),
    "shape of floats": (lambda p: built(p, row(shape=[2.0])), "shape"),
    "offsets of another size": (lambda p: built(p, row(data_offsets=[0, 4])), "fit"),
    "offsets backwards": (lambda p: built(p, row(shape=[0], data_offsets=[8, 0])), "fit"),
    "three offsets": (lambda p: built(p, row(data_offsets=[0, 4, 8])), "damaged"),
    "overlap": (lambda p: built(p, {"x": ROW, "y": {**ROW, "data_offsets": [4, 12]}}, b"\0" * 12), "overlap"),
    "same bytes twice": (lambda p: built(p, {"x": ROW, "y": ROW}), "overlap"),
    "a gap": (lambda p: built(p, row(data_offsets=[4, 12]), b"\0" * 12), "between"),
    "bytes at the end": (lambda p: built(p, row(), b"\0" * 9), "after"),
    "metadata of numbers": (lambda p: built(p, {"__metadata__": {"a": 1}, **row()}), "metadata"),
    "metadata of another kind": (lambda p: built(p, {"__metadata__": "a", **row()}), "metadata"),
    "web page": (lambda p: p.write_bytes(b"\n<!DOCTYPE html><html></html>"), "web page"),
    "LFS pointer": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "LFS"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_file_is_refused_and_says_why(case, tmp_path):
    path = tmp_path / "x.safetensors"
    make, said = BAD[case]
    make(path)
    with pytest.raises(UnreadableFileError, match=said) as caught:
        io.load(io.header(path)[0].values())
    assert str(path) in str(caught.value)
    if case not in ("length over the limit", "a key twice"):  # the library allows 100 MB, and takes one of the two
        with pytest.raises((SafetensorError, RuntimeError, TypeError)):
            load_file(path)


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.pth", "x.safetensors"])
@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
def test_a_pickle_is_never_read(name, protocol, tmp_path):
    path = tmp_path / name
    if protocol is None:
        torch.save({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": "y" * 100}, protocol=protocol))
    with pytest.raises(UnsafeFileError, match="pickle"):
        io.header(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        io.header(tmp_path)
    with pytest.raises(UnreadableFileError, match="no such file"):
        io.header(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        io.header(tmp_path / "pipe")


@pytest.mark.parametrize("length", [60, 0x280, 0x480, 0x3C20, 0x3C0A, 0x580])
def test_a_header_length_that_looks_like_another_kind_of_file_is_just_a_length(length, tmp_path):
    """640 is b"\\x80\\x02", how a pickle begins; 15392 is b" <", how a web page does."""
    text = json.dumps(row()).encode()
    text = (
        text.ljust(length)
        if len(text) <= length
        else b'{"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'.ljust(length)
    )
    path = built(tmp_path / "x.safetensors", text)
    assert list(io.header(path)[0]) == list(load_file(path)) == ["x"]


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensors():
    made = {str(dtype): (torch.randn(3, 2) * 9).to(dtype) for dtype in DTYPES}
    odd = {
        "scalar": torch.tensor(4.0),
        "one": torch.tensor([4]),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(2, 3).T,
        'é \n"': torch.ones(1),
    }
    return made | odd


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().view(-1).view(torch.uint8), b[k].contiguous().view(-1).view(torch.uint8))
        for k in a
    )


def test_what_the_library_writes_is_read_and_the_other_way_round(tmp_path):
    want = tensors()
    save_file({k: t.contiguous() for k, t in want.items()}, tmp_path / "theirs", metadata={"a": "é"})
    handles, metadata = io.header(tmp_path / "theirs")
    assert metadata == {"a": "é"} and same(dict(zip(handles, io.load(handles.values()), strict=True)), want)
    io.save(tmp_path / "ours", {k: io.handle(t) for k, t in want.items()}, {"a": "é"})
    assert same(load_file(tmp_path / "ours"), want) and io.header(tmp_path / "ours")[1] == {"a": "é"}
    io.save(tmp_path / "copy", handles, metadata)  # from file to file
    assert same(load_file(tmp_path / "copy"), want)


def test_a_file_may_hold_metadata_only(tmp_path):
    io.save(tmp_path / "x", {}, {"a": "b"})
    assert io.header(tmp_path / "x") == ({}, {"a": "b"}) and load_file(tmp_path / "x") == {}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.safetensors"
    io.save(path, {"x": io.handle(torch.ones(2))}, {})
    before = path.read_bytes()
    damaged = {"x": io.handle(torch.zeros(2)), "y": Handle("F32", (2,), path=tmp_path / "gone", end=8)}
    with pytest.raises((OSError, DiffpeftError)):
        io.save(path, damaged, {})
    with pytest.raises(KeyboardInterrupt):
        with io.replacing(path) as f:
            f.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_a_file_has_the_usual_permissions(tmp_path):
    io.save(tmp_path / "x", {}, {"a": "b"})
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = built(tmp_path / "x.safetensors", row())
    handles, _ = io.header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UnreadableFileError, match="shorter"):
        io.load(handles.values())


def test_an_alpha_is_one_number():
    for alpha in (torch.tensor(4), torch.tensor([4.0]), torch.tensor([[4.0]], dtype=torch.float16)):
        assert io.number(io.handle(alpha)) == 4
    assert io.number(None) is None and io.number(3) == 3
    with pytest.raises(CheckpointError, match="alpha"):
        io.number(io.handle(torch.ones(2)))


def test_a_cast_leaves_alphas_and_integers_alone():
    assert io.cast(io.handle(torch.ones(2)), torch.float16).dtype == "F16"
    assert io.cast(io.handle(torch.tensor(2.0)), torch.float16).dtype == "F32"
    assert io.cast(io.handle(torch.ones(2, dtype=torch.int64)), torch.float16).dtype == "I64"
    assert io.cast(io.handle(torch.ones(2)), None).dtype == "F32"


def test_a_dtype_that_files_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="complex64"):
        io.handle(torch.ones(2, dtype=torch.complex64))

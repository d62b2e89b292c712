"""Metadata change and tensors do not; hashes are those that sd-scripts defines."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffpeft import CheckpointError, ConfigError, UnknownNameError
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.tools.editing import edit
from tests.converters.test_hashes import definition, tensors_of


def halves(path):
    """The header, and the bytes after it."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), data[begin:]


def metadata_of(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors_of(7), path, {"ss_seed": "3", "modelspec.title": "before", "trained_words": '["old"]'})
    return path


@pytest.mark.parametrize("copy", [False, True])
def test_the_bytes_of_the_tensors_stay(file, tmp_path, copy):
    before, data = halves(file)
    out = tmp_path / "b.safetensors" if copy else None
    report = edit(file, set={"modelspec.title": 'ä "new"\n', "x": "y"}, unset=["ss_seed"], out=out)
    after, now = halves(out or file)
    assert now == data
    assert {**after, "__metadata__": 0} == {**before, "__metadata__": 0}  # names, shapes and places
    assert metadata_of(out or file) == {"modelspec.title": 'ä "new"\n', "x": "y", "trained_words": '["old"]'}
    assert {*report.changed} == {"modelspec.title", "x"} and report.removed == ("ss_seed",)
    assert (halves(file)[0] == before) == copy
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"][: 1 + copy]


def test_tensors_that_lie_in_another_order_than_the_header_has_them_stay_where_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    table = {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}  # fmt: skip
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"aaaabbbb")
    edit(path, set={"x": "y"})
    after, data = halves(path)
    assert data == b"aaaabbbb" and {k: after[k] for k in table} == table


@pytest.mark.parametrize("size", [7, 70_001])
def test_hashes_are_renewed(tmp_path, size):
    path, tensors = tmp_path / "a.safetensors", tensors_of(size)
    save_file(tensors, path, {"ss_seed": "3"})
    assert "sshs_model_hash" in edit(path, hashed=True).changed
    assert (metadata_of(path)["sshs_model_hash"], metadata_of(path)["sshs_legacy_hash"]) == definition(
        tensors, {"ss_seed": "3"}
    )
    edit(path, set={"ss_seed": "4" * 90, "modelspec.title": "z"})
    told = metadata_of(path)
    model, legacy = definition(tensors, {"ss_seed": "4" * 90})
    assert (told["sshs_model_hash"], told["sshs_legacy_hash"]) == (model, legacy)
    assert told["modelspec.hash_sha256"] == f"0x{model}"


def test_a_file_without_hashes_gets_none_unless_they_are_asked_for(file):
    edit(file, set={"x": "y"})
    assert not [key for key in metadata_of(file) if "hash" in key]


def test_trigger_words_are_said_wherever_the_file_says_them(file):
    edit(file, trigger_words=["a cat", " b ", ""])
    assert metadata_of(file)["modelspec.trigger_phrase"] == "a cat, b"
    assert json.loads(metadata_of(file)["trained_words"]) == ["a cat", "b"]
    report = edit(file, trigger_words=[])
    assert {*report.removed} == {"modelspec.trigger_phrase", "trained_words"}


def test_a_thumbnail_is_a_small_picture(file, tmp_path):
    Image.new("RGBA", (900, 300), "red").save(tmp_path / "p.png")
    edit(file, thumbnail=tmp_path / "p.png")
    start, _, data = metadata_of(file)["modelspec.thumbnail"].partition(",")
    assert start == "data:image/jpeg;base64" and len(data) < 20_000
    with pytest.raises(ConfigError, match="no picture"):
        edit(file, thumbnail=file)


def test_mistakes_change_nothing(file, tmp_path):
    before = file.read_bytes()
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    with pytest.raises(UnknownNameError, match="Did you mean 'modelspec"):
        edit(file, unset=["modelspec.titel"])
    with pytest.raises(ConfigError, match="worked out of the tensors"):
        edit(file, set={"sshs_model_hash": "0"})
    with pytest.raises(ConfigError, match="--overwrite"):
        edit(file, set={"x": "y"}, out=tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="folder"):
        edit(tmp_path, set={"x": "y"})
    with pytest.raises(CheckpointError):
        edit(tmp_path / "b.safetensors", set={"x": "y"})
    assert file.read_bytes() == before and (tmp_path / "b.safetensors").read_bytes() == b"mine"
    edit(file, set={"x": "y"}, out=tmp_path / "b.safetensors", overwrite=True)
    assert metadata_of(tmp_path / "b.safetensors")["x"] == "y"


def test_the_command(file, capsys, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    args = ["edit", str(file), "--set", "modelspec.title=a=b", "--trigger-words", "x, y", "--unset", "ss_seed"]
    assert run(cli, args) == 0
    assert "modelspec.title" in capsys.readouterr().out
    assert metadata_of(file)["modelspec.title"] == "a=b" and "ss_seed" not in metadata_of(file)
    assert run(cli, ["edit", str(file), "--set", "nothing"]) == 2 and "KEY=TEXT" in capsys.readouterr().err


def test_a_tensor_of_a_whole_file_is_not_read_into_memory(tmp_path, monkeypatch):
    """Without hashes to renew no tensor passes through Python where the system copies by itself."""
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / "a.safetensors")
    monkeypatch.setattr("diffpeft.handles._read", lambda *_: pytest.fail("a tensor was read"))
    if hasattr(os, "copy_file_range"):
        edit(tmp_path / "a.safetensors", set={"x": "y"})

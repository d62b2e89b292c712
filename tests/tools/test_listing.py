"""A row for each adapter of a folder, whatever is wrong with the others."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffpeft
from diffpeft import CheckpointError, ConfigError, converters
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.tools.catalogue import catalogue
from diffpeft.tools.listing import list_adapters
from tests.converters.factory import FORMATS, METHODS, checkpoint

PIXEL = "data:image/png;base64," + base64.b64encode(b"not looked into").decode()


@pytest.fixture
def folder(tmp_path):
    """Files of every format, and what else lies about."""
    for format in FORMATS:
        file = checkpoint(format, "sd15" if format != "comfyui" else "flux", carried=False, text=False)
        file.metadata = {**(file.metadata or {}), "modelspec.trigger_phrase": "one, two", "modelspec.title": "<b>"}
        file.save(tmp_path, format)
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "none")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "in").mkdir()
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8),
         "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2)},
        tmp_path / "in" / "deep.safetensors", {"modelspec.thumbnail": PIXEL},
    )  # fmt: skip
    Image.new("RGB", (40, 80), "blue").save(tmp_path / "kohya.preview.png")
    return tmp_path


BAD = ["broken.safetensors", "empty.safetensors", "nowhere.safetensors", "other.safetensors"]


def test_a_row_a_file_and_an_error_is_one(folder):
    rows = {row.path.removeprefix(f"{folder}/"): row for row in list_adapters(folder)}
    files = [name if name == "peft" else f"{name}.safetensors" for name in FORMATS]
    assert [*rows] == sorted([*files, *BAD])
    assert [name for name, row in rows.items() if row.error] == BAD
    assert all("\n" not in row.error for row in rows.values())
    for name in files:
        row = rows[name]
        told = converters.inspect(folder / name)
        assert (row.format, row.family, row.layers) == (told.format, told.family, told.layers)
        assert (row.methods, row.ranks) == (("lora",), tuple(told.ranks))
        assert row.trigger_words == ("one", "two") and row.title == "<b>"
    assert rows["kohya.safetensors"].size == (folder / "kohya.safetensors").stat().st_size
    assert (
        rows["kohya.safetensors"].thumbnail.endswith("kohya.preview.png") and not rows["lycoris.safetensors"].thumbnail
    )


def test_folders_inside_are_looked_through_when_asked(folder):
    assert not any("deep" in row.path for row in list_adapters(folder))
    (deep,) = [row for row in list_adapters(folder, recursive=True) if "deep" in row.path]
    assert deep.thumbnail == "modelspec.thumbnail"


@pytest.mark.parametrize("name", ["peft", "kohya.safetensors"])
def test_an_adapter_itself_is_a_row(folder, name):
    (row,) = list_adapters(folder / name)
    assert row.path == str(folder / name) and row.methods == ("lora",)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        list_adapters(tmp_path / "none")


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_the_file(method, tmp_path):
    family = "sdxl" if METHODS[method].kernels or method == "norm" else "wan"
    checkpoint("kohya", family, method, carried=False).save(tmp_path)
    (row,) = list_adapters(tmp_path)
    assert row.methods == (method.partition("-")[0].replace("tucker", "lora"),) and row.family == family


def test_the_command_prints_a_line_each_and_fails_for_none(folder, capsys, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    assert run(cli, ["list", str(folder), "--recursive"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FORMATS) + len(BAD) + 1
    assert all(next(line for line in lines if line.startswith(name)).split(maxsplit=1)[1][0] == "!" for name in BAD)
    (kohya,) = [line for line in lines if line.startswith("kohya.safetensors")]
    assert all(text in kohya for text in ("sd15", "lora", "rank 1-7", "picture", "one, two"))
    assert run(cli, ["list", str(folder), "--json"]) == 0
    assert {*json.loads(capsys.readouterr().out)[0]} >= {"path", "family", "thumbnail", "error"}


def test_the_page_loads_nothing_and_says_all(folder):
    out = folder / "page.html"
    catalogue(list_adapters(folder, recursive=True), out)
    text = out.read_text()
    assert text.count("<article>") == len(FORMATS) + len(BAD) + 1
    assert "rank 1-7, " in text and " KiB" in text
    assert "<b>" not in text and "&lt;b&gt;" in text  # a title from a file is text
    assert PIXEL in text and "data:image/jpeg;base64," in text and "http" not in text
    with pytest.raises(ConfigError, match="--overwrite"):
        catalogue([], out)


@pytest.mark.parametrize(
    "text", ["javascript:alert(1)", 'data:image/png;base64,"onerror=', "data:text/html;base64,AAAA"]
)
def test_a_thumbnail_that_is_no_picture_is_none(text, tmp_path):
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8),
               "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2)},
              tmp_path / "a.safetensors", {"modelspec.thumbnail": text})  # fmt: skip
    assert list_adapters(tmp_path)[0].thumbnail == ""


@pytest.mark.slow
def test_no_torch_is_loaded(folder):
    code = f"import sys, diffpeft; diffpeft.list_adapters({str(folder)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert diffpeft.list_adapters is list_adapters

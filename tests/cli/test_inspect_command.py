"""diffpeft inspect: several files, folders and links; one that cannot be read does not hide the others."""

import functools
import json
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from diffpeft.cli import cli
from diffpeft.cli.errors import run

LAYERS = ("down_blocks_0_attentions_0_proj_in", "mid_block_attentions_0_proj_in")


def adapter(path, layer=LAYERS[0], rank=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pair = {"lora_down.weight": torch.ones(rank, 32), "lora_up.weight": torch.ones(32, rank)}
    save_file({f"lora_unet_{layer}.{key}": tensor for key, tensor in pair.items()}, path)


def peft(folder):
    folder.mkdir(parents=True)
    key = "base_model.model.mid_block.attentions.0.proj_in"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj_in"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def diffpeft(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)

    def do(*args):
        code = run(cli, list(args))
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, printed.out, printed.err)

    return do


@pytest.fixture
def inspect(diffpeft):
    return functools.partial(diffpeft, "inspect")


def test_one_bad_file_does_not_hide_the_good_ones(inspect, tmp_path):
    for name in ("a.safetensors", "c.safetensors"):
        adapter(tmp_path / name)
    (tmp_path / "b.safetensors").write_bytes(b"<html>")
    done = inspect("a.safetensors", "b.safetensors", "c.safetensors", "none.safetensors")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert "a.safetensors" in done.stdout and "c.safetensors" in done.stdout and "b.safetensors" not in done.stdout
    assert "b.safetensors" in done.stderr and "none.safetensors" in done.stderr and "a.safetensors" not in done.stderr
    as_json = inspect("a.safetensors", "b.safetensors", "--json")
    assert as_json.returncode == 4 and [row["path"] for row in json.loads(as_json.stdout)] == ["a.safetensors"]


FOLDERS = {  # {case: (the files in a folder, the paths that are shown)}
    "one file": (lambda d: adapter(d / "a.safetensors"), ["x/a.safetensors"]),
    "several files": (
        lambda d: (
            adapter(d / "b.safetensors"),
            adapter(d / "a.safetensors", LAYERS[1]),
            (d / "notes.txt").write_text(""),
        ),
        ["x/a.safetensors", "x/b.safetensors"],
    ),
    "a PEFT folder": (peft, ["x"]),
    "PEFT folders and files": (lambda d: (peft(d / "p"), adapter(d / "z.safetensors")), ["x/p", "x/z.safetensors"]),
    "a file for each component": (
        lambda d: (adapter(d / "unet.safetensors"), adapter(d / "text_encoder.safetensors")),
        ["x/unet.safetensors", "x/text_encoder.safetensors"],
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_shows_what_is_in_it(case, inspect, tmp_path):
    fill, shown = FOLDERS[case]
    fill(tmp_path / "x")
    done = inspect("x")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert sorted(line for line in done.stdout.splitlines() if not line.startswith(" ")) == sorted(shown)
    rows = json.loads(inspect("x", "--json").stdout)
    assert sorted(row["path"] for row in (rows if isinstance(rows, list) else [rows])) == sorted(shown)
    assert isinstance(rows, list) == (len(shown) > 1)


def test_a_folder_with_a_bad_file_shows_the_others_and_an_empty_one_is_told(inspect, tmp_path):
    adapter(tmp_path / "x" / "a.safetensors")
    (tmp_path / "x" / "b.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    done = inspect("x", "empty")
    assert done.returncode == 4 and "x/a.safetensors" in done.stdout
    assert "x/b.safetensors" in done.stderr and "empty" in done.stderr


def test_a_link_to_the_hub_is_taken_for_one(inspect):
    done = inspect("https://huggingface.co/owner/name/blob/main/x.safetensors")
    assert done.returncode == 4 and "x.safetensors of 'owner/name'" in done.stderr and "filename=" in done.stderr


def test_convert_takes_the_same_sources(diffpeft, tmp_path):
    adapter(tmp_path / "a.safetensors")
    convert = functools.partial(diffpeft, "convert", "--to", "diffusers")
    lost = convert("owner/name/x.safetensors", "c.safetensors")
    assert lost.returncode == 4 and "from the Hub" in lost.stderr

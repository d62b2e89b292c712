"""What loading and saving do to the world outside, as Python's audit hooks see it: a hook cannot be removed, so each runs in a process of its own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffpeft import converters
from tests.pipeline.states import lora

SCRIPT = """
import json, os, sys, warnings
import torch
from diffusers import UNet2DConditionModel
import diffpeft

warnings.simplefilter("ignore")
todo = json.loads(sys.stdin.read())
unet = UNet2DConditionModel.from_config(todo["config"]).requires_grad_(False)
WATCHED = ("pickle", "import", "socket", "subprocess", "os.", "shutil.", "tempfile.", "open", "exec", "compile", "ctypes")
seen, watching = [], False

def hook(event, args):
    if watching and event.startswith(WATCHED):
        seen.append((event, [a if isinstance(a, (int, str)) else repr(a)[:200] for a in args]))

def load(path):
    try:
        diffpeft.load_lora(unet, path, name="a", strict=False)
        return "loaded"
    except diffpeft.DiffpeftError as error:
        return type(error).__name__

def watched(act):
    global watching
    seen.clear()
    watching = True
    try:
        out = act()
    finally:
        watching = False
    return [out, list(seen)]

sys.addaudithook(hook)
for path in todo["warm"]:
    assert load(path) == "loaded", path
    diffpeft.save_lora(unet, todo["first"])
    diffpeft.unload(unet)
found = {}
for path in todo["load"]:
    found[path] = watched(lambda: load(path))
    diffpeft.unload(unet)
load(todo["warm"][0])
for path, format in todo["save"]:
    found[path] = watched(lambda: diffpeft.save_lora(unet, path, format=format))
print(json.dumps(found))
"""
READS = ("open", "os.listdir", "os.scandir")


def safetensors(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)


def peft(path, tensors, **config):
    """A PEFT folder of the UNet's layers, with more in its config."""
    path.mkdir()
    save_file(
        {f"base_model.model.{k.removeprefix('unet.')}": t for k, t in tensors.items()},
        path / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv_in", "to_q"], **config}
    (path / "adapter_config.json").write_text(json.dumps(fields))


class Runs:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


CODE = "__import__('os').system('touch ran')"
UNET = {k: t for k, t in lora(2, 1).items() if k.startswith("unet.")}
# name: how it is made at a path -> what comes of loading it
FILES = {
    "diffusers.safetensors": (lambda p: safetensors(p, UNET), "loaded"),
    "kohya.safetensors": (lambda p: converters.write(converters.read(UNET), p, format="kohya"), "loaded"),
    "lycoris.safetensors": (lambda p: converters.write(converters.read(UNET), p, format="lycoris"), "loaded"),
    "peft": (lambda p: peft(p, UNET), "loaded"),
    "metadata.safetensors": (
        lambda p: safetensors(
            p, UNET, {"ss_network_module": "os", "ss_network_args": CODE, "lora_adapter_metadata": "{}"}
        ),
        "loaded",
    ),
    "adapter metadata.safetensors": (
        lambda p: safetensors(p, UNET, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": CODE})}),
        "CheckpointError",
    ),
    "auto mapping": (
        lambda p: peft(p, UNET, auto_mapping={"base_model_class": "X", "parent_library": "antigravity"}),
        "loaded",
    ),
    "megatron": (lambda p: peft(p, UNET, megatron_config={}, megatron_core="antigravity.tensor"), "UnsafeFileError"),
    "type": (lambda p: peft(p, UNET, peft_type="os.system"), "CheckpointError"),
    "base": (lambda p: peft(p, UNET, base_model_name_or_path="https://example.com/model"), "loaded"),
    "pickle.bin": (lambda p: p.write_bytes(pickle.dumps(Runs())), "UnsafeFileError"),
    "pickle.pt": (lambda p: torch.save({"a": Runs()}, p), "UnsafeFileError"),
    "pickle.safetensors": (lambda p: p.write_bytes(pickle.dumps(Runs())), "UnsafeFileError"),
    "zip.safetensors": (lambda p: torch.save({"a": Runs()}, p), "UnsafeFileError"),
    "text.safetensors": (lambda p: p.write_text(f"#!/usr/bin/python\n{CODE}"), "UnreadableFileError"),
}
SAVED = {"saved.safetensors": "kohya", "saved/in a folder.safetensors": "diffusers", "saved/peft": "peft"}


@pytest.fixture(scope="module")
def found(tiny_base, tmp_path_factory):
    """{name: (what came of it, the events)}."""
    folder, first = tmp_path_factory.mktemp("audit"), tmp_path_factory.mktemp("warm")
    for name, (make, _) in FILES.items():
        make(folder / name)
    (folder / "saved").mkdir()
    warm = [first / "a.safetensors", first / "b.safetensors", first / "c"]
    for path, name in zip(warm, ("kohya.safetensors", "diffusers.safetensors", "peft"), strict=True):
        FILES[name][0](path)
    todo = {
        "config": dict(tiny_base.unet.config),
        "warm": [str(p) for p in warm],
        "first": str(first / "out.safetensors"),
        "load": [str(folder / name) for name in FILES],
        "save": [(str(folder / name), format) for name, format in SAVED.items()],
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(todo), cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.glob("**/ran"))
    return folder, {os.path.relpath(path, folder): v for path, v in json.loads(done.stdout.splitlines()[-1]).items()}


def opens(events):
    """(path, whether it is for writing) of all that was opened."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for event, args in events:
        if event == "open":
            path, mode, flags = args
            yield str(path), bool(flags & writing) or bool(set(str(mode)) & set("wax+"))


@pytest.mark.parametrize("name", FILES)
def test_loading_reads_the_file_and_does_nothing_else(name, found):
    folder, (outcome, events) = found[0], found[1][name]
    assert outcome == FILES[name][1]
    assert {event for event, _ in events} <= {*READS}
    assert not [path for path, writes in opens(events) if writes]
    assert all(path.startswith(str(folder / name)) for path, _ in opens(events))


@pytest.mark.parametrize("name", SAVED)
def test_saving_writes_beside_its_target_and_nowhere_else(name, found):
    folder, (_, events) = found[0], found[1][name]
    assert {event.partition(".")[0] for event, _ in events} <= {"open", "os", "shutil", "tempfile"}
    written = [path for path, writes in opens(events) if writes]
    touched = [str(a) for event, args in events if event.startswith(("os.", "shutil.", "tempfile.")) for a in args]
    assert written and "os.system" not in [event for event, _ in events]
    where = str((folder / name).parent)
    assert all(path.startswith(where) or path.isdigit() for path in written), written
    assert all(path.startswith(where) for path in touched if path.startswith("/")), touched

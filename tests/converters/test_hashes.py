"""The hashes of a file, against what sd-scripts defines: of what safetensors itself would write."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save

from diffpeft import io
from diffpeft.converters.hashes import hashed
from diffpeft.converters.spelling import Draft

NUMBERS = torch.Generator().manual_seed(0)


def tensors_of(size):
    """Tensors of every dtype that adapters have, in no order."""
    return {
        "lora_unet_b.alpha": torch.tensor(4.0),
        "lora_unet_b.lora_up.weight": torch.randn(size, 3, generator=NUMBERS).bfloat16(),
        "lora_unet_b.lora_down.weight": torch.randn(3, size, generator=NUMBERS).half(),
        "lora_te_a.alpha": torch.tensor(7),
        "lora_unet_a.lora_down.weight": torch.randn(size, 5, generator=NUMBERS),
        "lora_te_a.dora_scale": torch.randn(size, generator=NUMBERS).double(),
        "zeros": torch.zeros(0, 3),
        "bytes": torch.arange(size, dtype=torch.uint8),
        "lora_te_a.eight": torch.randn(size, generator=NUMBERS).to(torch.float8_e4m3fn),
    }


def definition(tensors, metadata):
    """As sd-scripts has it: the file in memory with the metadata of training alone; all that follows the header, and 64 KiB at 1 MiB."""
    file = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    begin = 8 + int.from_bytes(file[:8], "little")
    return hashlib.sha256(file[begin:]).hexdigest(), hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("size", [7, 60_000, 70_001, 200_000], ids=["bytes", "inside", "across", "beyond"])
def test_hashes_are_those_that_sd_scripts_defines(size, tmp_path):
    tensors = tensors_of(size)
    metadata = {"ss_seed": "3", "ss_title": 'a "quoted"\n\tstück\x01 🐕', "modelspec.title": "x" * 999, "format": "pt"}
    draft = hashed(Draft({key: io.handle(t) for key, t in tensors.items()}, metadata, {}))
    model, legacy = definition(tensors, metadata)
    assert draft.metadata["sshs_model_hash"] == model and draft.metadata["sshs_legacy_hash"] == legacy
    assert draft.metadata["modelspec.hash_sha256"] == f"0x{model}" and metadata.items() <= draft.metadata.items()

    io.save(tmp_path / "a.safetensors", draft.tensors, draft.metadata)
    file = (tmp_path / "a.safetensors").read_bytes()
    begin = 8 + int.from_bytes(file[:8], "little")
    assert hashlib.sha256(file[begin:]).hexdigest() == model  # what viewers compute of a file
    theirs = save(tensors)
    order = [key for key in json.loads(theirs[8 : 8 + int.from_bytes(theirs[:8], "little")]) if key != "__metadata__"]
    assert [*draft.tensors] == order
    assert all(torch.equal(t, tensors[key]) for key, t in load_file(tmp_path / "a.safetensors").items())

"""What is said of ComfyUI as a reader, against its own loader. Runs where COMFYUI names a checkout of it (April 2026 is what the table was made with)."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffpeft import TrainConfig, converters
from diffpeft.converters.families import TABLES
from diffpeft.converters.readers import OTHERS, READERS, ROWS, reads
from diffpeft.families import CaptionReading, family_of, open_family
from diffpeft.model.state import bundle_of, slots_of
from diffpeft.train import dreambooth
from tests.families import comfyui
from tests.families.pipelines import pipeline
from tests.families.test_family_runs import LANGUAGE

FORMATS = ("comfyui", "kohya", "diffusers", "kohya-diffusers", "lycoris", "onetrainer")
LATER = ("ernie_image",)  # whose map of diffusers' names ComfyUI got later
# what HunyuanVideo's files and ComfyUI's model spell otherwise
_SPELT = (
    (".modulation.linear", ".modulation.lin"),
    ("_mod.linear", "_mod.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
)


def bundle(kind, targets):
    """A random LoRA on a tiny model of a kind."""
    pipe = pipeline(kind, torch.float32)
    if kind == "sd3.5":  # ComfyUI's has 64 channels for each block and head
        wide = {"attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128}
        pipe.transformer = diffusers.SD3Transformer2DModel(**{**pipe.transformer.config, **wide})
    family = open_family(pipe, CaptionReading(LANGUAGE.get(kind)))
    dreambooth.adapt(TrainConfig("m", "d", "o", rank=2, alpha=2, targets=targets), family, "a")
    for slot in slots_of(pipe, "a").values():
        for p in slot.parameters():
            nn.init.normal_(p, std=0.2)
    return bundle_of(pipe, "a", family_of(pipe) or "")


def wanted(tensors, kind):
    """{weight of ComfyUI's model: what a file in its own names adds to it}."""
    added = {}
    for layer in {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}:
        name = layer
        for ours, theirs in _SPELT if kind == "hunyuan_video" else ():
            name = name.replace(ours, theirs)
        up, down = (tensors[f"{layer}.lora_{role}.weight"].flatten(1) for role in "BA")
        scale = float(tensors.get(f"{layer}.alpha", torch.tensor(float(len(down))))) / len(down)
        added[f"{name}.weight"] = scale * up @ down
    return added


@pytest.mark.slow
@pytest.mark.skipif(comfyui.CHECKOUT is None, reason="COMFYUI names no checkout of ComfyUI")
@pytest.mark.parametrize("targets", ["attn-mlp", "full"])
@pytest.mark.parametrize("kind", comfyui.MODELS)
@torch.no_grad()
def test_comfyui_is_a_reader_of_exactly_the_files_that_it_reads_right(kind, targets, tmp_path):
    comfy, adapter = comfyui.loaded(), bundle(kind, targets)
    outer, want = comfyui.model(comfy, kind), {}
    for format in FORMATS[:2] if kind in LATER else FORMATS:
        if converters.refusal(adapter, format):
            continue
        path = tmp_path / f"a.{format}.safetensors"
        converters.write(adapter, path, format=format)
        want = want or wanted(load_file(path), kind)  # ComfyUI's own format comes first
        added, left = comfyui.changes(comfy, outer, load_file(path), {n: t.shape for n, t in want.items()})
        right = added.keys() == want.keys() and not left
        right = right and all((added[n].flatten(1) - t).abs().max() < 1e-5 for n, t in want.items())
        claimed = "ComfyUI" in converters.inspect(path).readable_by
        assert claimed == right, (format, claimed, sorted(left)[:3], sorted(added.keys() ^ want.keys())[:3])


def test_the_table_of_readers_names_programs_and_formats_that_there_are():
    read: dict[str, set[str]] = {program: set() for program in ROWS}
    for format, programs in READERS.items():
        for program in {*programs[0], *programs[1]}:
            read[program].add(format)
    for program, rows in ROWS.items():
        families = [family for row in rows.values() for family in row]
        assert len(families) == len({*families}) and {*families} <= {*TABLES, "any", OTHERS}, program
        assert {format for formats in rows for format in formats} == read[program]
    assert reads("ComfyUI", "kohya", "wan") and not reads("ComfyUI", "diffusers", "wan")
    assert reads("diffusers", "diffusers", "sana") and not reads("diffusers", "kohya", "sana")
    assert not reads("diffusers", "diffusers", "pixart") and not reads("ComfyUI", "kohya", "sana")

"""Anima: a Cosmos with a text conditioner, which the original has within the denoiser, and diffusers beside it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file, save_file
from torch import nn

from diffpeft import LoraConfig, attach, load_lora, save_lora, unload
from diffpeft.bundle import parted
from diffpeft.families import family_of
from diffpeft.model.state import slots_of
from tests.pipeline.denoisers import model

DENOISER, CONDITIONER = "blocks.1.self_attn.q_proj", "blocks.0.cross_attn.o_proj"
WORDS = {  # {format: (what the keys begin with, how a layer is spelt, the names of the factors)}
    "kohya": ("lora_unet_", "lora_unet_llm_adapter_", lambda n: n.replace(".", "_"), ("lora_down", "lora_up")),
    "comfyui": ("diffusion_model.", "diffusion_model.llm_adapter.", lambda n: n, ("lora_A", "lora_B")),
}


class AnimaModularPipeline:
    """As diffusers' modular pipelines are: with components, and a name."""

    def __init__(self):
        torch.manual_seed(0)
        self.components = {
            "transformer": model("cosmos", torch.float32),
            "text_conditioner": diffusers.AnimaTextConditioner(
                source_dim=16, target_dim=16, model_dim=32, num_layers=2, num_attention_heads=2, target_vocab_size=8
            ),
        }


@pytest.fixture
def pipe():
    return AnimaModularPipeline()


def factors(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, columns, generator=g), torch.randn(rows, 2, generator=g)


def written(format):
    """A file as sd-scripts or ai-toolkit writes it, by the names in their code."""
    first, second, spelt, ends = WORDS[format]
    tensors = {}
    for seed, (word, layer) in enumerate(((first, DENOISER), (second, CONDITIONER))):
        for end, t in zip(ends, factors(32, 32, seed), strict=True):
            tensors[f"{word}{spelt(layer)}.{end}.weight"] = t
    return tensors


@pytest.mark.parametrize("format", WORDS)
def test_a_trainers_file_is_for_both_components_and_is_saved_as_it_was(format, pipe, tmp_path):
    tensors = written(format)
    save_file(tensors, tmp_path / "a.safetensors")
    report = load_lora(pipe, tmp_path / "a.safetensors", name="a")
    assert family_of(pipe) == report.family == "cosmos" and not report.carried
    slots = slots_of(pipe, "a")
    assert slots.keys() == {"transformer.transformer_blocks.1.attn1.to_q", f"text_conditioner.{CONDITIONER}"}
    for seed, slot in enumerate(sorted(slots.items(), key=lambda row: row[0].startswith("text"))):
        assert torch.equal(slot[1].tensors["lora_A"], factors(32, 32, seed)[0])
    save_lora(pipe, tmp_path / "b.safetensors", name="a", format=format)
    again = load_file(tmp_path / "b.safetensors")
    assert {k for k in again if not k.endswith(".alpha")} == tensors.keys()
    assert all(torch.equal(again[k], t) for k, t in tensors.items())


def test_on_the_denoiser_alone_the_conditioners_layers_are_left_over_and_said(pipe):
    with pytest.warns(UserWarning, match="llm_adapter"):
        report = load_lora(pipe.components["transformer"], written("kohya"), name="a", strict=False)
    assert report.matched == ("transformer.transformer_blocks.1.attn1.to_q",)
    assert report.carried


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers", "kohya-diffusers", "onetrainer"])
def test_both_components_come_back_from_every_format_of_one_file(format, pipe, tmp_path):
    attach(pipe, LoraConfig(r=2, lora_alpha=3), name="a", targets=["to_q", "q_proj", "mlp.0"])
    for slot in slots_of(pipe, "a").values():
        nn.init.normal_(slot.tensors["lora_B"])
    wanted = {layer: {r: t.clone() for r, t in slot.tensors.items()} for layer, slot in slots_of(pipe, "a").items()}
    assert {parted(layer)[0] for layer in wanted} == {*pipe.components}
    save_lora(pipe, tmp_path / "a.safetensors", name="a", format=format)
    unload(pipe)
    load_lora(pipe, tmp_path / "a.safetensors", name="b")
    back = slots_of(pipe, "b")
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[layer].tensors[r], t) for layer, own in wanted.items() for r, t in own.items())


@pytest.mark.parametrize("format", ["comfyui", "diffusers"])
def test_stock_diffusers_finds_the_same_layers(format, pipe, tmp_path):
    attach(pipe, LoraConfig(r=2, lora_alpha=2), name="a", targets=["to_q", "q_proj", "mlp.0"])
    save_lora(pipe, tmp_path / "a.safetensors", name="a", format=format)
    tensors = {k: t for k, t in load_file(tmp_path / "a.safetensors").items() if not k.endswith(".alpha")}
    theirs = lora_pipeline.AnimaLoraLoaderMixin.lora_state_dict(tensors)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = {f"{layer}.{role}.weight" for layer, slot in slots_of(pipe, "a").items() for role in slot.tensors}
    assert theirs.keys() == ours

"""Names: every format spells every layer of every family and reads it back; what a file is, from its header."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import converters
from converters import FORMATS, TABLES
from converters.formats import Part
from converters.roles import MAGNITUDES, ROLES
from diffpeft.bundle import Entry, canonical
from diffpeft.errors import UnknownKeysError, WrongBaseError

LAYERS = [
    (family, component, template)
    for family, table in TABLES.items()
    for component, templates in table.components.items()
    for template in templates
]
NUMBERS = ((0, 0, 0), (1, 2, 3), (10, 0, 12))


def layers():
    """Every layer of every family, with numbers of one and two digits."""
    return {
        (family, component, template.format(*numbers)) for family, component, template in LAYERS for numbers in NUMBERS
    }


FILES = [name for name, fmt in FORMATS.items() if not fmt.folder]
NAMED = [  # what a format has a name for
    (name, role)
    for name, fmt in FORMATS.items()
    for role in sorted({*(role for roles in ROLES.values() for role in roles), *MAGNITUDES, "diff_b"})
    if not (fmt.flat and role.startswith(("lora_emb", "lora_B_", "lora_mag", "oft_R", "oft_emb", "boft_")))
]


def entry(layer):
    return Entry("lora", layer, {})


@pytest.mark.parametrize("format, role", NAMED)
def test_split_undoes_join(format, role):
    fmt = FORMATS[format]
    for _, component, layer in layers():
        part = fmt.split(fmt.join(Part(component, layer, role), entry(f"{component}.{layer}")))
        spelt = layer.removeprefix("text_model.") if fmt.folder else layer.replace(".", "_") if fmt.flat else layer
        assert part == Part("" if fmt.folder else component, spelt, role)


@pytest.mark.parametrize("format", ["kohya"])
def test_split_undoes_join_for_alphas(format):
    fmt = FORMATS[format]
    for _, component, layer in layers():
        assert fmt.split(fmt.join(Part(component, layer, "alpha"), entry(f"{component}.{layer}"))).role == "alpha"


def test_flat_names_have_one_meaning():
    for family, component, layer in layers():
        assert TABLES[family].dotted(component, layer.replace(".", "_")) == layer
        assert TABLES[family].knows(component, layer)


@pytest.mark.parametrize(
    "flat",
    ["", "conv_in_", "xconv_in", "down_blocks_0", "down_blocks_x_resnets_0_conv1", "mid_block_0_resnets_0_conv1"],
)
def test_a_flat_name_that_no_template_gives_has_no_meaning(flat):
    assert TABLES["sd15"].dotted("unet", flat) is None and TABLES["sd15"].dotted("nowhere", "conv_in") is None


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("family", TABLES)
def test_every_layer_of_a_family_survives_a_file(format, family, tmp_path):
    names = sorted(
        {
            (c, layer)
            for f, c, layer in layers()
            if f == family and "transformer_blocks.12" not in layer and "transformer_blocks.3" not in layer
        }
    )
    tensors = {f"{c}.{layer}.lora_{ab}.weight": torch.ones(1, 1) for c, layer in names for ab in "AB"}
    bundle = converters.read(tensors, family=family)
    converters.write(bundle, tmp_path / "x.safetensors", format=format)
    again = converters.read(tmp_path / "x.safetensors", family=family)
    assert again.format == format and {e.layer for e in again.entries} == {e.layer for e in bundle.entries} == {
        canonical(*name) for name in names
    }
    assert not again.carried


@pytest.mark.parametrize("format", FILES)
def test_detection_reads_back_what_was_written(format, adapter):
    found = converters.detect(adapter(format))
    assert (found.format, found.family, found.methods, found.confidence) == (
        format,
        "sd15",
        {"lora"},
        1.0,
    ) and found.alternatives == ("sd2",)


def key(layer, width=320, format="diffusers"):
    return {f"{layer}.lora_A.weight": torch.ones(1, width), f"{layer}.lora_B.weight": torch.ones(8, 1)}


CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FAMILIES = {
    "narrow cross attention": (key(CROSS, 768), ("sd15",)),
    "wide cross attention": (key(CROSS, 1024), ("sd2",)),
    "SDXL's cross attention": (key(CROSS, 2048), ("sdxl",)),
    "unusual cross attention": (key(CROSS, 32), ("sd15",)),
    "no cross attention": (key("unet.conv_in"), ("sd15", "sd2")),
    "a UNet alone": (key("down_blocks.0.resnets.0.conv1"), ("sd15", "sd2")),
    "text alone": (key("text_encoder.text_model.encoder.layers.0.mlp.fc1"), ("sd15", "sd2", "sdxl", "sd3", "flux")),
    "text alone, in a file of its own": (
        key("text_model.encoder.layers.0.mlp.fc1"),
        ("sd15", "sd2", "sdxl", "sd3", "flux"),
    ),
    "text and an embedding": (
        key("text_encoder.encoder.layers.0.mlp.fc1") | {"emb_params": torch.ones(1, 8)},
        ("sd15", "sd2", "sdxl", "sd3", "flux"),
    ),
    "SDXL's depth": (key("unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q"), ("sdxl", "sdxl_refiner")),
    "SDXL's second text encoder": (key("text_encoder_2.text_model.encoder.layers.0.mlp.fc1"), ("sdxl", "sdxl_refiner")),
    "SD3": (key("transformer.transformer_blocks.0.attn2.to_q"), ("sd3",)),
    "Flux": (key("transformer.single_transformer_blocks.0.attn.to_q"), ("flux", "chroma")),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_names_and_widths_tell_the_family(case):
    tensors, want = FAMILIES[case]
    found = converters.detect(tensors)
    assert (found.family, *found.alternatives) == want


@pytest.mark.parametrize("case", FAMILIES)
def test_reading_refuses_what_no_table_names(case):
    tensors, want = FAMILIES[case]
    if set(want) & set(TABLES):
        assert converters.read(tensors).families == want
    else:
        with pytest.raises(WrongBaseError, match=want[0]):
            converters.read(tensors)


SPELLINGS = {
    "kohya": "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "kohya of diffusers": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "transformers 5": "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "scripts": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
    "peft with a name": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight",
    "alone": "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "old": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora.down.weight",
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_names_the_same_layer(case):
    a = SPELLINGS[case]
    b = a.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace(".down.", ".up.")
    (entry,) = converters.read({a: torch.ones(1, 8), b: torch.ones(8, 1)}).entries
    assert entry.layer == "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" and entry.keys == (a, b)


def test_a_model_s_own_names_decide_before_the_table():
    tensors = {f"lora_unet_my_own_layer.lora_{d}.weight": torch.ones(1, 1) for d in ("down", "up")} | {
        f"lora_unet_conv_in.lora_{d}.weight": torch.ones(1, 1) for d in ("down", "up")
    }
    assert [e.layer for e in converters.read(tensors, names={"unet": ["my_own.layer"]}).entries] == [
        "unet.my_own.layer",
        "unet.conv_in",
    ]
    assert [e.layer for e in converters.read(tensors).entries] == ["unet.my_own_layer", "unet.conv_in"]


def test_what_is_no_adapter_has_no_format():
    with pytest.raises(UnknownKeysError, match="kohya"):
        converters.detect({"conv_in.weight": torch.ones(1)})


def test_detection_imports_no_torch(tmp_path):
    save_file(key("unet.conv_in"), tmp_path / "x.safetensors")
    code = f"import sys, converters; assert converters.detect({str(tmp_path / 'x.safetensors')!r}).family == 'sd15'; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)

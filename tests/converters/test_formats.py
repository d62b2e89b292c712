"""Names: every format spells every layer of every family and reads it back; what a file is, from its header."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffpeft import converters
from diffpeft.bundle import Entry, canonical
from diffpeft.cli.convert import WRITTEN
from diffpeft.converters import FORMATS, TABLES
from diffpeft.converters.formats import KeyParts
from diffpeft.converters.formats.base import shares_word
from diffpeft.errors import AmbiguousFormatError, UnknownKeysError, WrongBaseError
from diffpeft.methods.layout import MAGNITUDES, ROLES
from tests.converters import table

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


FILES = [name for name, fmt in FORMATS.items() if fmt.writable and not fmt.folder]
SPELT = [  # how each format spells each of its names
    (name, family, component, layer)
    for name, fmt in FORMATS.items()
    if fmt.writable
    for family, component, layer in sorted(layers())
    if fmt.word(component, TABLES[family]) is not None
]


def entry(layer):
    return Entry("lora", layer, {})


@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.writable])
def test_split_undoes_join(format):
    fmt = FORMATS[format]
    every = sorted({*(role for roles in ROLES.values() for role in roles), *MAGNITUDES, "diff_b", "alpha"})
    roles = [role for role in every if role in getattr(fmt, "suffixes", every)]
    layer = "double_blocks.0.img_attn.qkv" if format == "xlabs" else "transformer_blocks.3.attn.to_out.0"
    for role in [role for role in roles if format not in ("diffusers", "peft") or role not in ("alpha", "ia3_w")]:
        word = fmt.word("transformer", TABLES["flux"])
        part = fmt.split(fmt.join(KeyParts(word, layer, role), entry(f"transformer.{layer}")))
        assert part == KeyParts(word, layer.replace(".", "_") if fmt.flat else layer, role)


@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.writable and name != "xlabs"])
def test_every_word_leads_back_to_its_component(format):
    fmt = FORMATS[format]
    for _, family, component, layer in (row for row in SPELT if row[0] == format):
        table = TABLES[family]
        word = fmt.word(component, table)
        part = fmt.split(fmt.join(KeyParts(word, layer, "lora_A"), entry(f"{component}.{layer}")))
        back = fmt.component(part.word, table)
        if component in [*table.rules][1:] and fmt.word(back, table) == word:
            continue  # a second denoiser, whose file is another one
        assert word.startswith(part.word) and back == ("" if fmt.single else component)


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
    """With one block of each kind; a file of one component, for each."""
    fmt, table = FORMATS[format], TABLES[family]
    names: dict[str, list[str]] = {}
    for component, templates in table.components.items():
        if fmt.word(component, table) is not None:
            layers = [template.format(1, 0, 0) for template in templates]
            if fmt.original(table) and component in table.rules:  # unusual layers of UNets have no number
                layers = [n for n in layers if table.to_original(component, n, 6)]
            second = component in [*table.rules][1:] and shares_word(fmt, table, [*table.rules])
            names.setdefault(component if fmt.single or second else "", []).extend(f"{component}.{n}" for n in layers)
    if format == "xlabs":
        names = {"": [n for n in names[""] if fmt.has(n)]} if family == "flux" else {}
    for n, layers in enumerate(names.values()):
        tensors = {}
        for layer in layers:
            rows = _rows(table, *layer.partition(".")[::2])
            tensors |= {f"{layer}.lora_A.weight": torch.ones(1, 2), f"{layer}.lora_B.weight": torch.ones(rows, 1)}
        bundle = converters.read(tensors, family=family)
        file = tmp_path / f"{n}.safetensors"
        converters.write(bundle, file, format=format)
        again = converters.read(file, family=family)
        assert {layer for e in again.entries for layer in e.targets} == {
            canonical(*name.partition(".")[::2]) for name in layers
        }
        assert not again.carried and FORMATS[again.format].original(table) == fmt.original(table)


def _rows(table, component, layer):
    """As many as a part of this share has, so that all parts fit."""
    found = table.to_original(component, layer, 6) if component in table.rules else None
    return 12 * dict(found[0].parts)[layer] if found else 12


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfyui"])
def test_detection_reads_back_what_was_written(format, adapter):
    found = converters.detect(adapter(format))
    assert (found.format, found.family, found.methods, found.confidence) == (format, "sd15", {"lora"}, 1.0)


def key(layer, width=320, format="diffusers"):
    a, b = ("lora_A", "lora_B") if format == "diffusers" else ("lora_down", "lora_up")
    return {f"{layer}.{a}.weight": torch.ones(1, width), f"{layer}.{b}.weight": torch.ones(16, 1)}


def sizes(layer, rows, columns):
    """A layer as ComfyUI names it, of a given shape."""
    name = f"diffusion_model.{layer}"
    return {f"{name}.lora_A.weight": torch.ones(1, columns), f"{name}.lora_B.weight": torch.ones(rows, 1)}


CLIPS = ("sd15", "sd2", "sdxl", "sd3", "flux", "hidream")
ALL_CLIPS = (
    "sd15",
    "sd2",
    "sdxl",
    "sdxl_refiner",
    "sd3",
    "flux",
    "hunyuan_video",
    "hidream",
    "framepack",
    "kandinsky5",
)
SECOND_CLIPS = ("sdxl", "sdxl_refiner", "sd3", "hunyuan_video", "hidream", "framepack", "kandinsky5")


CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FAMILIES = {
    "narrow cross attention": (key(CROSS, 768), ("sd15",)),
    "wide cross attention": (key(CROSS, 1024), ("sd2",)),
    "SDXL's cross attention": (key(CROSS, 2048), ("sdxl",)),
    "unusual cross attention": (key(CROSS, 32), ("sd15",)),
    "no cross attention": (key("unet.conv_in"), ("sd15", "sd2", "sdxl", "sdxl_refiner")),
    "a UNet alone": (key("down_blocks.0.resnets.0.conv1"), ("sd15", "sd2", "sdxl", "sdxl_refiner")),
    "a level that SDXL does not have": (key("unet.up_blocks.3.resnets.0.conv1"), ("sd15", "sd2")),
    "text alone": (key("text_encoder.text_model.encoder.layers.0.mlp.fc1"), CLIPS),
    "text alone, in a file of its own": (key("text_model.encoder.layers.0.mlp.fc1"), ALL_CLIPS),
    "text and an embedding": (key("text_encoder.encoder.layers.0.mlp.fc1") | {"emb_params": torch.ones(1, 8)}, CLIPS),
    "SDXL's depth": (key("unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q"), ("sdxl", "sdxl_refiner")),
    "SDXL's second text encoder": (key("text_encoder_2.text_model.encoder.layers.0.mlp.fc1"), SECOND_CLIPS),
    "kohya's first of several encoders": (
        {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{d}.weight": torch.ones(1, 1) for d in ("down", "up")},
        ("sdxl", "sd3", "flux", "hidream", "sd15", "sd2"),
    ),
    "SD3": (key("transformer.transformer_blocks.0.norm1_context.linear") | key("transformer.pos_embed.proj"), ("sd3",)),
    "Flux's double blocks": (
        key("transformer.transformer_blocks.0.norm1_context.linear") | key("transformer.context_embedder"),
        None,
    ),
    "Flux's single blocks": (key("transformer.single_transformer_blocks.0.attn.to_q"), None),
    "Flux's modulation": (
        key("transformer.single_transformer_blocks.0.norm.linear") | key("transformer.x_embedder"),
        ("flux",),
    ),
    "a block that only HunyuanVideo has": (
        key("transformer.single_transformer_blocks.39.proj_mlp"),
        ("hunyuan_video",),
    ),
    "Flux.1's share, and Chroma's, which read it alike": (
        sizes("double_blocks.0.img_mlp.0", 64, 16),
        ("flux", "chroma"),
    ),
    "Flux.2's share": (sizes("double_blocks.0.img_mlp.0", 96, 16), ("flux2",)),
    "a layer that three read alike": (sizes("single_blocks.0.linear1", 112, 16), ("flux", "chroma", "hunyuan_video")),
    "Lumina's share": (sizes("layers.0.attention.qkv", 40, 24), ("lumina2",)),
    "Z-Image's share": (sizes("layers.0.attention.qkv", 72, 24), ("z_image",)),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_names_and_shapes_tell_the_family(case):
    tensors, want = FAMILIES[case]
    if want is None:
        with pytest.raises(AmbiguousFormatError, match="family="):
            converters.detect(tensors)
        with pytest.raises(AmbiguousFormatError):
            converters.read(tensors)
        for family in converters.fitting(tensors).families:
            assert converters.read(tensors, family=family).family == family
    else:
        found = converters.detect(tensors)
        assert (found.family, *found.alternatives) == want == converters.read(tensors).families


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.architecture": "chroma/lora"}, "chroma"),
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"diffpeft.family": "hunyuan_video"}, "hunyuan_video"),
        (
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
            None,
        ),  # it does not fit, and the rest read it alike
    ],
)
def test_metadata_decide_between_families_that_fit(metadata, family, tmp_path):
    save_file(
        {k: t.clone() for k, t in key("lora_unet_single_blocks_0_linear2", 80, "kohya").items()},
        tmp_path / "x.safetensors",
        metadata,
    )
    found = converters.detect(tmp_path / "x.safetensors")
    assert (found.family, *found.alternatives) == ((family,) if family else ("flux", "chroma", "hunyuan_video"))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "wan"])
def test_a_family_that_does_not_fit_is_refused(family):
    with pytest.raises(WrongBaseError, match=r"flux.*not " + family):
        converters.read(FAMILIES["Flux's modulation"][0], family=family)


def test_what_no_family_has_is_refused():
    with pytest.raises(WrongBaseError, match="unknown"):
        converters.read(key("transformer.no_such_layer"))


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


def test_the_page_says_what_the_matrix_says():
    """`python -m tests.converters.table` writes it."""
    assert table.text() in table.PAGE.read_text()


def test_the_command_names_the_formats_that_can_be_written():
    assert {name for name, fmt in FORMATS.items() if fmt.writable} == {*WRITTEN}

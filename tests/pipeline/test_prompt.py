"""A1111's prompt tags and block weights: what they say, as stable-diffusion-webui and sd-webui-lora-block-weight read them."""

from __future__ import annotations

import pytest
import torch

from diffpeft import ConfigError, UnknownNameError, get_adapters, load_lora, set_adapters
from diffpeft.converters import TABLES
from diffpeft.layers.carried import record_of
from diffpeft.model.target import adapted_layers
from diffpeft.pipeline.prompt import PRESETS, VECTORS, Tag, parsed, places, resolved, strengths

SEVENTEEN = "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
TWELVE = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"


@pytest.mark.parametrize(
    "text", ["a  cat ", " (dog:1.2) [x|y] <3 a<b> <hypernet:x:1>", "", "\n", "<lora:open", "lora:x"]
)
def test_a_prompt_without_tags_stays_as_it_is(text):
    assert parsed(text) == (text, [])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a cat <lora:s:0.8>", "a cat"),
        ("<lora:s> a cat", "a cat"),
        ("a <lora:s>, b  c", "a, b  c"),
        ("a cat<lyco:s:1> on a mat", "a cat on a mat"),
        ("<lora:s>", ""),
    ],
)
def test_tags_go_and_the_rest_stays(text, plain):
    assert parsed(text)[0] == plain and len(parsed(text)[1]) == 1


TAGS = {  # A1111: the first number is the text encoders', the second the denoiser's, which follows the first
    "s": Tag("s"),
    "s:0.8": Tag("s", 0.8, 0.8),
    "s:0.5:0.8": Tag("s", unet=0.8, text_encoder=0.5),
    "s:te=0.5": Tag("s", 0.5, 0.5),
    "s:unet=0.5": Tag("s", unet=0.5, text_encoder=1.0),
    "s:unet=0.5:te=-2": Tag("s", unet=0.5, text_encoder=-2.0),
    "s:0:1": Tag("s", unet=1.0, text_encoder=0.0),
    "s v1.5 : .8 ": Tag("s v1.5", 0.8, 0.8),
    "s:1:1:lbw=OUTALL": Tag("s", lbw="OUTALL"),
    "s:0.8:lbw=1,0,.5": Tag("s", 0.8, 0.8, (1.0, 0.0, 0.5)),
    "s:w=MIDD": Tag("s", lbw="MIDD"),
    "s:1:OUTALL": Tag("s", lbw="OUTALL"),
    "s:1:1:0,1": Tag("s", lbw=(0.0, 1.0)),
    "s:0.8:start=0.2:stop=0.8": Tag("s", 0.8, 0.8, start=0.2, stop=0.8),
    "s:1:1:lbw=OUTALL:step=5-10": Tag("s", lbw="OUTALL", start=5, stop=10),
    "s:step=0.25-1.0": Tag("s", start=0.25, stop=1.0),
}


@pytest.mark.parametrize("text", TAGS)
def test_what_a_tag_says(text):
    assert parsed(f"x <lora:{text}>") == ("x", [TAGS[text]])


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", ConfigError, "name"),
        (":1", ConfigError, "name"),
        ("s:high", ConfigError, "high"),
        ("s:nan", ConfigError, "nan"),
        ("s:1:inf", ConfigError, "inf"),
        ("s:1:1:8", ConfigError, "TEXT_ENCODER"),
        ("s:lbw=OUTAL", UnknownNameError, "OUTALL"),
        ("s:lbw=1,R", ConfigError, "R"),
        ("s:1:begin=3", UnknownNameError, "begin"),
        ("s:start=1.5", ConfigError, "share"),
        ("s:stop=-1", ConfigError, "share"),
        ("s:step=5", ConfigError, "FROM-TO"),
        ("s:step=0.1-much", ConfigError, "much"),
    ],
)
def test_what_a_tag_cannot_say(text, error, says):
    with pytest.raises(error, match=says):
        parsed(f"x <lora:{text}>")


def test_names_are_files_given_then_files_in_the_folder(tmp_path):
    for name in ("a.safetensors", "b.v1.safetensors", "c.bin"):
        (tmp_path / name).touch()
    given = [("sub/a.safetensors", 0.3), ("z.safetensors", 0.4)]
    tags = [Tag("b.v1", 0.5, 0.5), Tag("a"), Tag("a2")]
    assert resolved(given, tags[:2], tmp_path) == [
        ("sub/a.safetensors", tags[1]),
        given[1],
        (tmp_path / "b.v1.safetensors", tags[0]),
    ]
    assert resolved(given, [Tag("a.safetensors")], tmp_path)[0][1].name == "a.safetensors"
    for name in ("a2", "c", "../a", str(tmp_path / "a"), "*"):
        with pytest.raises(UnknownNameError):
            resolved(given, [Tag(name)], tmp_path)
    with pytest.raises(UnknownNameError, match="'a'"):
        resolved(given, [tags[2]], tmp_path)
    with pytest.raises(ConfigError, match="two tags"):
        resolved(given, [Tag("a"), Tag("a", 2)], tmp_path)
    with pytest.raises(ConfigError, match="two files"):
        resolved([("x/a.safetensors", 1), ("y/a.safetensors", 1)], [Tag("a")], tmp_path)


def test_vectors_are_the_extensions():
    assert [" ".join(v) for v in (VECTORS["sd15"][0], VECTORS["sdxl"][0])] == [SEVENTEEN, TWELVE]
    assert {f: [len(v) for v in vs] for f, vs in VECTORS.items()} == {
        "sd15": [17, 26],
        "sd2": [17, 26],
        "sdxl": [12, 20],
        "flux": [61],
    }
    assert all(len(p) == n and set(p) <= {"0", "1"} for n, presets in PRESETS.items() for p in presets.values())


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_every_layer_is_in_the_block_of_the_originals_number(family):
    """Against the table itself: input_blocks.4 is IN04, and so on."""
    kinds = {"input_blocks": "IN", "output_blocks": "OUT"}
    for rule in TABLES[family].rules["unet"]:
        kind, number = (rule.original.split(".") + [""])[:2]
        ((layer, _),) = rule.parts
        layer = f"unet.{layer}"
        hits = [b for b, patterns in places(family).items() for p in patterns if f"{layer}.".startswith(f"{p}.")]
        block = "M00" if kind == "middle_block" else f"{kinds[kind]}{int(number):02}" if kind in kinds else None
        assert hits == ([block] if block else []), rule
    assert {b for v in VECTORS[family] for b in v} == {*places(family)}


def test_strengths_are_products():
    got = strengths(Tag("s", unet=0.5, text_encoder=2, lbw=tuple(map(float, range(12)))), "sdxl")
    assert got["text_encoder"] == got["text_encoder_2"] == 0.0
    assert got["unet"] == 0.5  # the time embedding and the output layer, which are in no block
    assert got["unet.down_blocks.1.attentions.0"] == 0.5 and got["unet.down_blocks.2.attentions.1"] == 2
    assert got["unet.mid_block"] == 2.5 and got["unet.up_blocks.0.attentions.0"] == 3
    assert got["unet.down_blocks.0.resnets.0"] == 0  # a block that the vector does not name
    got = strengths(Tag("s", lbw=tuple(map(float, range(1, 18)))), "sd15")
    assert (got["text_encoder"], got["unet.down_blocks.0.attentions.0"], got["unet.up_blocks.3.attentions.2"]) == (
        1,
        2,
        17,
    )
    assert strengths(Tag("s", 0.7, 0.7), "wan") == 0.7
    assert strengths(Tag("s", 0.7, 0.2), "wan", ["transformer.blocks.0.attn1.to_q"]) == {"transformer": 0.7}
    flux = strengths(Tag("s", lbw=tuple(map(float, range(61)))), "flux")
    assert (flux["text_encoder"], flux["text_encoder_2"], flux["transformer.x_embedder"]) == (0, 1, 2)
    assert (flux["transformer.transformer_blocks.18"], flux["transformer.single_transformer_blocks.0"]) == (21, 22)
    assert flux["transformer.proj_out"] == 60


@pytest.mark.parametrize(
    ("span", "on"),
    [
        ("start=3", [0, 0, 1, 1, 1, 1, 1, 1]),  # the extension counts steps from 1, and stops before the last one
        ("stop=3", [1, 1, 0, 0, 0, 0, 0, 0]),
        ("step=3-6", [0, 0, 1, 1, 1, 0, 0, 0]),
        ("start=0:stop=99", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("start=99", [0] * 8),
        ("stop=0", [0] * 8),
        ("start=0.25:stop=0.75", [0, 0, 1, 1, 1, 1, 0, 0]),
        ("start=0.75:stop=0.25", [0] * 8),
        ("start=0.0:stop=1.0", [1] * 8),
    ],
)
def test_from_which_step_to_which_a_tag_acts(span, on):
    (tag,) = parsed(f"x <lora:s:0.5:0.8:{span}>")[1]
    mix = strengths(tag, "sd15", steps=8)
    assert mix["text_encoder"] == 0.5  # they have read the prompt before the first step
    assert [mix["unet"].at(i / 8) for i in range(8)] == [0.8 * number for number in on]


@pytest.mark.parametrize(
    ("tag", "family", "says"),
    [
        (Tag("s", lbw=(1.0,) * 17), "sdxl", "12 or 20"),
        (Tag("s", lbw="MIDD"), "sdxl", "MIDD"),
        (Tag("s", lbw="ALL"), "wan", "wan"),
        (Tag("s", lbw="ALL"), None, "pipeline"),
    ],
)
def test_blocks_that_the_family_does_not_have(tag, family, says):
    with pytest.raises(ValueError, match=says):
        strengths(tag, family)


def on_layers(pipe, name):
    return {
        f"{component}.{layer}": (r := record_of(m)).mix.choice.strengths[name][r.index]
        for component in ("unet", "text_encoder")
        for layer, m in adapted_layers(getattr(pipe, component)).items()
    }


def test_set_adapters_takes_the_strengths(pipe, adapter):
    report = load_lora(pipe, adapter(), name="s")
    _, (tag,) = parsed("x <lora:s:0.5:0.8:lbw=0,1,1,1,1,1,1,2,1,1,1,1,1,1,1,1,1>")
    set_adapters(pipe, {"s": strengths(tag, "sd15", report.matched)})
    want = {"unet.conv_in": 0.0, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 1.6}
    got = on_layers(pipe, "s")
    assert {k: got[k] for k in want} == want and {s for k, s in got.items() if k not in want} == {0.0}
    for preset, unchanged in (("NONE", True), ("ALL", False)):
        set_adapters(pipe, {"s": strengths(Tag("s", lbw=preset), "sd15", report.matched)})
        assert (set(on_layers(pipe, "s").values()) == {0.0}) == unchanged
    assert get_adapters(pipe)["s"].active


def test_an_adapter_of_one_component_takes_both_numbers(pipe, adapter, image):
    report = load_lora(pipe, adapter(targets=("conv_in",)), name="s", weight=0.25)
    want = image(pipe)
    _, (tag,) = parsed("<lora:s:0.9:0.25>")
    set_adapters(pipe, {"s": strengths(tag, "sd15", report.matched)})
    assert torch.equal(image(pipe), want)

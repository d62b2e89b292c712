"""Dialects: keys spelt by hand, the layers and numbers they mean, what they cannot hold, and what they are detected as."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpeft import converters, io
from diffpeft.converters.formats.safeloras import layers_in
from diffpeft.definition import definition_of
from diffpeft.errors import AmbiguousFormatError, CannotConvertError, CheckpointError

DOUBLE, SINGLE = "transformer.transformer_blocks.3.", "transformer.single_transformer_blocks.12."
R = 2


def ab(out, width, r=R, dtype=torch.float32):
    return torch.randn(r, width).to(dtype), torch.randn(out, r).to(dtype)


def delta(A, B, scale=1.0):
    """The naive formula."""
    return scale * (B.double().flatten(1) @ A.double().flatten(1))


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def metadata(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


def assert_deltas(tensors, want, **options):
    bundle = converters.read(tensors, **options)
    got = bundle.deltas()
    assert got.keys() == want.keys()
    for layer, value in want.items():
        torch.testing.assert_close(got[layer].reshape(value.shape), value, rtol=0, atol=1e-12)
    assert sorted({key for e in bundle.entries for key in e.keys} | {*bundle.carried}) == sorted(tensors)
    return bundle


# diffusers-old

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
CLIP = "text_model.encoder.layers.1"


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_old_diffusers_processors(prefix, alpha):
    tensors, want = {}, {}
    for old, layer in {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}.items():
        A, B = ab(6, 768 if layer in ("to_k", "to_v") else 6)
        key = f"{prefix}{ATTENTION}.processor.{old}_lora"
        tensors |= {f"{key}.down.weight": A, f"{key}.up.weight": B}
        tensors |= {f"{key}.alpha": torch.tensor(alpha)} if alpha else {}
        want[f"unet.{ATTENTION}.{layer}"] = delta(A, B, alpha / R if alpha else 1)
    bundle = assert_deltas(tensors, want)
    assert (bundle.format, bundle.family) == ("diffusers-old", "sd15") and not bundle.carried


def test_old_diffusers_text_encoders_and_newer_suffixes_beside_them():
    spelt = {
        f"{CLIP}.self_attn.to_q_lora.{{}}.weight": "self_attn.q_proj",
        f"{CLIP}.self_attn.to_out_lora.{{}}.weight": "self_attn.out_proj",
        f"{CLIP}.mlp.fc1.lora_linear_layer.{{}}.weight": "mlp.fc1",
    }
    tensors, want = {}, {}
    for key, layer in spelt.items():
        A, B = ab(5, 5)
        tensors |= {f"text_encoder.{key.format('down')}": A, f"text_encoder.{key.format('up')}": B}
        want[f"text_encoder.{CLIP}.{layer}"] = delta(A, B)
    A, B = ab(6, 6)
    tensors |= {f"unet.{ATTENTION}.to_q.lora.down.weight": A, f"unet.{ATTENTION}.to_q.lora.up.weight": B}
    want[f"unet.{ATTENTION}.to_q"] = delta(A, B)
    assert assert_deltas(tensors, want).format == "diffusers-old"


def test_newer_suffixes_alone_are_diffusers():
    tensors = {f"unet.{ATTENTION}.to_q.lora.{d}.weight": torch.ones(2, 2) for d in ("down", "up")}
    assert converters.detect(tensors).format == "diffusers"


def test_old_diffusers_is_only_read(tmp_path):
    tensors = {f"{ATTENTION}.processor.to_q_lora.{d}.weight": torch.ones(2, 2) for d in ("down", "up")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CannotConvertError, match="only read"):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers-old")
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya")
    assert {k.partition(".")[0] for k in load_file(tmp_path / "b.safetensors")} == {
        "lora_unet_" + f"{ATTENTION}.to_q".replace(".", "_")
    }


# X-Labs

QKV = {"double1": ("attn.to_q", "attn.to_k", "attn.to_v"), "double2": tuple(f"attn.add_{p}_proj" for p in "qkv")}


def xlabs(prefix="", dtype=torch.float32):
    """A file and what it means: h = 4."""
    tensors, want = {}, {}

    def add(key, out, width, layers):
        A, B = ab(out, width, dtype=dtype)
        tensors.update({f"{prefix}{key}.down.weight": A, f"{prefix}{key}.up.weight": B})
        want.update(zip(layers, delta(A, B).chunk(len(layers)), strict=True))

    for n in "12":
        add(f"double_blocks.3.processor.qkv_lora{n}", 12, 4, [DOUBLE + layer for layer in QKV[f"double{n}"]])
    add("double_blocks.3.processor.proj_lora1", 4, 4, [DOUBLE + "attn.to_out.0"])
    add("double_blocks.3.processor.proj_lora2", 4, 4, [DOUBLE + "attn.to_add_out"])
    add("single_blocks.12.processor.qkv_lora", 12, 4, [SINGLE + layer for layer in QKV["double1"]])
    add("single_blocks.12.processor.proj_lora", 4, 20, [SINGLE + "proj_out"])
    return tensors, want


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_processors(prefix):
    bundle = assert_deltas(*xlabs(prefix))
    assert (bundle.format, bundle.family, bundle.families) == ("xlabs", "flux", ("flux",))
    found = converters.detect(xlabs(prefix)[0])
    assert (found.format, found.family, found.confidence) == ("xlabs", "flux", 1.0)


@pytest.mark.parametrize("key", ["single_blocks.0.processor.qkv_lora", "double_blocks.0.processor.proj_lora2"])
def test_any_part_of_an_xlabs_file_is_one(key):
    tensors = {f"{key}.down.weight": torch.ones(1, 4), f"{key}.up.weight": torch.ones(12, 1)}
    found = converters.detect(tensors)
    assert (found.format, found.family) == ("xlabs", "flux")


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("to", ["kohya", "kohya-diffusers", "diffusers", "comfyui", "onetrainer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xlabs_comes_back_byte_for_byte(prefix, to, dtype, tmp_path):
    tensors, want = xlabs(prefix, dtype)
    save_file(tensors, tmp_path / "a.safetensors", {"title": "x"})
    there = converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
    assert there.level == "L0" and not there.warnings
    got = converters.read(tmp_path / "b.safetensors").deltas()
    for layer, value in want.items():
        torch.testing.assert_close(got.pop(layer), value, rtol=0, atol=1e-12)
    assert not any(rest.any() for rest in got.values())  # linear1's rows for the mlp
    assert converters.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="xlabs").level == "L0"
    assert same(load_file(tmp_path / "c.safetensors"), tensors)
    assert metadata(tmp_path / "c.safetensors") == {"title": "x"}


def test_the_original_s_linear1_takes_no_more_than_an_xlabs_file_has(tmp_path):
    """A fused layer of four parts: nothing in the rows of the mlp but zeros."""
    tensors, _ = xlabs()
    save_file(tensors, tmp_path / "a.safetensors")
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya")
    up = load_file(tmp_path / "b.safetensors")["lora_unet_single_blocks_12_linear1.lora_up.weight"]
    assert torch.equal(up[:12], tensors["single_blocks.12.processor.qkv_lora.up.weight"]) and not up[12:].any()
    assert up.shape == (28, R)


def qkv(layer, alpha=None, shared=True):
    """Flux's q, k and v in diffusers' flat names."""
    A, tensors, want = torch.randn(R, 4), {}, {}
    for p in "qkv":
        A = A if shared else torch.randn(R, 4)
        B, key = torch.randn(4, R), "lora_transformer_" + f"{layer}attn.to_{p}".replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": A.clone(), f"{key}.lora_up.weight": B}
        tensors |= {f"{key}.alpha": torch.tensor(alpha)} if alpha is not None else {}
        want[f"transformer.{layer}attn.to_{p}"] = delta(A, B, 1 if alpha is None else alpha / R)
    return tensors, want


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layer", ["transformer_blocks.3.", "single_transformer_blocks.12."])
def test_xlabs_holds_q_k_and_v_as_one(layer, shared, alpha, tmp_path):
    tensors, want = qkv(layer, alpha, shared)
    save_file(tensors, tmp_path / "a.safetensors", {"diffpeft.family": "flux"})
    assert converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="xlabs").level == "L0"
    written = load_file(tmp_path / "b.safetensors")
    kind, n = ("single_blocks.12", "") if "single" in layer else ("double_blocks.3", "1")
    name = f"{kind}.processor.qkv_lora{n}"
    assert written.keys() == {f"{name}.down.weight", f"{name}.up.weight"}
    assert written[f"{name}.down.weight"].shape == (R if shared else 3 * R, 4)
    assert_deltas(written, want)
    converters.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya-diffusers")
    assert same(load_file(tmp_path / "c.safetensors"), tensors)


REFUSED = {
    "another scale": qkv("single_transformer_blocks.12.", 1.0)[0],
    "the mlp of a single block": {
        f"lora_transformer_single_transformer_blocks_0_proj_mlp.lora_{d}.weight": torch.ones(2, 2)
        for d in ("down", "up")
    },
    "a text encoder": {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{d}.weight": torch.ones(2, 2) for d in ("down", "up")
    },
    "a LoHa": {
        f"lora_transformer_transformer_blocks_0_attn_to_out_0.hada_w{n}": torch.ones(2, 2)
        for n in ("1_a", "1_b", "2_a", "2_b")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_xlabs_refuses(case, tmp_path):
    bundle = converters.read(REFUSED[case], family="flux")
    with pytest.raises(CannotConvertError) as caught:
        converters.write(bundle, tmp_path / "x.safetensors", format="xlabs")
    assert bundle.entries[0].layer.partition(".")[2][:20] in str(caught.value) and not any(tmp_path.iterdir())


def test_xlabs_is_flux_s(tmp_path):
    tensors = {f"lora_unet_conv_in.lora_{d}.weight": torch.ones(2, 2) for d in ("down", "up")}
    with pytest.raises(CannotConvertError, match="sd15"):
        converters.write(converters.read(tensors), tmp_path / "x.safetensors", format="xlabs")


# Black Forest Labs


def bfl():
    h = 4
    tensors, want = {}, {}
    for key, (out, width), layers in (
        ("img_in", (h, 128), ["x_embedder"]),
        ("double_blocks.3.img_attn.qkv", (3 * h, h), [f"transformer_blocks.3.{n}" for n in QKV["double1"]]),
        ("double_blocks.3.txt_mod.lin", (6 * h, h), ["transformer_blocks.3.norm1_context.linear"]),
        (
            "single_blocks.12.linear1",
            (7 * h, h),
            [*(f"single_transformer_blocks.12.{n}" for n in QKV["double1"]), "single_transformer_blocks.12.proj_mlp"],
        ),
    ):
        A, B = ab(out, width)
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.lora_B.bias": torch.randn(out)}
        parts = delta(A, B).split([h] * 3 + [4 * h]) if len(layers) == 4 else delta(A, B).chunk(len(layers))
        want |= {f"transformer.{layer}": part for layer, part in zip(layers, parts, strict=True)}
    return tensors, want


NORMS = {
    "double_blocks.3.img_attn.norm.query_norm": "transformer_blocks.3.attn.norm_q",
    "double_blocks.3.img_attn.norm.key_norm": "transformer_blocks.3.attn.norm_k",
    "double_blocks.3.txt_attn.norm.query_norm": "transformer_blocks.3.attn.norm_added_q",
    "double_blocks.3.txt_attn.norm.key_norm": "transformer_blocks.3.attn.norm_added_k",
    "single_blocks.12.norm.query_norm": "single_transformer_blocks.12.attn.norm_q",
    "single_blocks.12.norm.key_norm": "single_transformer_blocks.12.attn.norm_k",
}


def test_a_control_lora():
    tensors, want = bfl()
    norms = {key: torch.rand(8) + 0.5 for key in NORMS}
    base = {f"transformer.{layer}": torch.rand(8) + 0.5 for layer in NORMS.values()}
    want |= {
        f"transformer.{layer}": norms[key].double() - base[f"transformer.{layer}"].double()
        for key, layer in NORMS.items()
    }
    tensors |= {f"{key}.scale": norm for key, norm in norms.items()}
    bundle = converters.read(tensors)
    assert (bundle.format, bundle.family, bundle.methods) == ("bfl", "flux", {"lora", "full"}) and not bundle.carried
    got = bundle.deltas(base)
    assert got.keys() == want.keys()
    for layer, value in want.items():
        torch.testing.assert_close(got[layer], value, rtol=0, atol=1e-12)
    assert {e.layer: [*e.tensors] for e in bundle.entries}["transformer.transformer_blocks.3.attn.norm_q"] == [
        "set_weight"
    ]
    (embedder,) = (e for e in bundle.entries if e.layer == "transformer.x_embedder")
    assert embedder.tensors["lora_A"].shape == (R, 128)
    assert all(e.alpha is None and "lora_B_bias" in e.tensors for e in bundle.entries if e.method == "lora")


def test_original_names_that_are_flux_s_alone_are_a_control_lora_s():
    assert converters.detect(bfl()[0]).format == "bfl"


def test_original_names_of_several_families_are_ambiguous_where_these_read_them_apart():
    layer, alike = "transformer.transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj"
    tensors = {f"{alike}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    for family in (None, "flux", "chroma", "flux2"):
        assert [e.layer for e in converters.read(tensors, family=family).entries] == [layer]
    flat = {f"lora_unet_{alike.replace('.', '_')}.lora_{x}.weight": torch.ones(4, 4) for x in ("down", "up")}
    with pytest.raises(AmbiguousFormatError):
        converters.read(flat)


# safeloras

UNET_CLASSES, CLIP_CLASSES = ["GEGLU", "CrossAttention", "Attention"], ["CLIPAttention"]


def a_unet_of_then(feed_forward_last):
    """The layers of SD1.5's transformer blocks by a walk over modules that hold children in the order of their making."""
    from torch import nn

    def linears(*names):
        return nn.ModuleDict({n: nn.Linear(1, 1) for n in names})

    def attention():
        own = linears("to_q", "to_k", "to_v")
        own["to_out"] = nn.ModuleList([nn.Linear(1, 1), nn.Dropout()])
        return own

    def block():
        geglu = nn.ModuleDict({"net": nn.ModuleList([linears("proj"), nn.Dropout(), nn.Linear(1, 1)])})
        children = {"attn1": attention(), "ff": geglu, "attn2": attention()}
        order = ("attn1", "attn2", "ff") if feed_forward_last else ("attn1", "ff", "attn2")
        return nn.ModuleDict({name: children[name] for name in order})

    def transformers(n):
        one = lambda: nn.ModuleDict({"transformer_blocks": nn.ModuleList([block()])})  # noqa: E731
        return nn.ModuleDict({"attentions": nn.ModuleList([one() for _ in range(n)])})

    return nn.ModuleDict(
        {
            "down_blocks": nn.ModuleList([transformers(n) for n in (2, 2, 2, 0)]),
            "up_blocks": nn.ModuleList([transformers(n) for n in (0, 3, 3, 3)]),
            "mid_block": transformers(1),
        }
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("classes", [UNET_CLASSES, ["CrossAttention"], ["GEGLU"]])
def test_the_order_of_the_layers_is_that_of_a_walk(last, classes):
    want = []
    for name, module in a_unet_of_then(last).named_modules():
        geglu = name.endswith("ff.net.0.proj")
        inside = geglu or "attn" in name.rsplit("transformer_blocks", 1)[-1]
        if type(module).__name__ == "Linear" and inside and ("GEGLU" if geglu else "CrossAttention") in classes:
            want.append(name)
    assert list(layers_in("unet", classes, last)) == want


@pytest.mark.parametrize("last", [False, True])
def test_the_order_today_is_diffusers(last):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    found = [
        f"{name}.{child}"
        for name, module in unet.named_modules()
        if type(module).__name__ in ("Attention", "GEGLU")
        for child, layer in module.named_modules()
        if type(layer).__name__ == "Linear"
    ]
    assert (list(layers_in("unet", UNET_CLASSES, last)) == found) == last


def safelora(layers, tmp_path, classes=UNET_CLASSES, width=768):
    """A file of the UNet's layers, 8 wide, and of two text layers."""
    tensors, want, said = {}, {}, {"unet": json.dumps(classes), "text_encoder": json.dumps(CLIP_CLASSES)}
    for n, layer in enumerate(layers):
        A, B = ab(64 if "ff" in layer else 8, width if "attn2.to_k" in layer or "attn2.to_v" in layer else 8)
        tensors |= {f"unet:{n}:up": B, f"unet:{n}:down": A}
        said[f"unet:{n}:rank"] = str(R)
        want[f"unet.{layer}"] = delta(A, B)
    for n, p in enumerate(("k", "v", "q", "out", "k")):
        A, B = ab(5, 5)
        tensors |= {f"text_encoder:{n}:up": B, f"text_encoder:{n}:down": A}
        want[f"text_encoder.text_model.encoder.layers.{n // 4}.self_attn.{p}_proj"] = delta(A, B)
    tensors["<s1>"], said["<s1>"] = torch.randn(8), "<embed>"
    save_file(tensors, tmp_path / "x.safetensors", said)
    return tmp_path / "x.safetensors", want


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("width", "family"), [(768, "sd15"), (1024, "sd2")])
def test_safeloras(last, width, family, tmp_path):
    path, want = safelora(list(layers_in("unet", UNET_CLASSES, last)), tmp_path, width=width)
    bundle = converters.read(path)
    assert (bundle.format, [*bundle.carried]) == ("safeloras", ["<s1>"])
    assert bundle.family == family or last  # the widths are looked for where the first order has them
    got = bundle.deltas()
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[layer], value, rtol=0, atol=1e-12) for layer, value in want.items())
    converters.convert(path, tmp_path / "y.safetensors", to="kohya")
    assert torch.equal(load_file(tmp_path / "y.safetensors")["<s1>"], load_file(path)["<s1>"])


@pytest.mark.parametrize("classes", [["CrossAttention"], ["GEGLU"]])
def test_safeloras_of_fewer_classes(classes, tmp_path):
    path, want = safelora(list(layers_in("unet", classes)), tmp_path, classes)
    assert converters.read(path).deltas().keys() == want.keys()


def test_safeloras_of_other_modules_are_refused(tmp_path):
    path, _ = safelora([f"x.{n}" for n in range(3)], tmp_path, [*UNET_CLASSES, "ResnetBlock2D"])
    with pytest.raises(CheckpointError, match="ResnetBlock2D"):
        converters.read(path)


def test_safeloras_with_shapes_in_another_order_are_refused(tmp_path):
    path, _ = safelora(["ff.net.0.proj", "attn1.to_q"], tmp_path)
    with pytest.raises(CheckpointError, match="shapes"):
        converters.read(path)


# OneTrainer


def one(key, out, width, alpha=1.0, names=("lora_down", "lora_up")):
    A, B = ab(out, width)
    tensors = {f"{key}.{names[0]}.weight": A, f"{key}.{names[1]}.weight": B, f"{key}.alpha": torch.tensor(alpha)}
    return tensors, delta(A, B, alpha / R)


OT = {"ot_branch": "master", "ot_revision": "abc"}
FLUX = {
    "lora_transformer_single_transformer_blocks_12_attn_to_q": SINGLE + "attn.to_q",
    "lora_transformer_transformer_blocks_3_norm1_linear": DOUBLE + "norm1.linear",
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": f"text_encoder.{CLIP}.mlp.fc1",
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
}
SDXL = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": f"text_encoder.{CLIP}.mlp.fc1",
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": f"text_encoder_2.{CLIP}.mlp.fc1",
}
DOTTED = {
    "transformer.layers.0.attention.to_q": "transformer.layers.0.attention.to_q",
    "transformer.layers.0.feed_forward.w1": "transformer.layers.0.feed_forward.w1",
    "transformer.cap_embedder.1": "transformer.cap_embedder.1",
}
SAVED = {"flux": FLUX, "sdxl": SDXL, "z_image": DOTTED}


def saved(family, bundled=True):
    tensors, want = {}, {}
    for key, layer in SAVED[family].items():
        own, want[layer] = one(key, 4, 4)
        tensors |= own
    if bundled:
        tensors |= {"bundle_emb.<my>.clip_l": torch.randn(2, 4), "bundle_emb.<my>.t5_out": torch.randn(2, 4)}
    return tensors, want


@pytest.mark.parametrize("family", SAVED)
def test_what_onetrainer_saves(family, tmp_path):
    tensors, want = saved(family)
    save_file(tensors, tmp_path / "a.safetensors", OT)
    bundle = converters.read(tmp_path / "a.safetensors")
    assert (bundle.format, bundle.family) == ("onetrainer", family)
    assert [*bundle.carried] == sorted(k for k in tensors if k.startswith("bundle_emb"))
    got = bundle.deltas()
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[layer], value, rtol=0, atol=1e-12) for layer, value in want.items())


@pytest.mark.parametrize("family", SAVED)
def test_onetrainer_comes_back_byte_for_byte(family, tmp_path):
    tensors, _ = saved(family)
    save_file(tensors, tmp_path / "a.safetensors", OT)
    for to in ("diffusers", "comfyui") if family == "z_image" else ("diffusers", "kohya"):
        there = converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
        assert there.level == "L0" and sorted((*there.mapped, *there.carried)) == sorted(tensors)
        back = converters.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="onetrainer")
        assert back.level == "L0" and same(load_file(tmp_path / "c.safetensors"), tensors)
        assert metadata(tmp_path / "c.safetensors") == OT


@pytest.mark.parametrize("family", SAVED)
def test_onetrainer_is_written_as_it_saves(family, tmp_path):
    tensors, _ = saved(family, bundled=False)
    plain = {f"{layer}.lora_A.weight": tensors[f"{key}.lora_down.weight"] for key, layer in SAVED[family].items()}
    plain |= {f"{layer}.lora_B.weight": tensors[f"{key}.lora_up.weight"] for key, layer in SAVED[family].items()}
    converters.write(converters.read(plain, family=family), tmp_path / "x.safetensors", format="onetrainer")
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == tensors.keys()
    assert all(t.item() == R for k, t in written.items() if k.endswith("alpha"))  # it saves one for each layer
    found = converters.detect(tmp_path / "x.safetensors")
    assert (found.format, found.family) == ("onetrainer", family)


OMI = {
    "transformer.double_blocks.3.img_attn.qkv.1": (4, 4, [DOUBLE + "attn.to_k"]),
    "transformer.double_blocks.3.txt_attn.qkv.0": (4, 4, [DOUBLE + "attn.add_q_proj"]),
    "transformer.double_blocks.3.img_mod.lin": (24, 4, [DOUBLE + "norm1.linear"]),
    "transformer.single_blocks.12.linear1.3": (16, 4, [SINGLE + "proj_mlp"]),
    "transformer.single_blocks.12.linear1.0": (4, 4, [SINGLE + "attn.to_q"]),
    "clip_l.text_model.encoder.layers.1.mlp.fc1": (4, 4, [f"text_encoder.{CLIP}.mlp.fc1"]),
    "t5.encoder.block.0.layer.0.SelfAttention.q": (4, 4, [FLUX["lora_te2_encoder_block_0_layer_0_SelfAttention_q"]]),
}


def test_onetrainer_s_standard_numbers_the_parts_of_fused_layers():
    tensors, want = {"bundle_emb.<my>.clip_l": torch.randn(2, 4)}, {}
    for key, (out, width, (layer,)) in OMI.items():
        own, want[layer] = one(key, out, width, 3.0)
        tensors |= own
    final, d = one("transformer.final_layer.adaLN_modulation.1", 8, 4)
    want["transformer.norm_out.linear"] = torch.cat([d[4:], d[:4]])  # shift and scale the other way round
    bundle = assert_deltas(tensors | final, want)
    assert (bundle.format, bundle.family) == ("onetrainer", "flux")


def test_onetrainer_s_standard_has_the_original_s_blocks_of_unets():
    key = "unet.output_blocks.5.1.transformer_blocks.1.ff.net.2"
    tensors, _ = one(key, 4, 4)
    (layer,) = converters.read(tensors, family="sdxl").deltas()
    assert layer == "unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2"
    assert converters.read(tensors, family="sdxl", format="onetrainer").entries[0].layer == layer


def test_flat_names_without_onetrainer_s_metadata_are_sd_scripts(tmp_path):
    tensors, _ = saved("sdxl", bundled=False)
    assert converters.detect(tensors).format == "kohya-diffusers"
    assert converters.read(tensors, format="onetrainer").format == "onetrainer"


def test_onetrainer_s_dora_and_loha(tmp_path):
    flux = "lora_transformer_transformer_blocks_3_attn_to_out_0"
    tensors = one(flux, 4, 4)[0] | {f"{flux}.dora_scale": torch.rand(1, 4)}
    other = "lora_transformer_transformer_blocks_4_attn_to_out_0"
    tensors |= {f"{other}.hada_w{n}": torch.randn(2, 2) for n in ("1_a", "1_b", "2_a", "2_b")}
    tensors |= {f"{other}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors", OT | {"modelspec.architecture": "flux-1-dev/lora"})
    bundle = converters.read(tmp_path / "a.safetensors")
    assert bundle.methods == {"dora", "loha"}
    converters.write(bundle, tmp_path / "b.safetensors", format="onetrainer")
    assert same(load_file(tmp_path / "b.safetensors"), tensors)


@pytest.mark.parametrize("role", ["lora_mid.weight", "diff_b", "w_norm"])
def test_onetrainer_refuses_what_it_has_no_name_for(role, tmp_path):
    key = "lora_transformer_transformer_blocks_3_attn_to_out_0"
    tensors = {} if role == "w_norm" else one(key, 4, 4)[0]
    bundle = converters.read(
        tensors | {f"{key}.{role}": torch.ones(2, 2) if "mid" in role else torch.ones(4)}, family="flux"
    )
    with pytest.raises(CannotConvertError, match="to_out"):
        converters.write(bundle, tmp_path / "x.safetensors", format="onetrainer")


# OneTrainer's rotations


def rotation(v, b, scaled):
    """OneTrainer's: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 for each block, of which an input is multiplied as a row."""
    v = v.double() / (2 * math.sqrt(b - 1) if scaled else 1)
    blocks = []
    for row in v:
        Q = torch.zeros(b, b, dtype=torch.float64)
        Q[tuple(torch.triu_indices(b, b, 1))] = row
        Q = Q - Q.T
        blocks.append(torch.eye(b, dtype=torch.float64) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)
    return torch.block_diag(*blocks)


def turned(entry, W):
    """W' by our definition."""
    method, p, spec = definition_of(entry, W)
    return method.weight(W.double(), p, spec)


LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
PROJ = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("marker", [torch.tensor(True), torch.tensor(1.0, dtype=torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onetrainer_s_rotations(scaled, marker, dtype):
    """Linear layers turn their input, x R; convolutions their weight, W R: for the weight that is R^T and R."""
    b = 4
    vs = {key: (0.1 * torch.randn(n, 6)).to(dtype) for key, n in ((LINEAR, 768 // b), (CONV, 9), (PROJ, 2))}
    tensors = {f"{key}.oft_R.weight": v for key, v in vs.items()}
    tensors |= {f"{key}.oft_R.scaled_oft": marker for key in vs} if scaled else {}
    assert (converters.detect(tensors).format, converters.detect(tensors).methods) == ("onetrainer", {"oft"})
    with pytest.warns(UserWarning, match="went into oft_R") if scaled else _nothing():
        bundle = converters.read(tensors)
    assert not bundle.carried and len(bundle.entries) == 3
    for key, entry in zip(vs, bundle.entries, strict=True):
        W = torch.randn(4, 4, 3, 3) if key == CONV else torch.randn(4, 8, 1, 1) if key == PROJ else torch.randn(4, 768)
        R_ = rotation(vs[key], b, scaled)
        want = W.double().flatten(1) @ (R_.T if key == LINEAR else R_)
        torch.testing.assert_close(turned(entry, W).flatten(1), want, rtol=0, atol=1e-12 if not scaled else 1e-6)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_in_sdxl_the_projections_are_linear():
    tensors = {f"{LINEAR}.oft_R.weight": torch.randn(512, 6), f"{PROJ}.oft_R.weight": torch.randn(2, 6)}
    bundle = converters.read(tensors, format="onetrainer")
    W = torch.randn(4, 8)
    want = W.double() @ rotation(tensors[f"{PROJ}.oft_R.weight"], 4, False).T
    torch.testing.assert_close(turned(bundle.entries[1], W), want, rtol=0, atol=1e-11)


def test_a_rotation_of_what_may_be_a_convolution_is_refused():
    with pytest.raises(CheckpointError, match=r"convolutions.*\n?.*proj_in"):
        converters.read({f"{PROJ}.oft_R.weight": torch.randn(2, 6)})


def test_the_bound_of_a_rotation_stands_in_the_training_s_options(tmp_path):
    tensors = {f"{LINEAR}.oft_R.weight": torch.randn(192, 6)}
    save_file(tensors, tmp_path / "a.safetensors", OT | {"ot_config": json.dumps({"oft_coft": True, "coft_eps": 1e-3})})
    (entry,) = converters.read(tmp_path / "a.safetensors").entries
    assert entry.options == {"side": "input", "neumann": 5, "coft": 1e-3}
    with pytest.raises(CannotConvertError, match="bound"):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="onetrainer")


def test_onetrainer_s_rotations_go_through_peft_and_back(tmp_path):
    tensors = {f"{LINEAR}.oft_R.weight": torch.randn(192, 6), f"{CONV}.oft_R.weight": torch.randn(9, 6)}
    save_file(tensors, tmp_path / "a.safetensors", OT)
    converters.convert(tmp_path / "a.safetensors", tmp_path / "peft", to="peft")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {k: torch.equal(v, -tensors[f"{CONV}.oft_R.weight"]) for k, v in stored.items() if "conv1" in k} == {
        "base_model.model.down_blocks.0.resnets.0.conv1.oft_R.weight": True
    }
    converters.convert(tmp_path / "peft", tmp_path / "b.safetensors", to="onetrainer")
    assert same(load_file(tmp_path / "b.safetensors"), tensors)


def test_exact_rotations_are_not_onetrainer_s(tmp_path):
    tensors = {f"{LINEAR}.oft_blocks": torch.randn(2, 4, 4)}
    with pytest.raises(CannotConvertError):
        converters.write(converters.read(tensors), tmp_path / "x.safetensors", format="onetrainer")


# ai-toolkit


def test_ai_toolkit_s_magnitude_is_for_each_output():
    key = f"unet.{ATTENTION}.to_k"
    A, B = ab(6, 768)
    m, W = torch.rand(6) + 0.5, torch.randn(6, 768)
    tensors = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.magnitude": m}
    bundle = converters.read(tensors)
    assert bundle.methods == {"dora"} and [*bundle.entries[0].tensors] == ["lora_A", "lora_B", "lora_magnitude_vector"]
    V = W.double() + delta(A, B)
    want = V * (m.double() / V.norm(dim=1))[:, None] - W.double()
    torch.testing.assert_close(bundle.deltas({key: W})[key], want, rtol=0, atol=1e-12)


def test_all_that_can_be_read_can_be_inspected(tmp_path):
    path, _ = safelora(list(layers_in("unet", UNET_CLASSES)), tmp_path)
    for source, format in ((xlabs()[0], "xlabs"), (bfl()[0], "bfl"), (path, "safeloras")):
        found = converters.inspect(source)
        assert found.format == format and found.readable_by and set(found.ranks) == {R}
    oft = {f"{LINEAR}.oft_R.weight": torch.randn(192, 6), f"{LINEAR}.oft_R.scaled_oft": torch.tensor(True)}
    assert converters.inspect(oft).format == "onetrainer" and io.number(None) is None


# PEFT's OFT before 0.16


def _old_oft(path, scales):
    """A folder as PEFT 0.13 (without `scales`) or 0.15 wrote it."""
    D = torch.randn(3, 4, 4)
    tensors = {"base_model.model.mid_block.attentions.0.proj_in.oft_r": D}
    if scales is not None:
        tensors["base_model.model.mid_block.attentions.0.proj_in.oft_s"] = scales
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "OFT", "r": 3, "target_modules": ["proj_in"], "block_share": False}
    (path / "adapter_config.json").write_text(json.dumps(config))
    S = 0.5 * (D.double() - D.mT.double())
    eye = torch.eye(4, dtype=torch.float64)
    return torch.block_diag(*((eye - S) @ torch.linalg.inv(eye + S)))


def test_peft_up_to_0_13_turned_the_output(tmp_path):
    Q, W = _old_oft(tmp_path / "a", None), torch.randn(12, 12)
    (delta,) = converters.read(tmp_path / "a").deltas({"unet.mid_block.attentions.0.proj_in": W}).values()
    torch.testing.assert_close(delta, Q.T @ W.double() - W, rtol=0, atol=1e-12)
    converters.convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya")
    (again,) = converters.read(tmp_path / "b.safetensors").deltas({"unet.mid_block.attentions.0.proj_in": W}).values()
    torch.testing.assert_close(again, delta, rtol=0, atol=1e-12)


def test_peft_0_14_and_0_15_turned_and_scaled_the_input(tmp_path):
    s = torch.randn(12, 1)
    Q, W = _old_oft(tmp_path / "a", s), torch.randn(12, 12)
    (delta,) = converters.read(tmp_path / "a").deltas({"unet.mid_block.attentions.0.proj_in": W}).values()
    torch.testing.assert_close(delta, s.double() * (W.double() @ Q.T) - W, rtol=0, atol=1e-12)


def test_shared_blocks_of_old_versions_are_refused(tmp_path):
    _old_oft(tmp_path / "a", None)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | {"block_share": True}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="block_share"):
        converters.read(tmp_path / "a")

"""What other programs do wrong with adapter files, and that ours is right where they are not.

Each test shows the wrong answer of diffusers 0.42.1 or LyCORIS 4.1.3, so that it tells when that is mended, and holds ours against a dense formula in float64.
Sources: formats.md 1.5, 2.4, 2.10, 3.4, 3.6, 3.7, 3.11 and the negative tests of 5.2.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers.loaders import lora_pipeline as pipelines
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import nn

from diffpeft import CheckpointError, converters
from tests.converters.factory import METHODS

# the loaders of the families' pipelines
LOADERS = {
    "sd15": pipelines.StableDiffusionLoraLoaderMixin,
    "sdxl": pipelines.StableDiffusionXLLoraLoaderMixin,
    "sd3": pipelines.SD3LoraLoaderMixin,
    "flux": pipelines.FluxLoraLoaderMixin,
    "flux2": pipelines.Flux2LoraLoaderMixin,
    "wan": pipelines.WanLoraLoaderMixin,
    "z_image": pipelines.ZImageLoraLoaderMixin,
    "lumina2": pipelines.Lumina2LoraLoaderMixin,
    "hunyuan_video": pipelines.HunyuanVideoLoraLoaderMixin,
    "sana": pipelines.SanaLoraLoaderMixin,
    "auraflow": pipelines.AuraFlowLoraLoaderMixin,
    "ltx": pipelines.LTXVideoLoraLoaderMixin,
    "ltx2": pipelines.LTX2LoraLoaderMixin,
    "mochi": pipelines.Mochi1LoraLoaderMixin,
    "cogvideox": pipelines.CogVideoXLoraLoaderMixin,
    "hidream": pipelines.HiDreamImageLoraLoaderMixin,
    "minimax_h3": pipelines.MiniMaxH3LoraLoaderMixin,
    "flux3": pipelines.Flux3LoraLoaderMixin,
    "ace_step": pipelines.AceStepLoraLoaderMixin,
}


def lora(layer, o, i, r=4, alpha=None, dotted=False):
    """A LoRA of a layer [o, i], and its dense delta."""
    a, b = ("lora_A.weight", "lora_B.weight") if dotted else ("lora_down.weight", "lora_up.weight")
    A, B = torch.randn(r, i), torch.randn(o, r)
    tensors = {f"{layer}.{a}": A, f"{layer}.{b}": B} | (
        {} if alpha is None else {f"{layer}.alpha": torch.tensor(alpha)}
    )
    return tensors, (1.0 if alpha is None else alpha / r) * B.double() @ A.double()


def theirs(family, tensors, **options):
    """What diffusers makes of a file: {key: tensor}."""
    found = LOADERS[family].lora_state_dict({k: t.clone() for k, t in tensors.items()}, **options)
    return found[0] if isinstance(found, tuple) else found


def dense(found, layer):
    """B A of a layer in PEFT's spelling."""
    return found[f"{layer}.lora_B.weight"].double() @ found[f"{layer}.lora_A.weight"].double()


def ours(family, tensors, base=None):
    return converters.read(tensors, family=family).deltas(base)


def saved(family, tensors, folder):
    """What stock diffusers finds in the file that we write for it."""
    converters.convert(tensors, folder / "ours.safetensors", to="diffusers", family=family)
    return load_file(folder / "ours.safetensors")


def adapter(folder, tensors, config):
    """A folder as PEFT saves it."""
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def near(a, b):
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * b.abs().max())


def swapped(t):
    return torch.cat(t.chunk(2)[::-1])


def assert_right(family, tensors, want, base=None):
    """Ours: exactly these layers and deltas."""
    got = ours(family, tensors, base)
    assert got.keys() == want.keys()
    assert not [layer for layer in want if not near(got[layer], want[layer])]


# Flux


TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}


@pytest.mark.parametrize("original, layer", TOP.items())
def test_flux_layers_that_are_in_no_block_lose_their_component(original, layer):
    """diffusers emits them without `transformer.`, and later loads only what begins with it."""
    tensors, want = lora(f"lora_unet_{original}", 12, 8, alpha=2.0)
    found = theirs("flux", tensors)
    assert f"{layer}.lora_A.weight" in found and not any(k.startswith("transformer.") for k in found)
    assert_right("flux", tensors, {f"transformer.{layer}": want})


def test_flux_final_layer_has_an_alpha_that_diffusers_forgets():
    one, want = lora("lora_unet_final_layer_linear", 8, 12, r=4, alpha=2.0)
    two, turned = lora("lora_unet_final_layer_adaLN_modulation_1", 24, 12, r=4, alpha=1.0)
    found = theirs("flux", one | two)
    assert near(dense(found, "proj_out"), 2 * want) and near(dense(found, "norm_out.linear"), 4 * swapped(turned))
    assert_right("flux", one | two, {"transformer.proj_out": want, "transformer.norm_out.linear": swapped(turned)})


@pytest.mark.parametrize("prefix", ["lora_te3_", "lora_te2_"])
def test_flux_t5_is_dropped(prefix):
    """sd-scripts calls it the third encoder, OneTrainer the second."""
    tensors, want = lora(f"{prefix}encoder_block_0_layer_0_SelfAttention_q", 12, 12, alpha=4.0)
    clip, clip_want = lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 48, 12, alpha=4.0)
    found = theirs("flux", tensors | clip)
    assert found and all(k.startswith("text_encoder.") for k in found)
    layers = (
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    )
    assert_right("flux", tensors | clip, dict(zip(layers, (want, clip_want), strict=True)))


def test_flux_fused_layers_become_three_that_share_their_memory(tmp_path):
    """So that diffusers' result cannot be saved, and changing one changes all."""
    tensors, want = lora("lora_unet_double_blocks_0_img_attn_qkv", 36, 12, alpha=4.0)
    found = theirs("flux", tensors)
    layers = [f"transformer.transformer_blocks.0.attn.to_{n}" for n in "qkv"]
    assert len({found[f"{layer}.lora_A.weight"].data_ptr() for layer in layers}) == 1
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(found, tmp_path / "theirs.safetensors")
    own = saved("flux", tensors, tmp_path)
    for layer, rows in zip(layers, want.chunk(3), strict=True):
        assert near(dense(own, layer), rows)
    save_file(own, tmp_path / "again.safetensors")


@pytest.mark.parametrize("alpha", [1.0, 7.0])
def test_flux_alphas_are_folded_into_numbers_of_few_bits(alpha, tmp_path):
    """alpha / rank = 1/3 in fp16 has an error that ours, which says the alpha in the metadata, has not."""
    tensors, _ = lora("lora_unet_double_blocks_0_img_mlp_0", 48, 12, r=3, alpha=alpha)
    tensors = {k: t.half() for k, t in tensors.items()}
    A, B = (tensors[f"lora_unet_double_blocks_0_img_mlp_0.lora_{d}.weight"].double() for d in ("down", "up"))
    layer = "transformer.transformer_blocks.0.ff.net.0.proj"
    want = alpha / 3 * B @ A
    error = (dense(theirs("flux", tensors), layer) - want).abs().max() / want.abs().max()
    assert 1e-4 < error < 1e-2
    tensors |= lora("lora_unet_double_blocks_0_img_mod_lin", 72, 12)[0]  # Flux's, not Chroma's
    converters.convert(tensors, tmp_path / "b.safetensors", to="diffusers", family="flux")
    assert near(converters.read(tmp_path / "b.safetensors", family="flux").deltas()[layer], want)


def test_flux_linear1_has_only_the_published_width():
    tensors, want = lora("lora_unet_single_blocks_0_linear1", 84, 12, alpha=4.0)
    with pytest.raises(AssertionError):
        theirs("flux", tensors)
    parts = zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), want.split((12, 12, 12, 48)), strict=True)
    assert_right("flux", tensors, {f"transformer.single_transformer_blocks.0.{n}": rows for n, rows in parts})


def test_flux_changes_of_weights_stop_it():
    tensors, want = lora("lora_unet_double_blocks_0_img_mlp_0", 48, 12, alpha=4.0)
    diff = {"lora_unet_double_blocks_0_img_mlp_2.diff": torch.randn(12, 48)}
    with pytest.raises(ValueError, match="Incompatible keys"):
        theirs("flux", tensors | diff)
    layers = ("transformer.transformer_blocks.0.ff.net.0.proj", "transformer.transformer_blocks.0.ff.net.2")
    deltas = (want, next(iter(diff.values())).double())
    assert_right("flux", tensors | diff, dict(zip(layers, deltas, strict=True)))


def test_flux_changes_of_biases_are_dropped():
    tensors, want = lora("lora_unet_double_blocks_0_img_mlp_0", 48, 12, alpha=4.0)
    diff = {"lora_unet_double_blocks_0_img_mlp_0.diff_b": torch.randn(48)}
    assert not any("bias" in k or "diff" in k for k in theirs("flux", tensors | diff))
    (entry,) = converters.read(tensors | diff, family="flux").entries
    assert "diff_b" in entry.tensors and {*entry.keys} == {*tensors, *diff}
    assert_right("flux", tensors | diff, {"transformer.transformer_blocks.0.ff.net.0.proj": want})


def test_flux_kontext_of_one_block_is_no_whole_to_diffusers(tmp_path):
    """fal's names: PEFT's prefix before the original's. Every block has to be there."""
    tensors, want = lora("base_model.model.double_blocks.0.img_attn.proj", 12, 12, dotted=True)
    with pytest.raises(KeyError):
        theirs("flux", tensors)
    adapter(tmp_path, tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 2})
    assert_right("flux", tmp_path, {"transformer.transformer_blocks.0.attn.to_out.0": want / 2})


# Flux.2


def test_flux2_final_modulation_is_not_swapped():
    """Though diffusers' converter of whole checkpoints swaps it (test_families.py traces that)."""
    tensors, want = lora("diffusion_model.final_layer.adaLN_modulation.1", 24, 12, dotted=True)
    assert near(dense(theirs("flux2", tensors), "transformer.norm_out.linear"), want)
    assert_right("flux2", tensors, {"transformer.norm_out.linear": swapped(want)})


def test_flux2_alphas_stop_it():
    tensors, want = lora("diffusion_model.double_blocks.0.img_attn.proj", 12, 12, alpha=2.0, dotted=True)
    with pytest.raises(ValueError, match="should be empty"):
        theirs("flux2", tensors)
    assert_right("flux2", tensors, {"transformer.transformer_blocks.0.attn.to_out.0": want})


@pytest.mark.parametrize(
    "original, layer, turned",
    [
        ("double_stream_modulation_img_lin", "double_stream_modulation_img.linear", False),
        ("guidance_in_in_layer", "time_guidance_embed.guidance_embedder.linear_1", False),
        ("final_layer_adaLN_modulation_1", "norm_out.linear", True),
    ],
)
def test_flux2_flat_layers_that_are_in_no_list_are_dropped(original, layer, turned):
    tensors, want = lora(f"lora_unet_{original}", 24, 12, alpha=2.0)
    assert theirs("flux2", tensors) == {}
    assert_right("flux2", tensors, {f"transformer.{layer}": swapped(want) if turned else want})


# HunyuanVideo


def hunyuan(layer, o, i, **how):
    """A LoRA of a layer, beside one of a block, by which diffusers knows the format."""
    tensors, want = lora(f"diffusion_model.{layer}", o, i, dotted=True, **how)
    block, rows = lora("diffusion_model.double_blocks.0.img_attn_qkv", 36, 12, dotted=True)
    parts = {f"transformer.transformer_blocks.0.attn.to_{n}": t for n, t in zip("qkv", rows.chunk(3), strict=True)}
    return tensors | block, want, parts


def test_hunyuan_video_token_refiner_is_cut_along_its_rank():
    layer = "txt_in.individual_token_refiner.blocks.0.self_attn_qkv"
    tensors, want, parts = hunyuan(layer, 36, 12, r=6)
    found, name = (
        theirs("hunyuan_video", tensors),
        "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_",
    )
    for n in "qkv":  # rank 2 where the other factor has 6
        assert found[f"{name}{n}.lora_A.weight"].shape == (2, 12) and found[f"{name}{n}.lora_B.weight"].shape == (12, 6)
    parts |= {f"{name}{n}": t for n, t in zip("qkv", want.chunk(3), strict=True)}
    assert_right("hunyuan_video", tensors, parts)


def test_hunyuan_video_final_modulation_is_swapped_along_its_rank_too():
    tensors, want, parts = hunyuan("final_layer.adaLN_modulation.1", 24, 12, r=4)
    found = theirs("hunyuan_video", tensors)
    A, B = (tensors[f"diffusion_model.final_layer.adaLN_modulation.1.lora_{n}.weight"] for n in "AB")
    assert torch.equal(found["transformer.norm_out.linear.lora_A.weight"], swapped(A))
    wrong = dense(found, "transformer.norm_out.linear")
    assert near(wrong, swapped(B).double() @ swapped(A).double()) and not near(wrong, swapped(want))
    assert_right("hunyuan_video", tensors, parts | {"transformer.norm_out.linear": swapped(want)})


def test_hunyuan_video_final_modulation_of_rank_1_stops_it():
    tensors, want, parts = hunyuan("final_layer.adaLN_modulation.1", 24, 12, r=1)
    with pytest.raises(ValueError, match="not enough values"):
        theirs("hunyuan_video", tensors)
    assert_right("hunyuan_video", tensors, parts | {"transformer.norm_out.linear": swapped(want)})


def test_hunyuan_video_alphas_stop_it():
    tensors, rows = lora("diffusion_model.double_blocks.0.img_attn_qkv", 36, 12, alpha=2.0, dotted=True)
    with pytest.raises(RuntimeError, match="at least a 1-dimensional tensor"):
        theirs("hunyuan_video", tensors)
    parts = zip("qkv", rows.chunk(3), strict=True)
    assert_right("hunyuan_video", tensors, {f"transformer.transformer_blocks.0.attn.to_{n}": t for n, t in parts})


def test_hunyuan_video_of_other_layers_is_not_known():
    """Only by `img_attn_qkv` does diffusers know the format."""
    tensors, want = lora("diffusion_model.double_blocks.0.img_mlp.fc1", 48, 12, dotted=True)
    assert theirs("hunyuan_video", tensors).keys() == tensors.keys()
    assert_right("hunyuan_video", tensors, {"transformer.transformer_blocks.0.ff.net.0.proj": want})


def test_hunyuan_video_flat_names_stop_it():
    tensors, rows = lora("lora_unet_double_blocks_0_img_attn_qkv", 36, 12)
    with pytest.raises(ValueError, match="not enough values"):
        theirs("hunyuan_video", tensors)
    parts = zip("qkv", rows.chunk(3), strict=True)
    assert_right("hunyuan_video", tensors, {f"transformer.transformer_blocks.0.attn.to_{n}": t for n, t in parts})


# Wan


@pytest.mark.parametrize("layer, name", [("blocks_0_self_attn_q", "attn1.to_q"), ("blocks_0_ffn_0", "ffn.net.0.proj")])
def test_wan_of_some_modules_is_no_whole_to_diffusers(layer, name):
    """musubi-tuner's flat names: every module of every block from the first on has to be there."""
    tensors, want = lora(f"lora_unet_{layer}", 12, 12, alpha=2.0)
    with pytest.raises(KeyError):
        theirs("wan", tensors)
    assert_right("wan", tensors, {f"transformer.blocks.0.{name}": want})


ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))


def test_wan_of_the_second_block_alone_is_no_whole_to_diffusers():
    names = {f"{a}_{n}": f"{b}.{t}" for a, b in (("self_attn", "attn1"), ("cross_attn", "attn2")) for n, t in ATTENTION}
    names |= {"ffn_0": "ffn.net.0.proj", "ffn_2": "ffn.net.2"}
    tensors, want = {}, {}
    for original, layer in names.items():
        own, want[f"transformer.blocks.1.{layer}"] = lora(f"lora_unet_blocks_1_{original}", 12, 12, alpha=2.0)
        tensors |= own
    first = {k.replace("blocks_1", "blocks_0"): t for k, t in tensors.items()}
    assert len(theirs("wan", first)) == 2 * len(names)  # the first alone is read
    with pytest.raises(KeyError, match="blocks_0"):
        theirs("wan", tensors)
    assert_right("wan", tensors, want)


def test_wan_without_blocks_stops_diffusers():
    tensors, want = lora("diffusion_model.head.head", 16, 12, dotted=True)
    with pytest.raises(ValueError, match=r"empty"):
        theirs("wan", tensors)
    assert_right("wan", tensors, {"transformer.proj_out": want})


WAN = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


@pytest.mark.parametrize("original, layer", WAN.items())
def test_wan_alphas_outside_of_blocks_stop_diffusers(original, layer):
    tensors, want = lora(f"diffusion_model.{original}", 12, 12, alpha=2.0, dotted=True)
    block, rows = lora("diffusion_model.blocks.0.ffn.0", 48, 12, alpha=2.0, dotted=True)
    with pytest.raises((ValueError, KeyError)):
        theirs("wan", tensors | block)
    assert_right("wan", tensors | block, {f"transformer.{layer}": want, "transformer.blocks.0.ffn.net.0.proj": rows})


def test_wan_changes_of_norms_are_dropped():
    """And nobody is told. The original's third norm is diffusers' second."""
    tensors, rows = lora("diffusion_model.blocks.0.ffn.0", 48, 12, dotted=True)
    diff = {
        "diffusion_model.blocks.0.norm3.diff": torch.randn(12),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(12),
    }
    assert not any("norm" in k for k in theirs("wan", tensors | diff))
    got = ours("wan", tensors | diff)
    assert near(got["transformer.blocks.0.ffn.net.0.proj"], rows)
    assert torch.equal(
        got["transformer.blocks.0.norm2"].flatten(), diff["diffusion_model.blocks.0.norm3.diff"].double()
    )


def test_wan_change_of_the_head_is_a_lora_with_an_identity_to_diffusers():
    """lightx2v's: right only where as many rows as the rank, which then is the whole layer's."""
    tensors, rows = lora("diffusion_model.blocks.0.ffn.0", 48, 12, dotted=True)
    diff = torch.randn(16, 12)
    head = {"diffusion_model.head.head.diff": diff, "diffusion_model.head.head.diff_b": torch.randn(16)}
    found = theirs("wan", tensors | head)
    assert torch.equal(found["transformer.proj_out.lora_B.weight"], torch.eye(16))
    assert torch.equal(found["transformer.proj_out.lora_A.weight"], diff)
    with pytest.raises(KeyError):  # without the bias it does not know how many rows
        theirs("wan", tensors | {"diffusion_model.head.head.diff": diff})
    for own in (head, {"diffusion_model.head.head.diff": diff}):
        want = {"transformer.blocks.0.ffn.net.0.proj": rows, "transformer.proj_out": diff.double()}
        assert_right("wan", tensors | own, want)


# Stable Diffusion


def sgm(layer, o, i, **how):
    return lora(f"lora_unet_{layer}", o, i, **how)


def test_a_bundled_embedding_keeps_all_of_sdxl_from_being_read():
    tensors, want = sgm("input_blocks_4_1_proj_in", 12, 12, alpha=2.0)
    bundled = {"bundle_emb.tok.clip_l": torch.randn(2, 8)}
    assert any(k.startswith("unet.") for k in theirs("sdxl", tensors, unet_config=Levels))
    assert theirs("sdxl", tensors | bundled, unet_config=Levels).keys() == (tensors | bundled).keys()
    assert_right("sdxl", tensors | bundled, {"unet.down_blocks.1.attentions.0.proj_in": want})
    assert [*converters.read(tensors | bundled, family="sdxl").carried] == [*bundled]


class Levels:
    """Of diffusers' UNet config, what its converter asks for."""

    layers_per_block = 2


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_rotations_of_sd_scripts_are_not_read(family):
    blocks = torch.randn(3, 4, 4) / 4
    tensors = {"oft_unet_mid_block_attentions_0_proj_in.oft_blocks": blocks}
    tensors["oft_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(1e3)  # a bound that is not reached
    assert theirs(family, tensors).keys() == tensors.keys()
    W = torch.randn(12, 12, dtype=torch.float64)
    want = METHODS["oft"].weight(W, {"oft_blocks": blocks.double()}, None) - W
    name = "unet.mid_block.attentions.0.proj_in"
    assert_right(family, tensors, {name: want}, {name: W})


NOT_READ = ("loha", "lokr", "lokr-both", "oft", "ia3-in", "glora", "full", "tucker")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("method", NOT_READ)
def test_methods_that_diffusers_does_not_read(method, family):
    how, shape = METHODS[method], (12, 12, 3, 3) if method == "tucker" else (12, 12)
    layer = (
        "mid_block_resnets_0_conv1" if method == "tucker" else "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    name = (
        "unet.mid_block.resnets.0.conv1"
        if method == "tucker"
        else "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    drawn = how.draw(shape, 2)
    tensors = {f"lora_unet_{layer}.{end}": t for end, t in drawn.items()}
    tensors |= {f"lora_unet_{layer}.alpha": torch.tensor(1.0)} if how.alphas else {}
    with pytest.raises(ValueError, match="not been correctly renamed"):
        theirs(family, tensors)
    W = torch.randn(shape, dtype=torch.float64)
    want = how.weight(W, {k: t.double() for k, t in drawn.items()}, 1.0) - W
    assert_right(family, tensors, {name: want}, {name: W})


DORA = {
    "sd15": ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
    "sdxl": ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
    "flux": ("lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
    "flux2": ("lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
    "wan": ("transformer.blocks.0.ffn.net.0.proj", "transformer.blocks.0.ffn.net.0.proj"),
    "z_image": ("diffusion_model.layers.0.attention.to_q", "transformer.layers.0.attention.to_q"),
    "sd3": ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
    "ltx": ("transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q"),
    "mochi": ("transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q"),
    "cogvideox": ("transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q"),
}


@pytest.mark.parametrize("family", DORA)
def test_a_dora_loses_its_magnitude_and_is_loaded_as_a_lora(family):
    """With a warning, in every pipeline, and a weight that is wrong."""
    layer, name = DORA[family]
    tensors, want = lora(layer, 12, 12, dotted="." in layer)
    magnitude = torch.rand(12, 1) + 0.5
    found = theirs(family, tensors | {f"{layer}.dora_scale": magnitude})
    assert found and not any("dora" in k or "magnitude" in k for k in found)
    W = torch.randn(12, 12, dtype=torch.float64)
    V = W + want
    dora = V * magnitude.double() / V.norm(dim=1, keepdim=True) - W
    assert not near(dora, want)
    assert_right(family, tensors | {f"{layer}.dora_scale": magnitude}, {name: dora}, {name: W})


def test_wan_magnitudes_stop_diffusers():
    """Its other pipelines drop them first."""
    tensors, want = lora("diffusion_model.blocks.0.ffn.0", 48, 12, dotted=True)
    magnitude = torch.rand(48, 1) + 0.5
    tensors["diffusion_model.blocks.0.ffn.0.dora_scale"] = magnitude
    with pytest.raises(ValueError, match="should be empty"):
        theirs("wan", tensors)
    W, name = torch.randn(48, 12, dtype=torch.float64), "transformer.blocks.0.ffn.net.0.proj"
    V = W + want
    assert_right("wan", tensors, {name: V * magnitude.double() / V.norm(dim=1, keepdim=True) - W}, {name: W})


def test_of_both_programs_names_in_one_file_sd_scripts_are_deleted():
    one, want = sgm("input_blocks_4_1_proj_in", 12, 12, alpha=2.0)
    two, other = sgm("mid_block_attentions_0_proj_in", 12, 12, alpha=2.0)
    found = theirs("sdxl", one | two, unet_config=Levels)
    assert {k.partition(".lora")[0] for k in found} == {"unet.mid_block.attentions.0.proj_in"}
    names = ("unet.down_blocks.1.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in")
    assert_right("sdxl", one | two, dict(zip(names, (want, other), strict=True)))


def test_without_a_model_sd_scripts_names_stay_as_they_are():
    """The file alone is enough for ours."""
    tensors, want = sgm("input_blocks_4_1_proj_in", 12, 12)
    assert {k.partition(".lora")[0] for k in theirs("sdxl", tensors)} == {"unet.down_blocks.4.1.proj_in"}
    assert_right("sdxl", tensors, {"unet.down_blocks.1.attentions.0.proj_in": want})


def test_the_upsampler_of_sd15_in_ldm_s_names_becomes_an_attention():
    """Its number depends on whether the level has attention, which diffusers does not ask."""
    tensors, want = sgm("output_blocks_2_1_conv", 12, 12)
    found = theirs("sdxl", tensors, unet_config=Levels)
    assert all(k.startswith("unet.up_blocks.0.attentions.2.conv") for k in found)
    assert_right("sd15", tensors, {"unet.up_blocks.0.upsamplers.0.conv": want})


def test_alphas_of_some_modules_become_all_modules():
    """A module without one inherits another's, by what diffusers tells PEFT of them; without one, the scale is 1."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    down = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    unet = UNet2DConditionModel(down_block_types=down[0], up_block_types=down[1], layers_per_block=1, **config)
    given, _ = lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 16, 16, r=4, alpha=1.0)
    bare, want = lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k", 16, 16, r=4)
    found, alphas = LOADERS["sd15"].lora_state_dict(given | bare)
    unet.load_lora_adapter(found, network_alphas=alphas, prefix="unet")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    got = unet.get_submodule(name).get_delta_weight("default_0").double()
    assert torch.allclose(got, want / 4, atol=1e-5) and not torch.allclose(got, want, atol=1e-2)
    assert near(ours("sd15", given | bare)[f"unet.{name}"], want)


# Families whose original names diffusers does not know in adapters

FLAT = {
    "sd3": ("joint_blocks_0_x_block_mlp_fc1", "transformer_blocks.0.ff.net.0.proj"),
    "lumina2": ("layers_0_feed_forward_w1", "layers.0.feed_forward.linear_1"),
    "sana": ("blocks_0_attn_proj", "transformer_blocks.0.attn1.to_out.0"),
    "cogvideox": ("transformer_layers_0_mlp_dense_h_to_4h", "transformer_blocks.0.ff.net.0.proj"),
    "ltx": ("patchify_proj", "proj_in"),
    "mochi": ("blocks_0_attn_proj_x", "transformer_blocks.0.attn1.to_out.0"),
    "auraflow": ("double_layers_0_attn_w2q", "joint_transformer_blocks.0.attn.to_q"),
    "hidream": ("double_stream_blocks_0_block_attn1_to_q", "double_stream_blocks.0.block.attn1.to_q"),
}


@pytest.mark.parametrize("family", FLAT)
def test_flat_names_that_diffusers_hands_back_as_they_are(family):
    """It only warns, and nothing is loaded."""
    flat, layer = FLAT[family]
    tensors, want = lora(f"lora_unet_{flat}", 12, 12, alpha=2.0)
    assert theirs(family, tensors).keys() == tensors.keys()
    assert_right(family, tensors, {f"transformer.{layer}": want})


def test_ltx_patch_embedding_keeps_the_original_s_name():
    tensors, want = lora("diffusion_model.patchify_proj", 12, 16, dotted=True)
    assert {k.partition(".lora")[0] for k in theirs("ltx", tensors)} == {"transformer.patchify_proj"}
    assert_right("ltx", tensors, {"transformer.proj_in": want})


def test_z_image_fused_attention_stays_fused():
    tensors, rows = lora("diffusion_model.layers.0.attention.qkv", 36, 12, dotted=True)
    assert {k.partition(".lora")[0] for k in theirs("z_image", tensors)} == {"transformer.layers.0.attention.qkv"}
    parts = zip("qkv", rows.chunk(3), strict=True)
    assert_right("z_image", tensors, {f"transformer.layers.0.attention.to_{n}": t for n, t in parts})


def test_lumina2_of_some_layers_is_no_whole_to_diffusers():
    tensors, want = lora("diffusion_model.layers.0.attention.out", 12, 12, dotted=True)
    with pytest.raises(KeyError):
        theirs("lumina2", tensors)
    assert_right("lumina2", tensors, {"transformer.layers.0.attn.to_out.0": want})


# diffusers' own writer of sd-scripts' names

PEFT = {"unet.mid_block.attentions.0.proj_in": (12, 12), "text_encoder.text_model.encoder.layers.0.mlp.fc1": (48, 12)}


def test_the_kohya_writer_of_diffusers_says_the_wrong_alpha_and_encoder(tmp_path):
    """The rank as an integer, whatever the alpha is, and `lora_te1_`, which in sd-scripts' SD1.x is no prefix."""
    tensors, want, alpha = {}, {}, 1.0
    for layer, (o, i) in PEFT.items():
        own, delta = lora(layer, o, i, dotted=True)
        tensors, want[layer] = tensors | own, alpha / 4 * delta
    found = convert_state_dict_to_kohya({k: t.clone() for k, t in tensors.items()})
    unet, text = "lora_unet_mid_block_attentions_0_proj_in", "text_model_encoder_layers_0_mlp_fc1"
    assert found[f"{unet}.alpha"].dtype == torch.int64 and found[f"{unet}.alpha"] == 4
    assert f"lora_te1_{text}.alpha" in found
    wrong = ours("sd15", found)[next(iter(PEFT))]
    assert near(wrong, 4 * want[next(iter(PEFT))])  # we read what it writes, its mistake with it
    config = {f"{c}.{field}": v for c in ("unet", "text_encoder") for field, v in (("r", 4), ("lora_alpha", alpha))}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya", family="sd15")
    own = load_file(tmp_path / "b.safetensors")
    assert own[f"{unet}.alpha"] == 1 and own[f"{unet}.alpha"].is_floating_point()
    assert own[f"lora_te_{text}.alpha"] == 1
    assert_right("sd15", own, want)


def test_the_kohya_writer_of_diffusers_flattens_a_magnitude_wrongly(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors, _ = lora(layer, 12, 12, dotted=True)
    tensors[f"{layer}.lora_magnitude_vector"] = torch.rand(12) + 0.5
    found = convert_state_dict_to_kohya({k: t.clone() for k, t in tensors.items()})
    flat = layer.replace(".", "_").replace("unet", "lora_unet")
    assert f"{flat}.dora_scale" not in found and f"{flat.removesuffix('_to_q')}.to_q.lora_magnitude_vector" in found
    converters.convert(tensors, tmp_path / "b.safetensors", to="kohya", family="sd15")
    own = load_file(tmp_path / "b.safetensors")
    assert own[f"{flat}.dora_scale"].shape == (12, 1)
    W = torch.randn(12, 12, dtype=torch.float64)
    (one,), (two,) = (ours("sd15", t, {layer: W}).values() for t in (tensors, own))
    assert torch.equal(one, two)


def test_the_kohya_writer_of_diffusers_has_no_transformers(tmp_path):
    layer = "transformer.transformer_blocks.0.attn.to_"
    tensors, want = {}, {}
    for n in "qkv":
        own, want[f"{layer}{n}"] = lora(f"{layer}{n}", 12, 12, dotted=True)
        tensors |= own
    found = convert_state_dict_to_kohya({k: t.clone() for k, t in tensors.items()})
    assert "transformer_transformer_blocks_0_attn_to_q.lora_down.weight" in found
    with pytest.raises(CheckpointError):
        converters.read(found)
    converters.convert(tensors, tmp_path / "b.safetensors", to="kohya", family="flux")
    own = load_file(tmp_path / "b.safetensors")
    assert {k.partition(".")[0] for k in own} == {"lora_unet_double_blocks_0_img_attn_qkv"}
    assert_right("flux", own, want)


# LyCORIS


def lycoris(kind, layer, **how):
    """A LyCORIS module on a layer, with factors that are not zero."""
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    torch.manual_seed(0)
    module = {"loha": LohaModule, "lokr": LokrModule}[kind]("x", layer, 1.0, lora_dim=4, alpha=1.0, **how)
    for p in module.parameters():
        nn.init.normal_(p)
    return module.eval()


MERGED = {
    "loha": ("loha", {}),
    "lokr": ("lokr", {"factor": 3}),
    "lokr-both": ("lokr", {"factor": 3, "decompose_both": True}),
}


@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_lycoris_merges_with_the_square_of_the_scale(case):
    """alpha / rank = 1/4 twice. Its forward pass has it once, and so have we."""
    kind, how = MERGED[case]
    if case == "lokr-both":
        how = {**how, "factor": 16}
    layer = nn.Linear(256, 256, bias=False).double()
    W, module = layer.weight.clone(), lycoris(kind, layer, **how).double()
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"lora_{name.replace('.', '_')}.{k}": t.clone() for k, t in module.state_dict().items()}
    scale = module.scale
    assert math.isclose(scale, 1 / 4)
    module.apply_to()
    forward = (layer(torch.eye(256, dtype=torch.float64)).T - W).clone()
    module.restore()
    module.merge_to()
    merged = layer.weight - W
    assert near(merged, forward / 4) and not near(merged, forward)
    got = ours("sd15", tensors)[name]
    assert (got - forward).abs().max() <= 1e-6 * forward.abs().max()


@torch.no_grad()
def test_lycoris_cannot_merge_a_loha_of_a_convolution_precisely():
    """It forgets the kernel."""
    layer = nn.Conv2d(6, 12, 3, bias=False)
    module = lycoris("loha", layer)
    with pytest.raises(RuntimeError, match="must match the size"):
        module.merge_to(precise=True)
    W, name = torch.zeros(12, 6, 3, 3, dtype=torch.float64), "unet.mid_block.resnets.0.conv1"
    state = {k: t.clone().float() for k, t in module.state_dict().items()}
    want = METHODS["loha"].weight(W, {k: t.double() for k, t in state.items()}, 1.0)
    assert_right("sd15", {f"lora_{name.replace('.', '_')}.{k}": t for k, t in state.items()}, {name: want}, {name: W})


# PEFT


@pytest.mark.parametrize("neumann", [False, True])
@torch.no_grad()
def test_peft_turns_the_other_way_if_the_inverse_is_a_series(neumann, tmp_path):
    """One flag of the config, which no key shows: (I - Q)(I + Q)^-1, or I + 2Q + 2Q^2 + 2Q^3 + Q^4, which is about its inverse."""
    from peft import OFTConfig, get_peft_model

    layer = nn.Linear(8, 8, bias=False).double()
    W, vec = layer.weight.clone(), 0.02 * torch.randn(2, 6, dtype=torch.float64)

    def turned(vec, neumann):
        config = OFTConfig(r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=neumann)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8, bias=False)).double(), config)
        own = model.base_model.model[0]
        own.base_layer.weight.copy_(W)
        own.oft_R["default"].weight.copy_(vec)
        return model.merge_and_unload()[0].weight - W, config.to_dict()

    (exact, _), (series, _), (back, _) = turned(vec, False), turned(vec, True), turned(-vec, False)
    assert torch.allclose(series, back, atol=1e-4) and not torch.allclose(series, exact, atol=1e-2)
    want, config = turned(vec, neumann)
    config |= {"target_modules": ["proj_in"]}
    adapter(
        tmp_path,
        {"base_model.model.mid_block.attentions.0.proj_in.oft_R.weight": vec},
        json.loads(json.dumps(config, default=str)),
    )
    name = "unet.mid_block.attentions.0.proj_in"
    got = ours("sd15", tmp_path, {name: W})[name]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_peft_scales_a_lokr_of_two_whole_halves(tmp_path):
    """By alpha / r of a rank that it does not have; LyCORIS does not. We give each its own reading."""
    from peft import LoKrConfig, get_peft_model

    config = LoKrConfig(r=64, alpha=16, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 12, bias=False)).double(), config)
    own = model.base_model.model[0]
    w1, w2 = own.lokr_w1["default"], own.lokr_w2["default"]
    product, layer = torch.kron(w1, w2), "mid_block.attentions.0.proj_in"
    got = own.get_delta_weight("default")
    torch.testing.assert_close(got, product / 4, rtol=0, atol=1e-12)
    halves = {"lokr_w1": w1.clone(), "lokr_w2": w2.clone()}
    told = {"peft_type": "LOKR", "r": 64, "alpha": 16, "target_modules": ["proj_in"], "decompose_factor": -1}
    adapter(tmp_path, {f"base_model.model.{layer}.{k}": t for k, t in halves.items()}, told)
    assert_right("sd15", tmp_path, {f"unet.{layer}": product / 4})
    flat = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{flat}.{k}": t for k, t in halves.items()} | {f"{flat}.alpha": torch.tensor(16.0)}
    assert_right("sd15", tensors, {f"unet.{layer}": product})


# Video and music


_WHOLE = {  # {family: where its loader wants layers: (rows, columns)}, in the original's names
    "minimax_h3": {
        "diffusion_model.blocks.0.attn.qkv_proj": (36, 8),
        "diffusion_model.blocks.0.attn.out_proj": (8, 12),
        "diffusion_model.blocks.0.mlp.fc1": (48, 8),
        "diffusion_model.blocks.0.adaln_proj.linear": (24, 8),
        "diffusion_model.token_refiner.blocks.0.attn.qkv_proj": (36, 8),
        "diffusion_model.token_refiner.blocks.0.mlp.fc2": (8, 24),
        "diffusion_model.time_embedder.proj_in": (8, 4),
        "diffusion_model.final_layer.video_out": (4, 8),
    },
    "flux3": {
        "diffusion_model.single_blocks.0.q_proj": (12, 12),
        "diffusion_model.content_mode_blocks.image_cond.0.mlp_in": (72, 12),
        "diffusion_model.txt_mode_blocks.0.attn_out": (12, 12),
    },
    "ltx2": {
        "diffusion_model.transformer_blocks.0.audio_to_video_attn.to_q": (12, 12),
        "diffusion_model.patchify_proj": (12, 8),
        "text_embedding_projection.aggregate_embed": (8, 20),
    },
    "ace_step": {
        f"base_model.model.layers.0.{kind}_attn.{p}_proj": (12, 12) for kind in ("self", "cross") for p in "qkvo"
    },
}


@pytest.mark.parametrize("family", _WHOLE)
def test_files_of_video_and_music_are_read_as_diffusers_reads_them(family):
    """MiniMax H3's fused q, k and v, and its gate and value the other way round, among them."""
    tensors = {}
    for layer, (rows, columns) in _WHOLE[family].items():
        tensors |= lora(layer, rows, columns, dotted=True)[0]
    found, own = theirs(family, tensors), ours(family, tensors)
    assert {key.partition(".lora_")[0] for key in found} == {*own}
    assert not [layer for layer, delta in own.items() if not near(delta, dense(found, layer))]


def test_minimax_h3_s_rows_head_by_head_are_refused():
    """DiffSynth-Studio's, which its spelling alone tells; diffusers sorts them."""
    layer = "blocks.0.attn.qkv_proj"
    tensors, want = lora(layer, 3 * 256, 8, dotted=True)
    spelt = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    q = dense(theirs("minimax_h3", spelt), "transformer.transformer_blocks.0.attn.to_q")
    assert near(q, torch.cat([want[:128], want[384:512]]))
    with pytest.raises(CheckpointError, match=r"head by head.*qkv_proj\.lora_A\.default"):
        ours("minimax_h3", spelt)
    with pytest.raises(CheckpointError, match="head by head"):
        converters.convert(spelt, "/nowhere/x.safetensors", to="kohya", family="minimax_h3")


def test_hunyuan_video_15_is_written_for_comfyui_in_the_joint_layers_that_it_has(tmp_path):
    """The original has q, k and v apart, and so has what trainers save for kohya's programs."""
    apart = {
        key: t
        for p in "qkv"
        for key, t in lora(f"lora_unet_double_blocks_0_img_attn_{p}", 12, 12, alpha=2.0)[0].items()
    }
    apart |= lora("lora_unet_double_blocks_0_img_mlp_fc1", 48, 12, alpha=2.0)[0]
    save_file(apart, tmp_path / "a.safetensors")
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfyui", family="hunyuan_video15")
    written = load_file(tmp_path / "b.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in written if ".lora_" in key}
    assert layers == {"diffusion_model.double_blocks.0.img_attn_qkv", "diffusion_model.double_blocks.0.img_mlp.fc1"}
    for file in (tmp_path / "b.safetensors", {key.replace("attn_qkv", "attn.qkv"): t for key, t in written.items()}):
        assert_right("hunyuan_video15", file, ours("hunyuan_video15", apart))
    converters.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya", family="hunyuan_video15")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == apart.keys() and all(torch.equal(back[key], t) for key, t in apart.items())


def test_what_is_between_ltx_2_s_language_model_and_its_transformer_goes_out_and_in(tmp_path):
    """Its connectors, in one file with the transformer."""
    tensors = {}
    for layer, (rows, columns) in _WHOLE["ltx2"].items():
        tensors |= lora(layer, rows, columns, dotted=True)[0]
    save_file(tensors, tmp_path / "a.safetensors")
    for format in ("diffusers", "onetrainer", "comfyui"):
        converters.convert(tmp_path / "a.safetensors", tmp_path / f"{format}.safetensors", to=format)
        assert_right("ltx2", tmp_path / f"{format}.safetensors", ours("ltx2", tensors))
    converters.convert(tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors", to="comfyui")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], t) for key, t in tensors.items())

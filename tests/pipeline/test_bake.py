"""A baked pipeline has the weights that load_lora and fuse give, to the bit, and every other byte of the one it was made of."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    UnreadableFileError,
    UnsafeFileError,
    WrongBaseError,
)
from diffpeft.pipeline.bake import _variant, bake

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(fresh, tmp_path):
    """Saves a tiny pipeline; its folder."""

    def save(dtype=torch.float32, **options):
        fresh(dtype).save_pretrained(tmp_path / "model", **options)
        return tmp_path / "model"

    return save


def opened(folder, dtype, **options):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe):
    return {f"{name}.{k}": t for name in ("unet", "text_encoder") for k, t in getattr(pipe, name).state_dict().items()}


def fused(folder, dtype, adapters, **options):
    pipe = opened(folder, dtype, **options)
    for n, (file, weight) in enumerate(adapters):
        diffpeft.load_lora(pipe, file, name=f"a{n}", weight=weight)
    diffpeft.fuse(pipe)
    return {k: t.clone() for k, t in weights(pipe).items() if ".adapters." not in k}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_the_weights_are_those_that_fuse_gives(dtype, strength, saved, adapter, tmp_path):
    model, lora = saved(dtype), adapter()
    before = files(model)
    assert bake(model, [(lora, strength)], tmp_path / "out") == {"unet": 2, "text_encoder": 2}
    assert equal(weights(opened(tmp_path / "out", dtype)), fused(model, dtype, [(lora, strength)]))
    assert files(model) == before


METHODS = {
    "lora": diffpeft.LoraConfig(r=3, lora_alpha=2),
    "loha": diffpeft.LoHaConfig(r=2),
    "lokr": diffpeft.LoKrConfig(r=2, decompose_both=True),
    "oft": diffpeft.OFTConfig(r=0, oft_block_size=4),
    "dora": diffpeft.LoraConfig(r=2, use_dora=True),
}
TARGETS = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "layers.1.mlp.fc1")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_any_order(method, saved, fresh, adapter, randomize, tmp_path):
    """Where methods do not commute the order counts, as it does for load_lora."""
    model, dtype = saved(), torch.float32
    pipe = fresh()
    side = {"side": "output"} if method == "oft" else {}  # Kohya's
    diffpeft.attach(pipe, METHODS[method], targets=TARGETS, **side)
    randomize(pipe, dtype=torch.float32)
    diffpeft.save_lora(pipe, tmp_path / "m.safetensors", format="kohya")
    for adapters in (
        [(tmp_path / "m.safetensors", 0.6), (adapter(), 0.8)],
        [(adapter(), 0.8), (tmp_path / "m.safetensors", 0.6)],
    ):
        bake(model, adapters, tmp_path / "out")
        assert equal(weights(opened(tmp_path / "out", dtype)), fused(model, dtype, adapters))
        for file in sorted((tmp_path / "out").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


def test_biases_and_norms_are_written_too(saved, tmp_path):
    model = saved()
    tensors = {
        "lora_unet_conv_in.diff": torch.randn(16, 4, 3, 3),
        "lora_unet_conv_in.diff_b": torch.randn(16),
        "lora_unet_conv_norm_out.w_norm": torch.randn(16),
        "lora_unet_conv_norm_out.b_norm": torch.randn(16),
    }
    save_file(tensors, tmp_path / "d.safetensors")
    bake(model, [(tmp_path / "d.safetensors", 0.5)], tmp_path / "out")
    got, base = load_file(tmp_path / "out" / UNET), load_file(model / UNET)
    changed = {k for k in base if not torch.equal(got[k], base[k])}
    assert changed == {"conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "conv_norm_out.bias"}
    want = fused(model, torch.float32, [(tmp_path / "d.safetensors", 0.5)])
    assert all(torch.equal(want[f"unet.{k}"], got[k]) for k in changed)


def test_all_other_bytes_stay(saved, adapter, tmp_path):
    model = saved()
    (model / "README.md").write_text("about")
    bake(model, [(adapter(), 1.0)], tmp_path / "out")
    before, after = files(model), files(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {k for k in before if before[k] != after[k]}
    assert changed == {UNET, "text_encoder/model.safetensors"}
    for file in changed:
        a, b = load_file(model / file), load_file(tmp_path / "out" / file)
        assert sum(not torch.equal(a[k], b[k]) for k in a) == 2
        length = 8 + int.from_bytes(before[file][:8], "little")
        assert before[file][:length] == after[file][:length]


def test_strength_0_changes_nothing(saved, adapter, tmp_path):
    model = saved()
    assert bake(model, [(adapter(), 0.0)], tmp_path / "out") == {}
    assert files(model) == files(tmp_path / "out")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_keep_their_names_and_index(variant, saved, adapter, tmp_path):
    model, lora = saved(torch.float16, max_shard_size="100KB", variant=variant), adapter()
    assert len([*(model / "unet").glob("*-of-*")]) > 2 and len([*(model / "unet").glob("*.index*.json")]) == 1
    bake(model, [(lora, 0.8)], tmp_path / "out", variant=variant)
    assert files(model).keys() == files(tmp_path / "out").keys()
    options = {"variant": variant} if variant else {}
    got = weights(opened(tmp_path / "out", torch.float16, **options))
    assert equal(got, fused(model, torch.float16, [(lora, 0.8)], **options))


def test_a_variant_and_what_is_beside_it(saved, adapter, tmp_path):
    """Files of other variants and containers would be the model without the adapter, so they stay behind."""
    model = saved()
    saved(torch.float16, variant="fp16")
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (model / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    bake(model, [(adapter(), 1.0)], tmp_path / "out", variant="fp16")
    names = {name for name in files(tmp_path / "out") if "safetensors" in name or "bin" in name}
    assert names == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    (model / UNET).unlink()
    with pytest.raises(CheckpointError, match="--variant fp16"):
        bake(model, [(adapter(), 1.0)], tmp_path / "out2")
    with pytest.raises(CheckpointError, match="bf16"):
        bake(saved(), [(adapter(), 1.0)], tmp_path / "out2", variant="bf16")


@pytest.mark.parametrize(
    ("name", "variant"),
    {
        "model.safetensors": "",
        "model.fp16.safetensors": "fp16",
        "model-00001-of-00002.safetensors": "",
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "model-00001-of-00002.fp16.safetensors": "fp16",
        "model.safetensors.index.json": "",
        "model.safetensors.index.fp16.json": "fp16",
        "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
        "config.json": None,
        "model.bin": None,
    }.items(),
)
def test_variants_by_file_name(name, variant, tmp_path):
    assert _variant(tmp_path / name) == variant


def test_both_spellings_of_clips_names(saved, adapter, tmp_path):
    model, lora = saved(), adapter()
    file = model / "text_encoder" / "model.safetensors"
    old = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in load_file(file).items()}
    new = {k.removeprefix("text_model."): t for k, t in old.items()}
    for n, tensors in enumerate((old, new)):
        save_file(tensors, file, metadata={"format": "pt"})
        bake(model, [(lora, 1.0)], tmp_path / f"out{n}")
        assert equal(weights(opened(tmp_path / f"out{n}", torch.float32)), fused(model, torch.float32, [(lora, 1.0)]))


def test_transformers_and_several_text_encoders(tmp_path, randomize):
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=9
    )
    parts = {
        "transformer": SD3Transformer2DModel(
            sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=16, pooled_projection_dim=64,
        ),
        "text_encoder": CLIPTextModelWithProjection(clip),
        "text_encoder_3": T5EncoderModel(T5Config(vocab_size=9, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
    }  # fmt: skip
    index = {"_class_name": "StableDiffusion3Pipeline", "tokenizer": [None, None]}
    for name, model in parts.items():
        model.save_pretrained(tmp_path / "model" / name)
        index[name] = ["diffusers" if name == "transformer" else "transformers", type(model).__name__]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    pipe = type("StableDiffusion3Pipeline", (), {**parts, "components": parts})()
    diffpeft.attach(pipe, diffpeft.LoraConfig(r=2), targets=["to_q", "fc1", "wo"])
    randomize(pipe, dtype=torch.float32)
    diffpeft.save_lora(pipe, tmp_path / "a.safetensors", format="kohya")
    diffpeft.unload(pipe)
    layers = bake(tmp_path / "model", [(tmp_path / "a.safetensors", 0.5)], tmp_path / "out")
    # Kohya joins q, k and v
    assert layers == {"transformer": 6, "text_encoder": 1, "text_encoder_3": 2}
    diffpeft.load_lora(pipe, tmp_path / "a.safetensors", weight=0.5)
    diffpeft.fuse(pipe)
    for name, model in parts.items():
        got, want = type(model).from_pretrained(tmp_path / "out" / name).state_dict(), model.state_dict()
        assert all(torch.equal(t, want[k]) for k, t in got.items())


@pytest.mark.filterwarnings("ignore:.*whole differences")
def test_a_fused_layer_that_does_not_come_apart_needs_the_weights(tmp_path):
    """Output-side rotations with a common bound mix the rows of q, k and v: worked out from the base, as load_lora does."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model" / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    for name, alpha in (("bounded", 0.001), ("free", 0.0)):
        layer = "lora_unet_double_blocks_0_img_attn_qkv"
        tensors = {
            f"{layer}.oft_blocks": torch.randn(6, 8, 8) * 0.2,
            f"{layer}.alpha": torch.tensor(alpha),
            "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.randn(2, 16),
            "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.randn(112, 2),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
        bake(tmp_path / "model", [(tmp_path / f"{name}.safetensors", 0.7)], tmp_path / name)
        got = FluxTransformer2DModel.from_pretrained(tmp_path / name / "transformer").state_dict()
        other = FluxTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
        diffpeft.load_lora(other, tmp_path / f"{name}.safetensors", weight=0.7)
        diffpeft.fuse(other)
        want = other.state_dict()
        assert len(got) > 20 and all(torch.equal(t, want[k]) for k, t in got.items())
        base = model.state_dict()
        assert sum(not torch.equal(t, base[k]) for k, t in got.items()) == 7


# ---- refusals, after which nothing was written


def refuses(error, says, tmp_path, *args, **kwargs):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        bake(*args, **kwargs)
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_cannot_be_written(saved, adapter, tmp_path):
    model, lora = saved(), [(adapter(), 1.0)]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    refuses(ConfigError, "already", tmp_path, model, lora, tmp_path / "full")
    refuses(ConfigError, "already", tmp_path, model, lora, tmp_path / "file")
    refuses(ConfigError, "model itself", tmp_path, model, lora, model)
    refuses(ConfigError, "model itself", tmp_path, model, lora, model / "unet" / "new")
    (tmp_path / "empty").mkdir()
    bake(model, lora, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_models_that_cannot_be_read(saved, adapter, tmp_path):
    model, lora, out = saved(), [(adapter(), 1.0)], tmp_path / "out"
    refuses(CheckpointError, "single file", tmp_path, model / UNET, lora, out)
    refuses(CheckpointError, "no such model", tmp_path, tmp_path / "modle", lora, out)
    refuses(CheckpointError, "not on this machine", tmp_path, "someone/something", lora, out)
    refuses(CheckpointError, "model_index", tmp_path, model / "unet", lora, out)
    good = (model / UNET).read_bytes()
    (model / UNET).write_bytes(good[:-5])
    refuses(UnreadableFileError, "unet", tmp_path, model, lora, out)
    (model / UNET).unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refuses(UnsafeFileError, "pickle", tmp_path, model, lora, out)
    (model / "unet" / "diffusion_pytorch_model.bin").unlink()
    tensors = {k: t for k, t in load_bytes(good).items() if k != "conv_in.weight"}
    save_file(tensors, model / UNET)
    refuses(CheckpointError, "conv_in", tmp_path, model, lora, out)
    save_file(tensors | {"conv_in.weight": torch.zeros(16, 5, 3, 3)}, model / UNET)
    refuses(ShapeMismatchError, "conv_in", tmp_path, model, lora, out)
    save_file(tensors | {"conv_in.weight": torch.zeros(16, 4, 3, 3).to(torch.float8_e4m3fn)}, model / UNET)
    refuses(AdapterStateError, "F8", tmp_path, model, lora, out)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "UNet"]}))
    refuses(CheckpointError, "mine.UNet", tmp_path, model, lora, out)
    (model / "model_index.json").write_text("{")
    refuses(UnreadableFileError, "model_index", tmp_path, model, lora, out)


def load_bytes(data):
    from safetensors.torch import load

    return load(data)


def test_names_in_the_index_lead_nowhere_else(saved, adapter, tmp_path):
    model = saved()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").touch()
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"../secret": ["a", "b"], "odd": 3, "pair": ["a"]}))
    bake(model, [(adapter(), 1.0)], tmp_path / "deep" / "out")
    assert [*(tmp_path / "deep").iterdir()] == [tmp_path / "deep" / "out"]


def test_a_missing_shard(saved, adapter, tmp_path):
    model = saved(max_shard_size="100KB")
    next((model / "unet").glob("*-00002-of-*")).unlink()
    refuses(UnreadableFileError, "00002", tmp_path, model, [(adapter(), 1.0)], tmp_path / "out")


def test_adapters_that_do_not_fit(saved, adapter, tmp_path):
    model, out = saved(), tmp_path / "out"
    pair = {"lora_down.weight": torch.zeros(2, 32), "lora_up.weight": torch.zeros(32, 2)}
    sdxl = {f"lora_unet_input_blocks_4_1_proj_in.{k}": v for k, v in pair.items()}
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    refuses(WrongBaseError, "sdxl", tmp_path, model, [(tmp_path / "sdxl.safetensors", 1.0)], out)
    lost = {f"lora_unet_down_blocks_3_resnets_0_conv1.{k}": v for k, v in pair.items()}
    save_file(lost, tmp_path / "lost.safetensors")
    refuses(UnknownKeysError, "down_blocks.3", tmp_path, model, [(tmp_path / "lost.safetensors", 1.0)], out)
    good = adapter()
    bad = {k: torch.full_like(t, float("nan")) if "up" in k else t for k, t in load_file(good).items()}
    save_file(bad, tmp_path / "nan.safetensors")
    refuses(NonFiniteError, "finite", tmp_path, model, [(good, 1.0), (tmp_path / "nan.safetensors", 1.0)], out)
    refuses(NonFiniteError, "finite", tmp_path, model, [(good, 3e38)], out)
    refuses(ConfigError, "strength", tmp_path, model, [(good, 1e300)], out)
    refuses(ConfigError, "strength", tmp_path, model, [(good, float("nan"))], out)


def test_a_failure_while_writing_leaves_nothing(saved, adapter, tmp_path):
    model, lora = saved(), adapter()

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    refuses(KeyboardInterrupt, None, tmp_path, model, [(lora, 1.0)], tmp_path / "out", told=stop)


@pytest.mark.slow
def test_memory_holds_one_layer(tmp_path):
    """A UNet of 190 MB in a process of its own: what it needs beyond imports and a small model is far less."""
    code = """
import sys, resource, torch
from diffpeft.pipeline.bake import bake
bake(sys.argv[1], [(sys.argv[3], 1.0)], sys.argv[1] + "-out")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bake(sys.argv[2], [(sys.argv[4], 1.0)], sys.argv[2] + "-out")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    from diffusers import UNet2DConditionModel

    args = []
    for name, width in (("small", 16), ("large", 384)):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(width, width),
            layers_per_block=2,
            norm_num_groups=8,
            cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        unet.save_pretrained(tmp_path / name / "unet")
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        diffpeft.attach(unet, diffpeft.LoraConfig(r=1), targets="full")
        diffpeft.save_lora(unet, tmp_path / f"{name}.safetensors", format="kohya")
        args.append(tmp_path / name)
    size = (tmp_path / "large" / UNET).stat().st_size >> 20
    command = [sys.executable, "-c", code, *map(str, args), *(f"{a}.safetensors" for a in args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 100 and int(done.stdout) < size / 3, (size, done.stdout)

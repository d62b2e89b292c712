"""Denoisers in files of few bits: 8-bit numbers with scales in both of ComfyUI's spellings, names of the model's own or original ones, and GGUF."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import save_file

from diffpeft import CheckpointError, ConfigError, TrainConfig
from diffpeft.layers.packed import PackedLinear
from diffpeft.layers.streaming import stream_of
from diffpeft.pipeline.open import open_parts
from diffpeft.train import dreambooth
from diffpeft.train.save import save
from tests.families.pipelines import pipeline
from tests.single_file import original
from tests.train.pictures import photos_in

SLOW = pytest.mark.slow
BLOCKS = ("transformer_blocks.", "layers.", "attentions.", "transformer_options")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    photos_in(folder)
    for kind in ("flux dev", "z_image", "sd15"):
        pipe = pipeline(kind, torch.float32)
        pipe.save_pretrained(folder / kind)
        shutil.copytree(folder / kind, folder / f"{kind} base", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def original_z_image(state):
    """Z-Image as its authors name it: q, k and v in one."""
    tensors = {}
    for name, t in state.items():
        if ".to_q." in name:
            parts = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            tensors[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            name = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
            tensors[name.replace("to_out.0", "out").replace("norm_k", "k_norm").replace("norm_q", "q_norm")] = t
    return {f"model.diffusion_model.{name}": t for name, t in tensors.items()}


def in_8_bits(tensors, spelling, dtype=torch.float8_e4m3fn):
    """Weights of blocks in 8 bits, with scales as one of ComfyUI's spellings has them; the file, and what its numbers stand for."""
    file, stands = {}, {}
    if spelling == "scale_weight":
        file["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    for i, (name, t) in enumerate(sorted(tensors.items())):
        if t.dim() != 2 or not name.endswith(".weight") or not any(b in name for b in BLOCKS):
            file[name] = stands[name] = t.contiguous()
            continue
        largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = t.abs().amax(1) / largest if spelling == "rows" else t.abs().max() / largest
        scale = torch.ones(()) if spelling == "none" else scale * (1 + i % 3)
        units = t / scale.reshape(-1, 1)
        file[name] = units.round().to(dtype) if dtype == torch.int8 else units.to(dtype)
        stands[name] = file[name].float() * scale.reshape(-1, 1)
        layer = name.removesuffix(".weight")
        if spelling == "scale_weight":
            file |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        elif spelling != "none":
            said = {"format": "int8_tensorwise" if dtype == torch.int8 else str(dtype).removeprefix("torch.")}
            file |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.ones(())}
            file[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return file, stands


CASES = [
    ("flux dev", "scale_weight", torch.float8_e4m3fn),
    ("flux dev", "rows", torch.float8_e4m3fn),
    ("flux dev", "none", torch.float8_e5m2),
    ("flux dev", "weight_scale", torch.int8),
    ("z_image", "scale_weight", torch.float8_e4m3fn),
    ("sd15", "weight_scale", torch.float8_e4m3fn),
]


@pytest.mark.parametrize("kind, spelling, dtype", CASES)
def test_a_file_in_8_bits_is_what_its_numbers_stand_for(kind, spelling, dtype, folder, tmp_path):
    pipe = pipeline(kind, torch.float32)
    part = "unet" if kind == "sd15" else "transformer"
    state = getattr(pipe, part).state_dict()
    tensors = {"flux dev": lambda: state, "z_image": lambda: original_z_image(state)}.get(kind, lambda: unet_of(pipe))()
    file, stands = in_8_bits(tensors, spelling, dtype)
    save_file({name: t.contiguous() for name, t in file.items()}, tmp_path / "few.safetensors")
    save_file({name: t.contiguous() for name, t in stands.items()}, tmp_path / "plain.safetensors")
    few, plain = (
        open_parts(str(tmp_path / f"{name}.safetensors"), str(folder / f"{kind} base"))(part)
        for name in ("few", "plain")
    )
    layers = {name: m for name, m in few.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) >= 10
    for name, t in plain.state_dict().items():
        layer, _, last = name.rpartition(".")
        found = layers[layer].unpacked() if last == "weight" and layer in layers else few.state_dict()[name]
        torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-9, msg=name)
    assert not any(p.is_meta for p in few.parameters())


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["z_image", pytest.param("flux dev", marks=SLOW)])
def test_a_denoiser_alone_takes_the_others_from_a_base_that_has_them(kind, folder, tmp_path):
    state = pipeline(kind, torch.float32).transformer.state_dict()
    files = {"few": in_8_bits(state, "scale_weight")[0], "plain": state}
    for name, file in files.items():
        save_file({key: t.contiguous() for key, t in file.items()}, path := tmp_path / f"{name}.safetensors")
        parts, whole = open_parts(str(path), str(folder / kind)), open_parts(str(folder / kind))
        for component in ("vae", "text_encoder"):
            torch.testing.assert_close(weights(parts(component)), weights(whole(component)), rtol=0, atol=0)
        with pytest.raises(CheckpointError, match="no vae, and its base has no weights"):
            open_parts(str(path), str(folder / f"{kind} base"))("vae")


def test_a_file_of_one_of_two_denoisers_is_of_the_one_that_is_said(tmp_path):
    pipe = pipeline("wan, two experts", torch.float32)
    pipe.save_pretrained(tmp_path / "base")
    mine = {name: t + 1 for name, t in pipe.transformer.state_dict().items()}
    save_file(mine, path := tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="its base has two"):
        open_parts(str(path), str(tmp_path / "base"))
    for denoiser, other in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
        parts = open_parts(str(path), str(tmp_path / "base"), denoiser=denoiser)
        torch.testing.assert_close(weights(parts(denoiser)), mine, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights(parts(other)), weights(getattr(pipe, other)), rtol=0, atol=0)


def unet_of(pipe):
    return {name: t for name, t in original(pipe).items() if name.startswith("model.diffusion_model.")}


def test_formats_that_are_not_known_are_refused(folder, tmp_path):
    state = pipeline("flux dev", torch.float32).transformer.state_dict()
    file, _ = in_8_bits(state, "weight_scale")
    name = next(name for name in file if name.endswith(".comfy_quant"))
    for said, words in (({"format": "nvfp4"}, "nvfp4"), ({"format": "int8_tensorwise", "convrot": True}, "rotations")):
        file[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        save_file(file, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            open_parts(str(tmp_path / "model.safetensors"), str(folder / "flux dev base"))("transformer")
    file[name.replace("comfy_quant", "weight_scale")] = torch.ones(3)
    file[name] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(file, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="scales"):
        open_parts(str(tmp_path / "model.safetensors"), str(folder / "flux dev base"))("transformer")


def written_gguf(tensors, path, kind):
    """A GGUF file: weights of blocks in a kind, all else in fp32; and what its numbers stand for."""
    writer, stands = gguf.GGUFWriter(path, "flux"), {}
    for name, t in tensors.items():
        numbers = t.float().numpy()
        if t.dim() == 2 and "transformer_blocks." in name and t.shape[1] % 32 == 0:
            data = gguf.quants.quantize(numbers, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            stands[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
        else:
            writer.add_tensor(name, numbers)
            stands[name] = t
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("Q4_0", marks=SLOW), pytest.param("BF16", marks=SLOW)])
def test_a_gguf_file_is_trained_on_in_its_bits(kind, folder, tmp_path):
    code = getattr(gguf.GGMLQuantizationType, kind)
    state = pipeline("flux dev", torch.float32).transformer.state_dict()
    stands = written_gguf(state, tmp_path / "model.gguf", code)
    save_file({name: t.contiguous() for name, t in stands.items()}, tmp_path / "plain.safetensors")
    run, files = trained(
        folder, tmp_path / "model.gguf", tmp_path / "a", base=folder / "flux dev", offload=0.5, heldout="1"
    )
    model = run.family.pipe.transformer
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) >= 10 and stream_of(model).blocks
    for name, layer in layers.items():  # the scales of blocks are fp16; diffusers multiplies in that
        torch.testing.assert_close(layer.unpacked(), stands[f"{name}.weight"], rtol=2**-10, atol=1e-6)
    assert layers[name].packing.name == f"gguf {kind}"
    assert files


def trained(folder, model, out, base, **options):
    usual = {
        "data": str(folder / "photos"),
        "instance_prompt": "x",
        "resolution": 64,
        "steps": 2,
        "rank": 2,
        "lr": 1e-2,
    }
    usual |= {"model": str(model), "base": str(base), "out": str(out), "log": "none", "sample_every": 0}
    run = dreambooth.train(TrainConfig(**usual | options))
    return run, save(run)


def test_a_text_encoder_with_scales_is_the_numbers_that_it_stands_for(folder, tmp_path):
    encoder = pipeline("flux dev", torch.float32).text_encoder_2
    state = {name: t for name, t in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    file, stands = in_8_bits({f"layers.{name}": t for name, t in state.items()}, "scale_weight")
    named = {(n if n == "scaled_fp8" else n.removeprefix("layers.")): t.contiguous() for n, t in file.items()}
    save_file(named, tmp_path / "t5.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    base, encoders = str(folder / "flux dev base"), [str(tmp_path / "t5.safetensors")]
    parts = open_parts(str(tmp_path / "model.safetensors"), base, text_encoders=encoders)
    for name, t in parts("text_encoder_2").state_dict().items():
        if f"layers.{name}" in stands:
            torch.testing.assert_close(t, stands[f"layers.{name}"], rtol=1e-6, atol=1e-9, msg=name)

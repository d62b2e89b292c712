"""inspect: from the header, without torch; norms, dead layers and NaN on request."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from diffpeft import CheckpointError, converters
from diffpeft.cli import cli
from diffpeft.converters.detection import _said
from diffpeft.converters.inspection import block_of, by_block
from diffpeft.converters.readers import readers

LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def file(tmp_path):
    """A LoRA without alpha, a LoKr with alpha 0, a LoHa with a factor of zeros and a DoRA with NaN."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    tensors = {
        f"{LAYER}.lora_down.weight": new(4, 768),
        f"{LAYER}.lora_up.weight": new(320, 4),
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w1": new(4, 4).half(),
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w2_a": new(8, 2).half(),
        "lora_unet_mid_block_attentions_0_proj_in.lokr_w2_b": new(2, 8).half(),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(0, dtype=torch.int64),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.hada_w1_a": new(9, 3),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.hada_w1_b": new(3, 5),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.hada_w2_a": new(9, 3),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.hada_w2_b": torch.zeros(3, 5),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.alpha": torch.tensor(1.5, dtype=torch.bfloat16),
        "lora_unet_conv_in.lora_down.weight": torch.full((2, 4, 3, 3), float("nan")),
        "lora_unet_conv_in.lora_up.weight": new(8, 2, 1, 1),
        "lora_unet_conv_in.dora_scale": new(8, 1, 1, 1),
        "emb_params": new(2, 768),
    }
    path = tmp_path / "style.safetensors"
    save_file(tensors, path, {"modelspec.trigger_phrase": "sks dog, sks cat"})
    return path


def test_the_header_tells_what_a_file_is(file):
    found = converters.inspect(file)
    assert (found.format, found.family) == ("kohya", "sd15")
    assert found.methods == ("dora", "loha", "lokr", "lora")
    assert found.components == ("unet", "text_encoder") and (found.layers, found.tensors) == (4, 15)
    assert found.ranks == {2: 2, 3: 1, 4: 1} and found.alphas == {None: 2, 0.0: 1, 1.5: 1}
    assert found.carried == ("emb_params",) and found.trigger_words == ("sks dog", "sks cat")
    assert "A1111" in found.readable_by and "diffusers" not in found.readable_by
    assert found.blocks["unet.down_blocks_1"] == 1 and found.norms is found.dead is found.nonfinite is None


def test_norms_dead_layers_and_nan_are_found_on_request(file):
    found = converters.inspect(file, norms=True)
    own = converters.inspection.io.header(file)[0]
    factors = [t for key, t in own.items() if key.startswith(LAYER)]
    want = sum(converters.inspection.io.load([t])[0].double().square().sum() for t in factors).sqrt().item()
    assert found.norms[f"unet.{LAYER.removeprefix('lora_unet_')}"] == pytest.approx(want, rel=1e-12)
    assert found.dead == ("unet.mid_block_attentions_0_proj_in", "text_encoder.text_model_encoder_layers_3_mlp_fc1")
    assert found.nonfinite == ("unet.conv_in",)


SAID = {
    "hunyuan-image-2.1/lora": "hunyuan_image",
    "anima-preview/lora": "cosmos",
    "Krea-2/lora": "krea2",
    "krea2": "krea2",
    "Ideogram-4/lora": "ideogram4",
    "ideogram4": "ideogram4",
    "omnigen2": "omnigen2",
    "qwen-image-2.1": "qwen_image21",
    "Qwen-Image-2512": "qwen_image",
    "prx_pixel": "prx",
    "ernie-image/lora": "ernie_image",
    "cogview4": "cogview4",
}


@pytest.mark.parametrize("said", SAID)
def test_metadata_name_families_as_programs_do(said):
    assert _said({"modelspec.architecture": said}) == (SAID[said],) == _said({"ss_base_model_version": said.lower()})


def test_a_dict_of_tensors_can_be_inspected():
    found = converters.inspect(
        {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)},
        norms=True,
    )
    assert found.format == "diffusers" and found.norms == {"unet.conv_in": pytest.approx((72 + 16) ** 0.5)}


def test_blocks_of_layers():
    assert block_of("unet.down_blocks_1_attentions_0_proj_in") == "unet.down_blocks_1"
    assert block_of("unet.mid_block.attentions.0.proj_in") == "unet.mid_block"
    assert block_of("unet.conv_in") == "unet.conv_in"
    assert by_block({"unet.down_blocks.1.a": 3.0, "unet.down_blocks.1.b": 4.0}) == {"unet.down_blocks.1": 5.0}


def test_the_command_prints_it_for_people_and_as_json(file):
    text = CliRunner().invoke(cli, ["inspect", str(file), "--norms"])
    assert text.exit_code == 0
    for said in ("kohya", "sd15", "sks dog", "lokr", "█", "dead layers", "unet.conv_in", "emb_params"):
        assert said in text.output
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(file), str(file), "--json", "--norms"]).output)
    assert (
        len(found) == 2 and found[0]["ranks"] == {"2": 2, "3": 1, "4": 1} and found[0]["norms"]["unet.conv_in"] == "nan"
    )


def test_a_file_that_is_none_is_said(tmp_path):
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError):
        converters.inspect(tmp_path / "page.safetensors")


def test_without_norms_no_torch_is_imported(file):
    code = f"import sys, converters; converters.inspect({str(file)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_diffusers_reads_the_magnitudes_of_a_dora_in_its_own_format_only():
    assert "diffusers" in readers("kohya", {"lora"}) and "diffusers" in readers("diffusers", {"lora", "dora"})
    assert "diffusers" not in readers("kohya", {"dora"}) and "ComfyUI" in readers("kohya", {"lora", "dora"})


def test_programs_are_named_for_the_families_and_methods_that_they_know():
    assert "A1111" in readers("kohya", {"lora"}, "sdxl") and "A1111" not in readers("kohya", {"lora"}, "flux")
    assert "A1111" not in readers("kohya-diffusers", {"lokr"}, "flux") and "sd-scripts" in readers(
        "kohya", {"lora"}, "flux"
    )
    assert "sd-scripts" not in readers("kohya", {"dora"}, "sdxl") and "sd-scripts" not in readers(
        "kohya", {"lora"}, "wan"
    )
    assert "sd-scripts" in readers("kohya-diffusers", {"lora"}, "sd15")  # its own names there
    assert "sd-scripts" not in readers("kohya-diffusers", {"lora"}, "sdxl")
    assert readers("diffusers", {"dora"}, "flux") == ("diffusers",)  # others load no magnitudes there


def test_programs_read_what_they_have_of_later_families():
    assert readers("kohya", {"lora"}, "cosmos") == ("sd-scripts", "ComfyUI")  # Anima
    assert readers("kohya", {"lora"}, "hunyuan_image") == ("sd-scripts",)
    assert readers("diffusers", {"lora"}, "krea2") == ("diffusers", "ComfyUI")
    assert readers("diffusers", {"lora"}, "ideogram4") == ("diffusers",)
    assert readers("onetrainer", {"lora"}, "ernie_image") == ("OneTrainer", "ComfyUI")
    assert readers("onetrainer", {"lora"}, "auraflow") == ("ComfyUI",) and readers("onetrainer", {"lora"}, "wan") == ()
    assert (
        readers("kohya", {"lora"}, "bria_fibo") == () == readers("diffusers", {"lora"}, "bria")
    )  # no load_lora_weights
    assert readers("diffusers", {"lora"}, "bria_fibo") == ("diffusers",)
    assert readers("peft", {"loha"}, "prx") == ("PEFT",) and readers("lycoris", {"loha"}, "prx") == ("LyCORIS",)


@pytest.mark.parametrize("width, family", [(768, "sd15"), (1024, "sd2")])
@pytest.mark.parametrize(
    "shapes",
    [
        lambda width: {"lora_down.weight": (4, width), "lora_up.weight": (320, 4)},
        lambda width: {"lokr_w1": (8, 8), "lokr_w2_a": (40, 2), "lokr_w2_b": (2, width // 8)},
        lambda width: {"hada_w1_a": (320, 2), "hada_w1_b": (2, width), "hada_w2_a": (320, 2), "hada_w2_b": (2, width)},
        lambda width: {"diff": (320, width)},
    ],
)
def test_the_width_of_the_cross_attention_tells_stable_diffusions_apart_in_every_method(shapes, width, family):
    tensors = {f"{LAYER}.{role}": torch.randn(*shape) for role, shape in shapes(width).items()}
    assert converters.detect(tensors).family == converters.inspect(tensors).family == family

"""Files whose shapes mean nothing: each kind is refused by name, and inspection says what it can."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffpeft import converters, load_lora, unload
from diffpeft.errors import CheckpointError, DiffpeftError
from tests.robustness.seeds import unet

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
ORIGINAL = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
LORA = {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2)}
TUCKER = {"hada_w1_a": (2, 32), "hada_w1_b": (2, 32), "hada_w2_a": (2, 32), "hada_w2_b": (2, 32)}
BAD = {  # tensors of a layer: what the message names
    "a factor without axes": ({**LORA, "lora_down.weight": ()}, "lora_A"),
    "a factor of one axis": ({**LORA, "lora_up.weight": (64,)}, "lora_B"),
    "an alpha of many numbers": ({**LORA, "alpha": (4, 32)}, "alpha"),
    "a magnitude without its layer's rows": ({**LORA, "dora_scale": (3, 1)}, "dora_scale"),
    "PEFT's magnitude of another layer": ({**LORA, "lora_magnitude_vector": (3,)}, "lora_magnitude_vector"),
    "rotations of two axes": ({"oft_blocks": (8, 4)}, "oft_blocks"),
    "rotations of six axes": ({"oft_blocks": (8, 4, 4, 1, 1, 1)}, "oft_blocks"),
    "a product of a vector": ({"hada_w1_a": (64,), **{k: (2, 32) for k in list(TUCKER)[1:]}}, "hada_w1_a"),
    "cores of two kernels": ({**TUCKER, "hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 1, 1)}, "hada_t"),
    "a kernel in the core and outside": (
        {"lora_down.weight": (2, 32, 3, 3), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (32, 2, 1, 1)},
        "lora_mid",
    ),
    "a half of a Kronecker product": ({"lokr_w1": (4,), "lokr_w2": (8, 8)}, "lokr_w1"),
    "a scale alone": ({"rescale": (32, 1)}, "rescale"),
    "an alpha alone": ({"alpha": ()}, "alpha"),
    "tensors without numbers": ({"lora_down.weight": (2, 0), "lora_up.weight": (0, 2)}, "lora"),
}


@pytest.fixture(scope="module")
def model():
    return unet()


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("layer", [LAYER, CONV, ORIGINAL])
def test_shapes_that_mean_nothing_are_refused_by_file_and_tensor(layer, case, model, tmp_path):
    shapes, named = BAD[case]
    path = tmp_path / "bad.safetensors"
    save_file({f"{layer}.{end}": torch.ones(shape) for end, shape in shapes.items()}, path)
    for operation in (converters.detect, converters.inspect):
        try:
            operation(path)
        except DiffpeftError as error:
            assert str(path) in str(error)
    for operation in (
        converters.read,
        lambda p: converters.convert(p, tmp_path / "out.safetensors", to="kohya-diffusers"),
        lambda p: load_lora(model, p, name="a"),
    ):
        with pytest.raises(CheckpointError) as caught:
            operation(path)
        assert str(path) in str(caught.value) and named in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.int64])
def test_factors_are_floating_point_numbers_of_16_bits_or_more(dtype, model, tmp_path):
    tensors = {f"{LAYER}.{end}": torch.ones(shape).to(dtype) for end, shape in LORA.items()}
    with pytest.raises(CheckpointError, match="floating point"):
        load_lora(model, tensors, name="a")
    switch = {f"{LAYER}.weight": torch.ones(32), f"{LAYER}.on_input": torch.tensor(1.0).to(torch.float8_e5m2)}
    with pytest.raises(CheckpointError, match="floating point"):
        load_lora(model, switch, name="a")


def test_what_two_formats_read_otherwise_is_not_written(tmp_path):
    """A key that is nobody's in one format must not become an adapter's in another."""
    tensors = {f"{LAYER}.{end}": torch.ones(shape) for end, shape in LORA.items()}
    tensors["base_model.model.conv_in.lora_A.weight"] = torch.ones(2, 4, 3, 3)
    save_file(tensors, tmp_path / "x.safetensors")
    assert converters.read(tmp_path / "x.safetensors").carried
    with pytest.raises(converters.writing.CannotConvertError, match=r"base_model\.model\.conv_in\.lora_A"):
        converters.convert(tmp_path / "x.safetensors", tmp_path / "y", to="peft")


FIELDS = {"r": 0, "lora_alpha": 10**400, "use_dora": "no", "target_modules": 5, "rank_pattern": [1], "peft_type": []}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field_is_named_with_its_file(field, model, tmp_path):
    save_file(
        {
            "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 32),
            "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(32, 2),
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_lora(model, tmp_path, name="a")
    unload(model)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: FIELDS[field]}))
    for operation in (converters.read, lambda p: load_lora(model, p, name="a")):
        with pytest.raises(CheckpointError, match=f"{field} is ") as caught:
            operation(tmp_path)
        assert str(tmp_path) in str(caught.value) and "adapter_config.json" in str(caught.value)

"""Numbers that are not finite: what computes with them refuses, what only carries them keeps their bytes, and nothing makes new ones."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import CannotConvertError, NonFiniteError

KOHYA = "lora_unet_mid_block_attentions_0_proj_out"
LAYER = "unet.mid_block.attentions.0.proj_out"
FORMS = {  # of a layer [8, 8]: roles and shapes in sd-scripts' and LyCORIS's names, and one of them that is spoilt
    "lora": ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}, "lora_up.weight"),
    "lora's alpha": ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}, "alpha"),
    "loha": ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}, "hada_w2_a"),
    "lokr": ({"lokr_w1": (2, 2), "lokr_w2": (4, 4)}, "lokr_w2"),
    "full": ({"diff": (8, 8)}, "diff"),
}
BAD = {"nan": math.nan, "inf": math.inf}
COMPUTING = {
    "resize": lambda file, out: diffpeft.resize(file, out, rank=1),
    **{how: lambda file, out, how=how: diffpeft.merge({file: 0.5}, out, how=how) for how in ("cat", "svd", "ties")},
}


def file_of(path, form: str, bad: float | None = None, dtype: torch.dtype = torch.float32):
    shapes, spoilt = FORMS[form]
    torch.manual_seed(0)
    tensors = {role: torch.randn(shape, dtype=torch.float32).to(dtype) for role, shape in shapes.items()}
    if form != "full":
        tensors["alpha"] = torch.tensor(1.0)
    if bad is not None:
        tensors[spoilt].view(-1)[-1] = bad
    save_file({f"{KOHYA}.{role}": t for role, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("job", COMPUTING)
def test_what_computes_refuses_and_names_file_and_layer(job, form, bad, tmp_path):
    out = tmp_path / "out.safetensors"
    file = file_of(tmp_path / "a.safetensors", form, BAD[bad])
    with pytest.raises(NonFiniteError) as error:
        COMPUTING[job](file, out)
    assert LAYER in error.value.where and "a.safetensors" in error.value.where and error.value.remedy
    assert not out.exists()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_extract_refuses_too(side, bad, tmp_path):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    models = {"base": torch.zeros(8, 8), "tuned": torch.ones(8, 8)}
    models[side][0, 0] = BAD[bad]
    for name, weight in models.items():
        save_file({key: weight}, tmp_path / f"{name}.safetensors")
    with pytest.raises(NonFiniteError) as error:
        diffpeft.extract(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", family="sd15"
        )
    assert "attn1.to_q" in error.value.where and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("form", FORMS)
def test_no_strength_makes_numbers_that_a_dtype_cannot_hold(form, tmp_path):
    """Whatever is written for a strength that is far too large is finite, or it is refused."""
    file, out = file_of(tmp_path / "a.safetensors", form, dtype=torch.float16), tmp_path / "out.safetensors"
    for by in (1e40, 1e300, -1e40):
        with pytest.raises(CannotConvertError, match="not finite"):
            diffpeft.scale(file, out, by)
        with pytest.raises(CannotConvertError, match="not finite"):
            diffpeft.merge({file: by}, out)
        assert not out.exists()


@pytest.mark.parametrize("by", [0.0, 1e-50, -0.0])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_at_strength_0_has_no_alpha_that_others_take_for_the_rank(form, by, tmp_path):
    """sd-scripts reads an alpha of 0 as none, so that the file would act at its full strength there."""
    file, out = file_of(tmp_path / "a.safetensors", form), tmp_path / "out.safetensors"
    diffpeft.scale(file, out, by)
    tensors = load_file(out)
    assert all(float(t) != 0 for key, t in tensors.items() if key.endswith("alpha"))
    assert diffpeft.diff(file, out).total.norm_b <= 1e-49

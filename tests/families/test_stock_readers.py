"""What is said of who reads a file, against the program itself: stock diffusers reads right what it is said to read, and nothing else."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
import torch
from torch import nn

from diffpeft import TrainConfig, converters
from diffpeft.converters.readers import READERS
from diffpeft.families import CaptionReading, family_of, open_family
from diffpeft.model.state import bundle_of, slots_of
from diffpeft.train import dreambooth
from tests.families import pipelines
from tests.families.pipelines import EDITS, KINDS, pipeline
from tests.families.test_family_runs import LANGUAGE, answer

FORMATS = [format for format, (low_rank, _) in READERS.items() if "diffusers" in low_rank]


def deep_sdxl():
    """An SDXL with as many blocks as the published one."""
    pipe = pipeline("sdxl", torch.float32)
    config = {**pipelines._XL, "layers_per_block": 2, "transformer_layers_per_block": (1, 1, 2)}
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel(**config).eval()
    return pipe


ASIDE = (
    "sd15",
    "sdxl",
    "flux dev",
    "flux s",
    "flux,",
    "wan, two",
)  # have others that stand for them, or files of their own
OTHERS = [kind for kind in KINDS if not kind.startswith(ASIDE) and kind not in EDITS]
MODELS = {
    "sd15": partial(pipeline, "sd15", torch.float32),
    "sdxl": deep_sdxl,
    "flux": partial(pipeline, "flux dev", torch.float32),
    **{kind: partial(pipeline, kind, torch.float32) for kind in OTHERS},
}


def opened(pipe, kind):
    return open_family(pipe, CaptionReading(LANGUAGE.get(kind)))


def adapted(kind, method, targets):
    """A pipeline with a random adapter, and what it says without and with it."""
    pipe = MODELS[kind]()
    family = opened(pipe, kind)
    base, clips = answer(family), bool(family.adaptable)
    config = TrainConfig("m", "d", "o", rank=2, alpha=2, method=method, targets=targets, train_text_encoder=clips)
    dreambooth.adapt(config, family, "a")
    for slot in slots_of(pipe, "a").values():
        slot.eval()
        for p in slot.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    return bundle_of(pipe, "a", family_of(pipe) or ""), base, answer(family)


def error(kind, path, base, want):
    """How far stock diffusers' answer with a file is from what it should be, as a share of what the adapter does; infinite if it refuses it."""
    stock = MODELS[kind]()
    try:
        stock.load_lora_weights(str(path.parent), weight_name=path.name)
    except (AssertionError, AttributeError, IndexError, KeyError, ValueError, RuntimeError):
        return float("inf")
    return float((answer(opened(stock, kind)) - want).norm() / (want - base).norm())


# what is read of the attentions of a block alone is not said to be read: of other layers it is not
NOT_WHOLE = {("ideogram4", "comfyui"), ("skyreels_v2", "comfyui")}


@pytest.mark.parametrize("targets", ["attn", "full"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "model", [m if m in ("sd15", "flux") else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
@torch.no_grad()
def test_diffusers_is_a_reader_of_exactly_the_files_that_it_reads_right(model, method, targets, tmp_path):
    if method == "dora" and (targets == "full") == (model == "sd15"):
        pytest.skip("one of both is enough")
    bundle, base, want = adapted(model, method, targets)
    for format in FORMATS:
        if converters.refusal(bundle, format):
            continue
        path = tmp_path / f"a.{format}.safetensors"
        converters.write(bundle, path, format=format)
        if not converters.inspect(path).family:
            continue  # of a model that is not known, nothing is said
        claimed = "diffusers" in converters.inspect(path).readable_by
        right = error(model, path, base, want) < 1e-4
        assert claimed <= right if (model, format) in NOT_WHOLE else claimed == right, (format, claimed)


@pytest.mark.parametrize("alpha", [2, 1])
@pytest.mark.parametrize("model", ["sd15", "flux"])
def test_comfyui_reads_diffusers_own_format_of_a_transformer_where_alpha_is_the_rank(model, alpha, tmp_path):
    """It finds no attention of a UNet under these names, and no alphas in metadata (`comfy/lora.py`)."""
    pipe = MODELS[model]()
    config = TrainConfig("m", "d", "o", rank=2, alpha=alpha)
    dreambooth.adapt(config, open_family(pipe), "a")
    converters.write(bundle_of(pipe, "a", family_of(pipe)), tmp_path / "a.safetensors", format="diffusers")
    programs = converters.inspect(tmp_path / "a.safetensors").readable_by
    assert ("ComfyUI" in programs) == (model == "flux" and alpha == 2) and "diffusers" in programs

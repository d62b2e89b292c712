"""Tiny pipelines, and what several tests ask of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.pipeline.open import EMBEDDED

torch.set_num_threads(1)  # one process a core

# On CPUs with AVX512-BF16 bitsandbytes rounds 4-bit layers once more when they first run without gradients; tests ask for the same numbers everywhere.
# tests/contracts/test_quantised.py covers such layers on CPUs that have it.
with contextlib.suppress(ImportError):
    import bitsandbytes.nn.modules

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def pytest_collectstart(collector):
    """What a file of tests draws when it is imported is the same whichever files are imported before."""
    torch.manual_seed(0)


def pytest_collection_finish(session):
    """What imports and collection made stays: no collection of garbage need walk over it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded_base():
    """The embedded base; a test that adapts it unloads what it loaded (`embedded` does)."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def embedded(embedded_base):
    yield embedded_base
    diffpeft.unload(embedded_base)


@pytest.fixture(scope="session")
def tiny_base(embedded_base):
    """A random Stable Diffusion of 0.1 million parameters, in float64 so that comparisons can be exact to 1e-9."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = embedded_base.tokenizer
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=embedded_base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


@pytest.fixture(scope="session")
def prototypes(tiny_base):
    """{dtype: the random pipeline's models in it}, made when first asked for: only to be copied."""

    @functools.cache
    def of(dtype):
        names = ("unet", "text_encoder", "vae")
        return {name: copy.deepcopy(getattr(tiny_base, name)).to(dtype).eval() for name in names}

    return of


@pytest.fixture
def fresh(tiny_base, prototypes):
    """Makes pipelines equal to the random one, each with models of its own."""

    def make(dtype=torch.float64):
        models = {name: copy.deepcopy(model) for name, model in prototypes(dtype).items()}
        pipe = type(tiny_base)(
            **{**tiny_base.components, **models, "scheduler": copy.deepcopy(tiny_base.scheduler)},
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(fresh):
    return fresh()


@pytest.fixture(scope="session")
def image():
    """The image [h, w, 3] that a pipeline makes of a prompt in two steps."""

    def make(pipe, prompt="cat"):
        return torch.from_numpy(
            pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
        )

    return make


@pytest.fixture(scope="session")
def trace():
    """All by which a model could be told from one that was never touched."""

    def of(*models: nn.Module):
        return [
            (
                name,
                type(m),
                list(m.__dict__),
                {k: list(v) for k, v in m.__dict__.items() if isinstance(v, dict)},
                [getattr(f, "__func__", f) for f in _forwards(m)],
                [(k, t.dtype, t.requires_grad, _bytes(t)) for k, t in _own_tensors(m)],
            )
            for model in models
            for name, m in model.named_modules()
        ]

    return of


def _bytes(t: torch.Tensor) -> bytes:
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _forwards(m: nn.Module):
    return [m.__dict__[slot] for slot in ("forward", "_old_forward") if slot in m.__dict__]


def _own_tensors(m: nn.Module):
    return [(k, t) for own in (m._parameters, m._buffers) for k, t in own.items() if t is not None and not t.is_meta]


@pytest.fixture
def randomize():
    """Gives every tensor of an adapter values unlike its fresh ones, and a dtype."""

    def do(target, name="default", dtype=torch.float64):
        from diffpeft.model.state import slots_of

        for slot in slots_of(target, name).values():
            slot.to(dtype)
            for p in slot.parameters():
                nn.init.normal_(p, std=0.3)

    return do


@pytest.fixture
def adapter(tmp_path, fresh, randomize):
    """Writes a file with a random LoRA on a convolution, a UNet attention and two text encoder layers, of mixed ranks and alphas."""
    targets = (
        "conv_in",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "layers.0.self_attn.q_proj",
        "layers.1.mlp.fc1",
    )

    def write(format="kohya", dtype=torch.float32, path="style.safetensors", targets=targets):
        pipe = fresh()
        config = diffpeft.LoraConfig(r=3, lora_alpha=2, rank_pattern={"conv_in": 2}, alpha_pattern={"fc1": 6})
        diffpeft.attach(pipe, config, targets=targets)
        randomize(pipe, dtype=dtype)
        diffpeft.save_lora(pipe, tmp_path / path, format=format)
        return tmp_path / path

    return write

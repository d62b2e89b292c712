"""A pipeline with two adapters on the same layers, and all by which one state of a pipeline could be told from another."""

from __future__ import annotations

import torch

from diffpeft import adapters, get_adapters, load_lora
from diffpeft.io import number, raw
from diffpeft.model import mix as mixing
from diffpeft.model.attach import mixes_of
from diffpeft.model.state import bundle_of
from diffpeft.model.target import components

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.conv_in"
TEXT = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
SHAPES = {LINEAR: (32, 32), CONV: (16, 4, 3, 3), TEXT: (48, 32)}


def lora(rank: int, seed: int, layers=tuple(SHAPES), dora: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA or a DoRA, as diffusers spells them."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        o, i, *k = SHAPES[layer]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, i, *k, generator=g)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(o, rank, *(1 for _ in k), generator=g) * 0.2
        if dora:
            tensors[f"{layer}.dora_scale"] = torch.rand(o, 1, *(1 for _ in k), generator=g) + 0.5
    return tensors


def adapted(pipe):
    """A LoRA `a` on all three layers, and over it a DoRA `b.c` on two, which does not commute with it."""
    load_lora(pipe, lora(3, 1), name="a", weight=0.8)
    load_lora(pipe, lora(2, 2, (LINEAR, CONV), dora=True), name="b.c", weight=-0.5)
    return pipe


def fingerprint(pipe, trace):
    """What the models hold and compute, what is listed, what would be saved, and what is in force in this thread."""
    unet, g = pipe.unet, torch.Generator().manual_seed(0)
    with torch.no_grad():
        x, text = torch.randn(1, 4, 4, 4, generator=g), torch.randn(1, 3, 32, generator=g)
        seen = unet(x.to(unet.dtype), torch.tensor([3]), text.to(unet.dtype)).sample
        hidden = pipe.text_encoder(torch.tensor([[1, 2, 3]])).last_hidden_state
    mixes, models, listed = mixes_of(components(pipe)), trace(pipe.unet, pipe.text_encoder), get_adapters(pipe)
    return {
        "models": lasting(models),
        "pipeline": list(vars(pipe)),
        "output": [t.flatten().tolist() for t in (seen, hidden)],
        "listed": list(listed.items()),
        "saved": {name: _saved(pipe, name) for name in listed},
        "mixes": {c: (m.layers, dict(m.fused), m.running()) for c, m in mixes.items()},
        "training": [m.training for model in (pipe.unet, pipe.text_encoder) for m in model.modules()],
        "thread": (torch.is_grad_enabled(), hasattr(mixing._here, "choices"), len(mixing._running)),
    }


def lasting(rows):
    """A trace without what slots have worked out and keep."""
    return [(*row[:3], {k: v for k, v in row[3].items() if k != "_kept"}, *row[4:]) for row in rows]


def _saved(pipe, name):
    bundle = bundle_of(pipe, name, "sd15")
    entries = [
        (e.layer, e.method, number(e.alpha), {role: (h.dtype, h.shape, raw(h)) for role, h in e.tensors.items()})
        for e in bundle.entries
    ]
    return entries, list(bundle.carried), dict(bundle.metadata)


def within(pipe, mix):
    """`adapters` around nothing."""
    with adapters(pipe, mix):
        pass

"""Files on pipelines whose models other libraries hold: accelerate's and diffusers' hooks, and bitsandbytes' layers."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

from diffpeft import (
    AdapterStateError,
    combine,
    fuse,
    get_adapters,
    load_lora,
    replace,
    save_lora,
    set_adapters,
    to_lora,
    unfuse,
    unload,
)
from diffpeft.layers.adapted import base_class
from diffpeft.layers.site import site_of
from tests.pipeline.states import LINEAR, adapted, lasting, lora

CPU = torch.device("cpu")
ROUNDED = {"rtol": 0, "atol": 1e-9}  # float64, of factors in float32; hooked adapters are not joined to one product


def models(pipe):
    return pipe.unet, pipe.text_encoder


@torch.no_grad()
def output(pipe, dtype=torch.float64):
    x, text = torch.linspace(-1, 1, 64, dtype=dtype), torch.linspace(-1, 1, 96, dtype=dtype)
    seen = pipe.unet(x.view(1, 4, 4, 4), torch.tensor([3]), text.view(1, 3, 32)).sample
    return torch.cat([seen.flatten(), pipe.text_encoder(torch.tensor([[1, 2, 3]])).last_hidden_state.flatten()])


def on_each_layer(pipe):
    """What `device_map` puts on every layer."""
    for model in models(pipe):
        for module in list(model.modules()):
            if module._parameters:
                add_hook_to_module(module, AlignDevicesHook(execution_device=CPU, io_same_device=True))


# name: how it is set; accelerate's move weights to their layer for a call, or a whole model
ACCELERATE = {
    "cpu_offload": lambda pipe: [cpu_offload(m, execution_device=CPU) for m in models(pipe)],
    "cpu_offload, buffers too": lambda p: [
        cpu_offload(m, execution_device=CPU, offload_buffers=True) for m in models(p)
    ],
    "cpu_offload_with_hook": lambda pipe: [cpu_offload_with_hook(m, execution_device=CPU) for m in models(pipe)],
    "enable_model_cpu_offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "a hook on each layer": on_each_layer,
}
ELSEWHERE = ("cpu_offload", "cpu_offload, buffers too")  # what a layer has is here only while it is called
LEAF = {"onload_device": CPU, "offload_type": "leaf_level"}
STORED = {"storage_dtype": torch.float32, "compute_dtype": torch.float64}  # what was made in float32 loses nothing
DIFFUSERS = {
    "group offloading": lambda pipe: [apply_group_offloading(m, **LEAF) for m in models(pipe)],
    "layerwise casting": lambda pipe: [apply_layerwise_casting(m, **STORED) for m in models(pipe)],
}


@pytest.mark.parametrize("hooks", ACCELERATE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_acts_under_accelerates_hooks_as_without_them(hooks, when, fresh, trace, tmp_path):
    pipe, twin = fresh(), adapted(fresh())
    plain = output(pipe)
    if when == "before":
        ACCELERATE[hooks](pipe)
        before = trace(*models(pipe))
        adapted(pipe)
    else:
        adapted(pipe)
        ACCELERATE[hooks](pipe)
    torch.testing.assert_close(output(pipe), output(twin), **ROUNDED)
    assert not torch.equal(output(pipe), plain)
    if when == "after" and hooks in ELSEWHERE:  # the adapter's own tensors are elsewhere too
        with pytest.raises(AdapterStateError, match="offloaded"):
            replace(pipe, "a", lora(2, 7))
    else:
        replace(pipe, "a", lora(2, 7)), replace(twin, "a", lora(2, 7))
    for change in (
        lambda p: set_adapters(p, {"b.c": 0.3, "a": {"unet": -0.2}}),
        lambda p: load_lora(p, lora(1, 9), name="late", weight=0.4),
        lambda p: to_lora(p, "b.c", name="flat"),
        lambda p: combine(p, {"a": 1.0, "b.c": -0.5}, name="both"),
        lambda p: set_adapters(p, {"both": 1.0, "late": 0.5, "flat": 0.2}),
        lambda p: unload(p, "b.c"),
    ):
        change(pipe), change(twin)
        torch.testing.assert_close(output(pipe), output(twin), **ROUNDED)
    for p, name in ((pipe, "hooked"), (twin, "plain")):
        save_lora(p, tmp_path / f"{name}.safetensors", name="a")
    assert (tmp_path / "hooked.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    unload(pipe)
    assert torch.equal(output(pipe), plain)
    assert when == "after" or trace(*models(pipe)) == before


@pytest.mark.parametrize("hooks", ACCELERATE)
def test_fusing_is_exact_or_refused_with_a_remedy(hooks, fresh, trace):
    pipe = adapted(fresh())
    ACCELERATE[hooks](pipe)
    want = output(pipe)
    before, listed = lasting(trace(*models(pipe))), get_adapters(pipe)
    if hooks in (*ELSEWHERE, "a hook on each layer"):
        with pytest.raises(AdapterStateError, match=r"offloaded.*Leave the adapter unfused"):
            fuse(pipe)
        assert get_adapters(pipe) == listed
    else:  # the weights are whole: only the model as a whole moves
        fuse(pipe)
        torch.testing.assert_close(output(pipe), want, rtol=0, atol=1e-9)
        unfuse(pipe)
    assert lasting(trace(*models(pipe))) == before and torch.equal(output(pipe), want)


@pytest.mark.parametrize("hooks", DIFFUSERS)
def test_diffusers_hooks_may_come_after_the_file(hooks, fresh):
    pipe, twin = adapted(fresh()), adapted(fresh())
    plain = output(fresh())
    DIFFUSERS[hooks](pipe)
    assert torch.equal(output(pipe), output(twin))
    for p in (pipe, twin):
        set_adapters(p, {"a": 0.3})
    assert torch.equal(output(pipe), output(twin))
    with pytest.raises(AdapterStateError, match=rf"diffusers' {hooks} holds its weight"):
        fuse(pipe)
    assert torch.equal(output(pipe), output(twin))
    unload(pipe)
    assert torch.equal(output(pipe), plain)


@pytest.mark.parametrize("hooks", DIFFUSERS)
def test_a_file_that_comes_after_diffusers_hooks_is_refused_with_a_remedy(hooks, fresh, trace):
    pipe = fresh()
    DIFFUSERS[hooks](pipe)
    before, want = trace(*models(pipe)), output(pipe)
    with pytest.raises(AdapterStateError, match="load adapters before"):
        load_lora(pipe, lora(2, 1))
    assert trace(*models(pipe)) == before and torch.equal(output(pipe), want)


# ---- bitsandbytes


def quantised(pipe, kind):
    """One attention projection of the UNet as a layer of bitsandbytes, which quantises its weight when it is moved."""
    bnb = pytest.importorskip("bitsandbytes")
    make = {
        "nf4": lambda i, o: bnb.nn.Linear4bit(i, o, bias=False, quant_type="nf4", compute_dtype=torch.float32),
        "8 bit": lambda i, o: bnb.nn.Linear8bitLt(i, o, bias=False, has_fp16_weights=False),
    }[kind]
    parent = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    plain = parent.to_q
    parent.to_q = make(plain.in_features, plain.out_features)
    parent.to_q.load_state_dict(plain.state_dict())
    parent.to_q.requires_grad_(False)
    return parent.to_q


@pytest.mark.parametrize("kind", ["nf4", "8 bit"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_acts_beside_quantised_weights(kind, when, fresh, trace):
    """Loaded before or after the weight was quantised it adds its own delta; fusing it is refused, and it comes off without a trace."""
    pipe = fresh(torch.float32)
    layer, x = quantised(pipe, kind), torch.randn(5, 32)
    if when == "before":
        load_lora(pipe, lora(3, 1), name="a", weight=0.5)
        layer.to("cpu")
        unload(pipe)
    else:
        layer.to("cpu")
    plain = layer(x)  # 8-bit layers move their scales in the first forward
    before = trace(pipe.unet)
    W = site_of(base_class(layer))(layer).weight()
    tensors = lora(3, 1)
    delta = tensors[f"{LINEAR}.lora_B.weight"] @ tensors[f"{LINEAR}.lora_A.weight"]
    load_lora(pipe, tensors, name="a", weight=0.5)
    torch.testing.assert_close(layer(x), plain + 0.5 * x @ delta.T, rtol=0, atol=1e-5)
    listed = get_adapters(pipe)
    with pytest.raises(AdapterStateError, match=r"to_q.*quantised.*Leave the adapter unfused"):
        fuse(pipe)
    assert get_adapters(pipe) == listed and not listed["a"].fused
    unload(pipe)
    assert trace(pipe.unet) == before and type(layer).__name__.startswith("Linear")
    assert torch.equal(layer(x), plain) and torch.equal(site_of(type(layer))(layer).weight(), W)

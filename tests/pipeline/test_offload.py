"""Files on pipelines whose models other libraries hold: accelerate's and diffusers' hooks, and bitsandbytes' layers."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn

from diffpeft import (
    AdapterStateError,
    LoraConfig,
    attach,
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
from diffpeft.layers.carried import base_class
from diffpeft.layers.sites import site_of
from diffpeft.model.merge import merge_for_good
from tests.contracts.kinds import METHOD_FORMS, give
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
GROUPS = {"onload_device": CPU, "offload_device": CPU}
STORED = {"storage_dtype": torch.float32, "compute_dtype": torch.float64}  # what was made in float32 loses nothing
DIFFUSERS = {
    "group offloading": lambda m: apply_group_offloading(m, offload_type="leaf_level", **GROUPS),
    "group offloading by blocks": lambda m: apply_group_offloading(
        m, offload_type="block_level", num_blocks_per_group=1, **GROUPS
    ),
    "layerwise casting": lambda m: apply_layerwise_casting(m, **STORED),
    "both": lambda m: (
        apply_layerwise_casting(m, **STORED),
        apply_group_offloading(m, offload_type="leaf_level", **GROUPS),
    ),
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


def of_float32(pipe):
    """The same pipeline with weights that float32 holds too."""
    for model in models(pipe):
        model.to(torch.float32).to(torch.float64)
    return pipe


@pytest.mark.parametrize("hooks", DIFFUSERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_diffusers_hooks_may_come_before_the_file_and_after(hooks, when, fresh, trace):
    pipe, twin = of_float32(fresh()), adapted(of_float32(fresh()))
    plain = output(pipe)
    hook = lambda: [DIFFUSERS[hooks](model) for model in models(pipe)]  # noqa: E731
    if when == "before":
        hook()
        before = trace(*models(pipe))
        adapted(pipe)
    else:
        adapted(pipe)
        hook()
    assert torch.equal(output(pipe), output(twin)) and not torch.equal(output(pipe), plain)
    for change in (
        lambda p: set_adapters(p, {"b.c": 0.3, "a": {"unet": -0.2}}),
        lambda p: load_lora(p, lora(1, 9), name="late", weight=0.4),
        lambda p: replace(p, "late", lora(1, 5)),
        lambda p: to_lora(p, "b.c", name="flat"),
        lambda p: unload(p, "b.c"),
        lambda p: set_adapters(p, {"a": 1.0, "late": 0.5, "flat": 0.2}),
    ):
        change(pipe), change(twin)
        torch.testing.assert_close(output(pipe), output(twin), **ROUNDED)
    want, listed = output(pipe), get_adapters(pipe)
    with pytest.raises(AdapterStateError, match=r"diffusers' .* holds its weight.*Leave the adapter unfused"):
        fuse(pipe)
    assert torch.equal(output(pipe), want) and get_adapters(pipe) == listed
    unload(pipe)
    assert torch.equal(output(pipe), plain)
    if when == "before":
        assert [row[:2] + row[5:] for row in trace(*models(pipe))] == [row[:2] + row[5:] for row in before]


def test_group_offloading_moves_the_tensors_of_an_adapter_that_came_later(pipe):
    """What diffusers copies ahead of time (with streams, or to a disk) it has listed before: it is to list anew."""
    apply_group_offloading(pipe.unet, offload_type="leaf_level", **GROUPS)
    attach(pipe.unet, LoraConfig(r=2), targets=["conv_in"])
    groups = [module._diffusers_hook.hooks["group_offloading"].group for module in [pipe.unet.conv_in]]
    moved = {id(p) for group in groups for module in group.modules for p in module.parameters()}
    assert {id(p) for p in pipe.unet.conv_in.parameters()} == moved and len(moved) == 4
    before = groups[0]
    unload(pipe)
    assert pipe.unet.conv_in._diffusers_hook.hooks["group_offloading"].group is not before


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("form", METHOD_FORMS.values())
def test_an_adapter_keeps_its_dtype_whatever_is_cast_around_it(form, when, storage, randomize, tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Conv1d(4, 4, 1), nn.Linear(8, 8)).requires_grad_(False)

    cast = lambda m: apply_layerwise_casting(m, storage_dtype=storage, compute_dtype=torch.float32)  # noqa: E731
    model, twin, x = made(), made(), torch.randn(2, 4, 8)
    for parameter in (*model.parameters(), *twin.parameters()):  # starts are made of the weights
        parameter.data = parameter.data.to(storage).float()
    if when == "before":
        cast(model)
    for net in (model, twin):
        torch.manual_seed(1)
        give(net, form, targets=["0", "2", "3"])
        torch.manual_seed(2)
        randomize(net, dtype=torch.float32)
    if when == "after":
        cast(model)
    tensors = lambda net: {n: p.clone() for n, p in net.named_parameters() if "adapters" in n}  # noqa: E731
    before = tensors(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-5)  # float32
    assert model[0].weight.dtype == storage
    for name, tensor in tensors(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name


def test_a_base_that_is_cast_to_float8_by_hand_leaves_its_adapters(pipe, adapter):
    load_lora(pipe, adapter())
    before = {n: p.clone() for n, p in pipe.unet.named_parameters() if "adapters" in n}
    pipe.unet.to(torch.float8_e4m3fn)
    assert pipe.unet.conv_in.weight.dtype == torch.float8_e4m3fn
    after = {n: p for n, p in pipe.unet.named_parameters() if "adapters" in n}
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in after.items()) and after
    pipe.unet.to(torch.float16)  # a dtype to compute in is the adapter's too
    assert {p.dtype for n, p in pipe.unet.named_parameters() if "adapters" in n} == {torch.float16}


# ---- GGUF


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_file_acts_beside_gguf_weights(kind, fresh, trace):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    pipe, x = fresh(torch.float32), torch.randn(5, 32)
    parent = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    code = getattr(gguf.GGMLQuantizationType, kind)
    packed = gguf.quants.quantize(parent.to_q.weight.detach().numpy(), code)
    parent.to_q = GGUFLinear(32, 32, compute_dtype=torch.float32)
    parent.to_q.weight = GGUFParameter(torch.from_numpy(packed.copy()), quant_type=code)
    layer = parent.to_q
    W, plain, before = site_of(GGUFLinear)(layer).weight(), layer(x), trace(pipe.unet)
    # the scales of blocks are fp16; diffusers multiplies in that
    torch.testing.assert_close(W, torch.from_numpy(gguf.quants.dequantize(packed, code)), rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(plain, x @ W.T, rtol=0, atol=1e-5)
    tensors = lora(3, 1)
    delta = tensors[f"{LINEAR}.lora_B.weight"] @ tensors[f"{LINEAR}.lora_A.weight"]
    load_lora(pipe, tensors, name="a", weight=0.5)
    torch.testing.assert_close(layer(x), plain + 0.5 * x @ delta.T, rtol=0, atol=1e-5)
    with pytest.raises(AdapterStateError, match=r"to_q.*quantised.*Leave the adapter unfused"):
        fuse(pipe)
    want = layer(x)
    merge_for_good(pipe, ["a"], dequantize=True)
    merged = parent.to_q
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight, W + 0.5 * delta, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(x), want, rtol=0, atol=1e-5)
    assert len(trace(pipe.unet)) == len(before)


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

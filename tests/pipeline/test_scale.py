"""`attention_kwargs={"scale": s}` scales all adapters of a call, in each of diffusers' spellings."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

import diffpeft
from diffpeft import AdapterStateError, ConfigError, LoraConfig, adapters, attach, load_lora, schedule, set_adapters
from diffpeft.model.call import ATTENTION_KWARGS, takes_scale
from diffpeft.model.root import ROOT
from tests.pipeline.denoisers import MODELS, model, output

SCALES = (0.0, -1.5, 1.0)


def latents(pipe, prompt="cat", **kwargs):
    return pipe(
        prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs
    ).images


@pytest.fixture
def two(pipe, randomize):
    """A pipeline with two adapters of different methods on the denoiser and the text encoder."""
    for name, config in (("a", LoraConfig(r=2)), ("b", diffpeft.LoHaConfig(r=2))):
        attach(pipe, config, name, targets=["conv_in", "attn1.to_q", "attn2.to_v", "q_proj"])
        randomize(pipe, name)
    return pipe


MIXES = [
    {"a": 1.0},
    {"a": 0.7, "b": -0.4},
    {"b": {"unet": 0.3, "unet.mid_block": 0.9, "text_encoder": 0.2}},
    {"a": schedule.linear(1.0, 0.2), "b": 0.5},
]


def times(mix, s):
    def scaled(strength):
        if isinstance(strength, dict):
            return {pattern: scaled(level) for pattern, level in strength.items()}
        return schedule.linear(s, 0.2 * s) if isinstance(strength, schedule.Schedule) else s * strength

    return {name: scaled(strength) for name, strength in mix.items()}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("guidance", (1.0, 4.0))
def test_a_scaled_call_is_one_with_strengths_times_the_scale(two, mix, guidance):
    for s in SCALES:
        set_adapters(two, times(mix, s))
        want = latents(two, guidance_scale=guidance)
        set_adapters(two, mix)
        before = latents(two, guidance_scale=guidance)
        got = latents(two, guidance_scale=guidance, cross_attention_kwargs={"scale": s})
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)  # a product more or less in float64
        assert torch.equal(latents(two, guidance_scale=guidance), before)  # it was for that call alone
        with adapters(two, mix):
            assert torch.equal(latents(two, guidance_scale=guidance, cross_attention_kwargs={"scale": s}), got)


def test_each_prompts_mix_is_scaled(two):
    mixes, prompts = [{"a": 0.8}, {"b": -0.5, "a": 0.1}], ["cat", "dog"]
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    draw = lambda **kw: two(prompts, num_inference_steps=2, output_type="latent", generator=generators(), **kw).images  # noqa: E731
    set_adapters(two, [times(mix, 0.5) for mix in mixes])
    want = draw()
    set_adapters(two, mixes)
    torch.testing.assert_close(draw(cross_attention_kwargs={"scale": 0.5}), want, rtol=0, atol=1e-10)


def test_it_is_what_diffusers_gives(pipe, fresh, adapter):
    file = adapter("diffusers", dtype=torch.float64)
    stock = fresh()
    stock.load_lora_weights(str(file.parent), weight_name=file.name)
    load_lora(pipe, file)
    for s in (0.0, 0.5, 1.0, 2.0):
        kwargs = {"guidance_scale": 3.0, "cross_attention_kwargs": {"scale": s}}
        # diffusers' factors are float32 numbers in float64, as ours; the products are summed in another order
        torch.testing.assert_close(latents(pipe, **kwargs), latents(stock, **kwargs), rtol=0, atol=1e-9)


def test_a_text_encoder_is_scaled_where_prompts_are_encoded_apart(two):
    set_adapters(two, {"a": 0.5})
    want, _ = two.encode_prompt("cat", "cpu", 1, False)
    set_adapters(two, {"a": 1.0})
    got, _ = two.encode_prompt("cat", "cpu", 1, False, lora_scale=0.5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_callers_variable_of_that_name_scales_nothing(two):
    set_adapters(two, {"a": 0.5})
    want = latents(two)
    lora_scale = 0.5
    assert torch.equal(latents(two), want) and lora_scale


@pytest.mark.parametrize("family", MODELS)
def test_every_denoiser_takes_it_as_its_forward_spells_it(family, randomize):
    net = model(family)
    names = [name for name in inspect.signature(type(net).forward).parameters if name in ATTENTION_KWARGS]
    attach(net, LoraConfig(r=2), targets=".*(to_q|qkv|to_k|conv_in)")
    randomize(net)
    assert takes_scale(net, "") == bool(names)
    if not names:
        return
    set_adapters(net, {"default": 0.25})
    want = output(net, family)
    set_adapters(net, {"default": 0.5})
    torch.testing.assert_close(output(net, family, **{names[0]: {"scale": 0.5}}), want, rtol=0, atol=1e-10)
    assert (output(net, family) - want).abs().max() > 1e-6


@pytest.mark.parametrize("scale", ("0.5", float("nan"), 1e39, True, 10**400))
def test_what_is_no_number_is_refused(two, scale):
    with pytest.raises(ConfigError, match="scale"):
        latents(two, cross_attention_kwargs={"scale": scale})


def test_what_is_fused_cannot_be_scaled(two):
    want = latents(two)
    diffpeft.fuse(two)
    torch.testing.assert_close(latents(two, cross_attention_kwargs={"scale": 1.0}), want, rtol=0, atol=1e-9)
    with pytest.raises(AdapterStateError, match="fused"):
        latents(two, cross_attention_kwargs={"scale": 0.5})
    diffpeft.unfuse(two)
    assert torch.isfinite(latents(two, cross_attention_kwargs={"scale": 0.5})).all()


@pytest.fixture
def shallow(two, randomize):
    """Such a pipeline whose denoiser has one block down and one up: graphs of it are made in a third of the time."""
    one = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    two.unet = diffusers.UNet2DConditionModel.from_config({**two.unet.config, **one, "block_out_channels": (16,)})
    two.unet.to(torch.float64).eval()
    diffpeft.unload(two)
    for name, config in (("a", LoraConfig(r=2)), ("b", diffpeft.LoHaConfig(r=2))):
        attach(two, config, name, targets=["conv_in", "attn1.to_q", "attn2.to_v", "q_proj"])
        randomize(two, name)
    return two


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("compiled", (pytest.param("wrapped", marks=pytest.mark.slow), "in place"))
def test_a_compiled_denoiser_is_scaled_without_a_new_graph(shallow, compiled):
    two, graphs = shallow, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    wants = [latents(two, cross_attention_kwargs={"scale": s}) for s in (1.0, 0.25, -2.0)]
    torch._dynamo.reset()
    if compiled == "wrapped":
        two.unet = torch.compile(two.unet, backend=backend)
    else:
        two.unet.compile(backend=backend)
    gots = [latents(two, cross_attention_kwargs={"scale": s}) for s in (1.0, 0.25)]  # as set, and for a call
    n = len(graphs)
    gots += [latents(two, cross_attention_kwargs={"scale": -2.0})]
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert n and len(graphs) == n
    torch._dynamo.reset()


def test_diffusers_does_not_say_that_it_has_no_effect(two, monkeypatch, caplog):
    want = latents(two, cross_attention_kwargs={"scale": 0.5})
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with caplog.at_level("WARNING"):
        diffusers.utils.logging.enable_propagation()
        got = latents(two, cross_attention_kwargs={"scale": 0.5})
        diffusers.utils.logging.disable_propagation()
    assert torch.equal(got, want) and "ineffective" not in caplog.text


def test_no_trace_is_left(two, fresh, trace):
    latents(two, cross_attention_kwargs={"scale": 0.5})
    assert ROOT in vars(two.unet) and ROOT in vars(two.text_encoder)
    diffpeft.unload(two)
    assert trace(two.unet, two.text_encoder) == trace(fresh().unet, fresh().text_encoder)

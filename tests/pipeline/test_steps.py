"""Strengths over the steps of real pipelines: every kind of scheduler, shortened runs, schedulers replaced in between."""

from __future__ import annotations

import gc
import weakref

import diffusers
import pytest
import torch

from diffpeft import AdapterStateError, LoraConfig, adapters, attach, get_adapters, schedule, set_adapters, unload
from diffpeft.model.attach import mix_of
from tests.pairwise import params
from tests.pipeline.denoisers import MODELS

N = 4
LINE = schedule.linear(1.0, 0.0)  # its value is 1 - fraction


def euler(n):
    return [i / n for i in range(n)]


def heun(n):
    """Two calls of the denoiser a step, but for the last."""
    return [i / n for i in range(n) for _ in range(1 + (i < n - 1))]


def plms(n):
    """The first step is tried twice."""
    return [0.0, *euler(n)]


def runge_kutta(n):
    """Four calls for each of the first three steps."""
    return [i / n for i in range(n) for _ in range(4 if i < 3 else 1)]


# name: (class, fields, fractions of the calls of the denoiser in a run of n steps)
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}, euler),
    "ddpm": ("DDPMScheduler", {}, euler),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, plms),
    "pndm, runge-kutta": ("PNDMScheduler", {"skip_prk_steps": False}, runge_kutta),
    "dpm++": ("DPMSolverMultistepScheduler", {}, euler),
    "dpm++ single step": ("DPMSolverSinglestepScheduler", {}, euler),
    "dpm++ sde": ("DPMSolverSDEScheduler", {}, heun),
    "unipc": ("UniPCMultistepScheduler", {}, euler),
    "deis": ("DEISMultistepScheduler", {}, euler),
    "lms": ("LMSDiscreteScheduler", {}, euler),
    "euler": ("EulerDiscreteScheduler", {}, euler),
    "euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, euler),
    "euler a": ("EulerAncestralDiscreteScheduler", {}, euler),
    "heun": ("HeunDiscreteScheduler", {}, heun),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, heun),
    "lcm": ("LCMScheduler", {}, euler),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, euler),
    "flow, heun": ("FlowMatchHeunDiscreteScheduler", {}, heun),
}


def scheduler(name):
    cls, fields, _ = SCHEDULERS[name]
    try:
        return getattr(diffusers, cls)(**fields)
    except ImportError as error:
        pytest.skip(str(error).strip())


@pytest.fixture
def adapted(pipe, randomize):
    attach(pipe, LoraConfig(r=2), "a", targets=["conv_in", "attn1.to_q", "q_proj"])
    randomize(pipe, "a")
    return pipe


def seen(model):
    """The strengths of `a` that the model's layers have in each call."""
    found = []
    model.register_forward_pre_hook(lambda *_: found.append(mix_of(model).current().strengths["a"][0]))
    return found


def run(pipe, n=N, prompt="cat", **kwargs):
    g = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=n, generator=g, output_type="latent", **kwargs).images


def expect(found, fractions):
    assert found == pytest.approx([1 - f for f in fractions], abs=1e-12)


def img2img(pipe, n=N, strength=0.5):
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    return lambda: other(
        "cat", image=image, strength=strength, num_inference_steps=n, generator=g, output_type="latent"
    )


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("n", [4, 7])
def test_each_step_has_its_strength(name, n, adapted):
    adapted.scheduler = scheduler(name)
    found, text = seen(adapted.unet), seen(adapted.text_encoder)
    set_adapters(adapted, {"a": LINE})
    try:
        run(adapted, n)
    except (
        NotImplementedError,
        AttributeError,
        TypeError,
    ):  # flow matching is no scheduler of a UNet's pipeline
        if "flow" not in name:
            raise
        found.clear()
        by_hand(adapted, n)
        found[:] = found[::2]
    expect(found, SCHEDULERS[name][2](n))
    assert set(text) <= {1.0}


def by_hand(pipe, n):
    """The loop that pipelines of flow matching have."""
    pipe.scheduler.set_timesteps(n)
    x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 32).double()
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            for _ in range(2):  # guidance as two calls
                y = pipe.unet(x, t.expand(1), text).sample
            x = pipe.scheduler.step(y, t, x, return_dict=False)[0]


SHORTENED = [
    (name, strength)
    for name in SCHEDULERS
    if "flow" not in name and name not in ("pndm, runge-kutta", "dpm++ sde")
    for strength in (0.25, 0.5, 1.0)
]


# each scheduler with one strength, each strength with a third of the schedulers
@pytest.mark.parametrize(
    "name, strength", params(SHORTENED, [SHORTENED[3 * n + n % 3] for n in range(len(SHORTENED) // 3)])
)
def test_a_shortened_run_counts_its_own_steps(name, strength, adapted):
    adapted.scheduler = scheduler(name)
    set_adapters(adapted, {"a": LINE})
    run(adapted, 3)  # another run before it
    own = img2img(adapted, 8, strength)
    found = seen(adapted.unet)
    for _ in range(2):
        own()
        want = SCHEDULERS[name][2](int(8 * strength))
        expect(found, want)
        found.clear()
    run(adapted, 3)
    expect(found, SCHEDULERS[name][2](3))


def test_a_replaced_scheduler_is_the_one_that_counts(adapted):
    set_adapters(adapted, {"a": LINE})
    found = seen(adapted.unet)
    for name in ("heun", "ddim", "pndm", "dpm++", "euler", "ddim"):
        adapted.scheduler = scheduler(name)
        found.clear()
        run(adapted, 5)
        expect(found, SCHEDULERS[name][2](5))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "pndm"])
def test_the_image_is_that_of_strengths_set_by_hand(name, adapted):
    made = schedule.steps({0.0: 1.0, 0.5: -0.3, 0.75: 0.0})
    adapted.scheduler = scheduler(name)
    set_adapters(adapted, {"a": {"unet": made, "text_encoder": 0.5}})
    got = run(adapted, guidance_scale=3.0)
    fractions = iter(SCHEDULERS[name][2](N))
    hand = lambda *_: set_adapters(adapted, {"a": {"unet": made.at(next(fractions)), "text_encoder": 0.5}})  # noqa: E731
    set_adapters(adapted, {"a": {"unet": 1.0, "text_encoder": 0.5}})
    handle = adapted.unet.register_forward_pre_hook(hand)
    want = run(adapted, guidance_scale=3.0)
    handle.remove()
    assert torch.equal(got, want)
    with adapters(adapted, {"a": {"unet": made, "text_encoder": 0.5}}):
        assert torch.equal(run(adapted, guidance_scale=3.0), want)
    unload(adapted)
    assert adapted.unet.__class__ is diffusers.UNet2DConditionModel


def test_a_schedule_set_in_the_middle_of_a_run_knows_where_it_is(adapted):
    found = seen(adapted.unet)
    for name in ("ddim", "euler", "dpm++"):
        adapted.scheduler = scheduler(name)
        set_adapters(adapted, {"a": 5.0})
        found.clear()

        def change(pipe, i, t, kwargs):
            if i == 1:
                set_adapters(pipe, {"a": LINE})
            return kwargs

        run(adapted, callback_on_step_end=change)
        expect(found, [-4.0, -4.0, 0.5, 0.75])


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "pndm"])
def test_a_loop_of_ones_own_on_the_pipeline_s_scheduler(name, adapted):
    adapted.scheduler = scheduler(name)
    set_adapters(adapted, {"a": LINE})
    run(adapted, 3)
    found = seen(adapted.unet)
    for n in (2, 6):
        found.clear()
        adapted.scheduler.set_timesteps(n)
        x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 32).double()
        for t in adapted.scheduler.timesteps:
            with torch.no_grad():
                y = adapted.unet(adapted.scheduler.scale_model_input(x, t), t, text).sample
            x = adapted.scheduler.step(y, t, x, return_dict=False)[0]
        expect(found, SCHEDULERS[name][2](n))


def test_the_pipeline_that_runs_is_the_one_that_counts(adapted):
    """Pipelines that share a denoiser have a scheduler each."""
    adapted.scheduler = scheduler("euler")
    set_adapters(adapted, {"a": LINE})
    found = seen(adapted.unet)
    twin = type(adapted)(**{**adapted.components, "scheduler": scheduler("ddim")}, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    for pipe, n in ((adapted, 3), (twin, 5), (adapted, 3)):
        found.clear()
        run(pipe, n)
        expect(found, euler(n))


def test_steps_of_another_scheduler_are_told(adapted):
    set_adapters(adapted, {"a": LINE})
    x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 32).double()
    adapted.scheduler = scheduler("ddim")
    adapted.scheduler.set_timesteps(10)
    with pytest.raises(AdapterStateError, match=r"schedule\.step"):
        adapted.unet(x, torch.tensor(950), text)
    found = seen(adapted.unet)
    with schedule.step(0.25):
        adapted.unet(x, torch.tensor(950), text)
    expect(found, [0.25])


def test_flux_rescales_its_timesteps(randomize):
    """t / 1000 in the dtype of the latents; guidance in two calls."""
    torch.manual_seed(0)
    transformer = getattr(diffusers, MODELS["flux"][0])(**MODELS["flux"][1])
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer.to(torch.bfloat16)
    )
    pipe.set_progress_bar_config(disable=True)
    attach(pipe, LoraConfig(r=2), "a", targets=["to_q"])
    randomize(pipe, "a", torch.float32)
    set_adapters(pipe, {"a": LINE})
    found = seen(pipe.transformer)
    text = {"prompt_embeds": torch.randn(1, 5, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    text |= {f"negative_{k}": v for k, v in text.items()}
    text = {k: v.bfloat16() for k, v in text.items()}
    for n in (4, 6):
        found.clear()
        pipe(**text, height=32, width=32, num_inference_steps=n, true_cfg_scale=2.0, output_type="latent")
        expect(found, [f for f in euler(n) for _ in range(2)])


def test_nothing_holds_the_pipeline_and_nothing_is_left_on_it(fresh, randomize, trace):
    pipe = fresh()
    before, attributes = trace(pipe.unet, pipe.text_encoder), dict(vars(pipe))
    attach(pipe, LoraConfig(r=2), "a", targets=["conv_in", "q_proj"])
    set_adapters(pipe, {"a": LINE})
    run(pipe, 2)
    assert get_adapters(pipe)["a"].strength == LINE
    unload(pipe)
    assert trace(pipe.unet, pipe.text_encoder) == before
    assert vars(pipe).keys() == attributes.keys() | {k for k in vars(pipe) if k.startswith("_") and "diffpeft" not in k}
    attach(pipe, LoraConfig(r=2), "a", targets=["conv_in", "q_proj"])
    set_adapters(pipe, {"a": LINE})
    unet, gone = pipe.unet, weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    with pytest.raises(AdapterStateError, match="nothing tells"):
        unet(torch.randn(1, 4, 8, 8).double(), torch.tensor(3), torch.randn(1, 5, 32).double())


def test_a_compiled_pipeline_is_not_compiled_anew(fresh, randomize):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = fresh(torch.float32)
    attach(pipe, LoraConfig(r=2), "a", targets=["conv_in", "attn1.to_q"])
    randomize(pipe, "a", torch.float32)
    set_adapters(pipe, {"a": LINE})
    want = run(pipe)
    pipe.unet.compile(backend="eager")
    got, count = run(pipe), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    run(pipe)
    set_adapters(pipe, {"a": schedule.steps({0.0: 1.0, 0.4: -1.0, 0.7: 0.0})})
    run(pipe)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count > 0


@pytest.mark.parametrize("first", [True, False])
def test_offloaded_models_have_their_steps(first, fresh, randomize):
    from accelerate import cpu_offload

    pipe = fresh()
    attach(pipe, LoraConfig(r=2), "a", targets=["conv_in", "attn1.to_q"])
    randomize(pipe, "a")
    set_adapters(pipe, {"a": LINE})
    want = run(pipe)
    set_adapters(pipe, {"a": LINE} if first else {"a": 1.0})
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    set_adapters(pipe, {"a": LINE})
    x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 5, 32).double()
    by_step = []
    for f in (0.0, 0.5):
        with schedule.step(f), torch.no_grad():
            by_step.append(pipe.unet(x, torch.tensor(3), text).sample)
    for f, got in zip((0.0, 0.5), by_step, strict=True):
        set_adapters(pipe, {"a": LINE.at(f)})
        with torch.no_grad():
            torch.testing.assert_close(pipe.unet(x, torch.tensor(3), text).sample, got, rtol=0, atol=1e-12)
    assert want.isfinite().all()

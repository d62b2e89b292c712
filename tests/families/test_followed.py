"""What is followed through a pipeline's own call: it is what hand-written families say of theirs, and of pipelines without one what they themselves draw."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusionInpaintPipeline,
)

from diffpeft import LoraConfig, attach, converters, load_lora, save_lora
from diffpeft.errors import ConfigError, WrongBaseError
from diffpeft.families import FAMILIES, CaptionReading, Generic, family_of, open_family, trainable
from diffpeft.families.discrete import Discrete
from diffpeft.families.generic import flattened, restored
from diffpeft.families.latents import spread
from diffpeft.families.parts import Parts
from diffpeft.families.prompts import embedded, stacked
from diffpeft.model.state import slots_of, trained_parameters
from diffpeft.train.cache import text_identity
from tests.families import test_family_laws as laws
from tests.families.followed import FOLLOWED, FP32
from tests.families.pipelines import KINDS, cells, made, pipeline
from tests.families.test_family_laws import FRAMES, HEIGHT, PROMPTS, READ, UNCOUNTED, WIDTH, raw_latents
from tests.families.test_family_laws import test_a_caption_is_read_alike_alone_and_among_others as test_captions_alone
from tests.families.test_family_laws import test_a_level_and_its_share_of_noise_are_inverse as test_levels_inverse
from tests.families.test_family_laws import test_every_layer_that_a_preset_chooses_is_learnt as test_presets_learnt
from tests.families.test_family_laws import test_every_level_leads_back as test_levels_lead_back
from tests.families.test_family_laws import test_pictures_are_drawn_from_what_was_read as pictures_drawn

assert all((test_captions_alone, test_levels_inverse, test_presets_learnt, test_levels_lead_back))
PLAIN = {"use_resolution_binning": False, "enable_prompt_rewrite": False}
STANDING = ("bria",)  # that run in make test
# {kind: why its pipeline cannot be followed}: texts of one depend on the size, others read captions elsewhere or look at pictures, and some of the tiny ones
# take sizes or numbers of frames that theirs do not
REFUSED = {
    "ideogram4": "could not be followed",
    "wan": "encodes to",
    "wan, time by token": "encodes to",
    "wan, two experts": "two denoisers",
    "skyreels_v2": "encodes to",
    "flux kontext": "pixels where it is asked for",
    "flux control": "not one from text to an image",
    "qwen_image edit": "could not be followed",
    "qwen_image edit plus": "could not be followed",
    "flux fill": "not one from text to an image",
    "longcat_image edit": "not one from text to an image",
    "kandinsky5 edit": "not one from text to an image",
    "ltx2": "connectors for more than a caption",
    "ltx2, 2.3": "connectors for more than a caption",
    "cogvideox 1.5": "more than another order of the noise",
    "sana_video": "divisible by 32",
    "mochi": "levels of its own",
    "cosmos": "could not be followed",
}


@pytest.fixture(
    scope="module", params=[k if k in STANDING else pytest.param(k, marks=pytest.mark.slow) for k in FOLLOWED]
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    """A pipeline whose one step ends at no noise."""
    pipe = pipeline(kind, torch.float32 if kind in FP32 else torch.float64)
    if "beta_schedule" in pipe.scheduler.config:
        ends = {"set_alpha_to_one": True, "timestep_spacing": "trailing", "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ends)
    return pipe


@pytest.fixture
def family(kind, pipe):
    return open_family(pipe)


@pytest.fixture
def latents(family):
    """Pixels, the VAE's own mean of their latents, those that are trained on, and noise."""
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, dtype=family.pipe.vae.dtype) * 2 - 1
    z, _ = family.encode(pixels)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    opaque = [torch.ones_like(pixels[:, :1])] if type(family).__name__ == "QwenImage21" else []
    pixels = torch.cat([pixels, *opaque], dim=1)
    return raw_latents(family, pixels.unsqueeze(2) if z.ndim == 5 else pixels), z, noise


def test_every_family_is_known_by_its_pipeline(kind, pipe, family):
    name = FOLLOWED[kind][0]
    assert type(family) is FAMILIES[name] and trainable(type(pipe).__name__, family.parts.configs) == name
    assert family_of(pipe) in (None, "sdxl" if name == "kolors" else name)  # whose layers' names it has


def drawn(family, sigma=None):
    """What a pipeline hands its decoder after one real step from noise of its own, and that noise; it begins at a share of noise, where that is said."""
    pipe, seen, times = family.pipe, {}, family.pipe.scheduler.set_timesteps
    modules = {laws.inspect.getmodule(base) for base in type(pipe).__mro__}
    (module,) = [m for m in modules if hasattr(m, "randn_tensor")]
    real = module.randn_tensor

    def noise(*args, **kwargs):
        return seen.setdefault("noise", real(*args, **kwargs))

    def begun(*_, sigmas=None, timesteps=None, mu=None, device=None, **__):
        times(sigmas=[sigma], device=device, **({} if mu is None else {"mu": mu}))

    pipe.vae.decode = lambda z, *_, **__: seen.update(z=z) or laws_stop()
    module.randn_tensor = noise
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1}
    frame = {"original_size": FRAMES[0].original, "target_size": FRAMES[0].target}
    options = family.probe.taken(family.probe.quiet | PLAIN | frame)
    guided = getattr(pipe, "guider", None)
    if guided is not None:
        guided.disable()
    try:
        with laws.times_set_by(pipe, times if sigma is None else begun), contextlib.suppress(laws.Enough):
            pipe(prompt=PROMPTS[0], output_type="pt", generator=torch.Generator().manual_seed(3), **size, **options)
    finally:
        del pipe.vae.decode
        module.randn_tensor = real
        if guided is not None:
            guided.enable()
    return seen["z"], seen["noise"]


def laws_stop():
    raise laws.Enough


@torch.no_grad()
@pytest.mark.parametrize("sigma", [None, 0.2])
def test_a_real_step_of_the_pipeline_ends_where_the_family_says(family, sigma, latents):
    """Layout, time, sign, prediction and normalisation at once."""
    if sigma is not None and isinstance(family.levels, Discrete):
        pytest.skip("its times are numbers")
    raw, z, _ = latents
    conditions = embedded(family, PROMPTS[:1]) | family.framed(FRAMES[:1])
    got, noise = drawn(family, sigma)
    lie = family._layout((HEIGHT, WIDTH))
    x = noise.flatten().to(z.dtype)[lie.places].view(1, *lie.shape)  # wrong places are other pictures
    scheduler = family.pipe.scheduler
    if isinstance(family.levels, Discrete):
        t = scheduler.timesteps[:1]
        a = family.levels.alphas[t].to(x.dtype)
        said = family.predict(x, t, conditions)
        by_kind = {
            "v_prediction": a.sqrt() * x - (1 - a).sqrt() * said,
            "epsilon": (x - (1 - a).sqrt() * said) / a.sqrt(),
        }
        clean = by_kind[family.levels.kind]
    else:
        s = scheduler.sigmas[:1].to(x.dtype)
        clean = x - spread(s, x) * family.predict(x, s, conditions)
    scale = (raw[:1] - raw[1:]) / (z[:1] - z[1:])
    shift = raw[:1] - scale * z[:1]
    torch.testing.assert_close(
        got.double(), (scale * clean + shift).double(), rtol=1e-3, atol=1e-3
    )  # fp32 in schedulers
    assert (got - scale * x - shift).abs().max() > 1e-2  # a test that can fail


def test_pictures_are_drawn_from_what_was_read(kind, family):
    if kind == "prx":
        pytest.skip("with guidance its pipeline draws one prompt at a time")
    pictures_drawn(family)


def test_a_flow_is_shifted_as_the_sampler_shifts_it(family):
    if family.levels.kind != "flow":
        return
    for height, width in ((HEIGHT, WIDTH), (3 * HEIGHT, 2 * WIDTH)):
        said = {}

        def noted(*_, sigmas=None, timesteps=None, mu=None, said=said, **__):
            said.update({} if mu is None else {"mu": mu})
            raise laws.Enough

        with laws.times_set_by(family.pipe, noted), pytest.raises(laws.Enough):
            family.pipe(
                prompt="a cat",
                height=height,
                width=width,
                **family.probe.taken(PLAIN),
            )
        scheduler = family.pipe.scheduler
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2], **said)
        shape = family.encode(torch.zeros(1, 3, height, width, dtype=family.pipe.vae.dtype))[0].shape
        got = family.levels.sigma(torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64), shape)
        torch.testing.assert_close(got, scheduler.sigmas[:3].double(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_prompts_that_were_read_draw_what_the_texts_draw(family):
    pipe, seed = family.pipe, lambda: torch.Generator().manual_seed(0)
    prompts = PROMPTS[:1] if type(pipe).__name__ == "PRXPipeline" else PROMPTS
    said = {name: 3.0 for name in family.guidance.values()}
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "pt"} | said
    plain = family.probe.taken(PLAIN)
    want = pipe(prompt=list(prompts), generator=seed(), **plain, **options)[0]
    keywords = family.prompted(embedded(family, prompts), embedded(family, [""] * len(prompts)))
    encoders = {name: getattr(pipe, name) for name in family.text_encoders}
    for name in encoders:
        setattr(pipe, name, None)  # they have left the device
    got = pipe(**options | keywords, generator=seed())[0]
    for name, encoder in encoders.items():
        setattr(pipe, name, encoder)
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=0, atol=1e-6)


def test_a_loop_of_ones_own_trains_a_pipeline_without_a_family():
    pipe = pipeline("generic, a flow", torch.float32)
    pipe.transformer.requires_grad_(False)
    family = open_family(pipe)
    attach(pipe, LoraConfig(r=4), "style", targets="attn")
    texts, pixels = (
        embedded(family, PROMPTS),
        torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    )
    z, _ = family.encode(pixels)
    noised = family.levels.noised(
        z, torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.4, 0.7])
    )
    parameters = list(trained_parameters(pipe, "style").values())
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(12):
        loss = (family.predict(noised.x, noised.t, texts) - noised.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert type(family) is Generic and losses[-1] < 0.9 * losses[0]


# -- against hand-written families -----------------------------------------------------------------------------------------


def both(kind):
    """A pipeline's own family, and the generic one."""
    pipe, family = pipeline(kind), KINDS[kind][0]
    length = READ.get(family)
    generic = Generic(Parts(pipe), CaptionReading(max_length=None if family in UNCOUNTED else length))
    return open_family(pipe, CaptionReading(max_length=length)), generic


@torch.no_grad()
@pytest.mark.parametrize("kind", cells(KINDS, ("sdxl", "flux dev", "z_image", "ltx")))
def test_what_is_followed_is_what_a_family_says(kind):
    """Latents, levels, targets and predictions; the latents lie in another order where a family has those of patches."""
    if kind in REFUSED:
        with pytest.raises(WrongBaseError, match=REFUSED[kind]):
            _, generic = both(kind)
            z, _ = generic.encode(torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.float64))
            generic.predict(z, torch.tensor([0.5]), embedded(generic, PROMPTS[:1]))
        return
    ours, generic = both(kind)
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    (a, a_std), (b, b_std) = ours.encode(pixels), generic.encode(pixels)
    order = a[0].flatten().argsort()[b[0].flatten().argsort().argsort()]  # all numbers are different

    def turned(x):
        return x.flatten(1)[:, order].view(b.shape)

    torch.testing.assert_close(turned(a), b, rtol=1e-7, atol=1e-7)  # statistics are in fp32 in pipelines
    torch.testing.assert_close(turned(a_std), b_std, rtol=1e-7, atol=1e-7)
    noise, u = torch.randn(a.shape, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    mine, theirs = ours.levels.noised(a, noise, u), generic.levels.noised(b, turned(noise), u)
    torch.testing.assert_close(mine.t, theirs.t, rtol=1e-12, atol=0)
    torch.testing.assert_close(turned(mine.target), theirs.target, rtol=1e-7, atol=1e-7)
    want = ours.predict(mine.x, mine.t, embedded(ours, PROMPTS) | ours.framed(FRAMES))
    got = generic.predict(theirs.x, theirs.t, embedded(generic, PROMPTS) | generic.framed(FRAMES))
    torch.testing.assert_close(
        got.double(), turned(want).double(), rtol=0, atol=1e-4
    )  # times are in fp32 in schedulers
    assert mine.kind == theirs.kind and (turned(want).abs().mean() > 1e-2)


def test_what_is_kept_of_captions_is_of_the_pipeline_and_of_every_encoder():
    """On a disk, which runs of several models share."""
    pipe = pipeline("flux schnell")
    family = Generic(Parts(pipe), CaptionReading())
    before = text_identity(family, "text_encoder", "")
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).add_(1)
    changed = text_identity(family, "text_encoder", "")
    pipe.__class__ = type("OtherPipeline", (type(pipe),), {})
    assert len({before, changed, text_identity(Generic(Parts(pipe), CaptionReading()), "text_encoder", "")}) == 3


# -- what cannot be followed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FluxImg2ImgPipeline, FluxInpaintPipeline, StableDiffusionInpaintPipeline])
def test_another_pipeline_of_a_known_family_is_refused_by_name(kind):
    with pytest.raises(WrongBaseError, match=f"a {kind.__name__}.* cannot be trained"):
        trainable(kind.__name__, {})


def test_what_is_no_pipeline_from_text_to_an_image_is_refused():
    parts = pipeline("flux schnell").components
    with pytest.raises(WrongBaseError, match="not one from text to an image"):
        Generic(
            Parts(FluxImg2ImgPipeline(**{n: parts[n] for n in parts if "image" not in n and "feature" not in n})),
            CaptionReading(),
        )


def test_a_pipeline_that_scales_its_noise_is_refused():
    pipe = pipeline("flux schnell")
    prepare = type(pipe).prepare_latents

    class Scaled(type(pipe)):
        def prepare_latents(self, *args, **kwargs):
            latents, ids = prepare(self, *args, **kwargs)
            return 80 * latents, ids

    pipe.__class__ = Scaled
    family = Generic(Parts(pipe), CaptionReading())
    conditions = embedded(family, PROMPTS[:1])
    with pytest.raises(WrongBaseError, match="more than another order of the noise"):
        family.predict(torch.zeros(1, 4, 16, 32, dtype=torch.float64), torch.tensor([0.5]), conditions)


def test_a_pipeline_that_reads_captions_elsewhere_is_refused():
    pipe = pipeline("flux schnell")
    prepare = type(pipe).prepare_latents

    class Reading(type(pipe)):
        def prepare_latents(self, *args, **kwargs):
            self.text_encoder_2(torch.zeros(1, 4, dtype=torch.long))
            return prepare(self, *args, **kwargs)

    pipe.__class__ = Reading
    with pytest.raises(WrongBaseError, match="text_encoder_2 for more than a caption"):
        Generic(Parts(pipe), CaptionReading()).encode(torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.float64))


def test_levels_that_are_not_those_of_their_betas_are_refused():
    pipe = pipeline("sd15")
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.square()
    with pytest.raises(WrongBaseError, match="levels of its own"):
        Generic(Parts(pipe), CaptionReading())


def test_a_pipeline_that_asks_twice_is_refused():
    pipe = pipeline("flux schnell")

    def twice(module, args, kwargs):
        if not asked:
            asked.append(1)
            module(*args, **kwargs)

    asked = []
    family = Generic(Parts(pipe), CaptionReading())
    conditions = embedded(family, PROMPTS[:1])
    handle = pipe.transformer.register_forward_pre_hook(twice, with_kwargs=True)
    with pytest.raises(WrongBaseError, match="more than once a step"):
        family.predict(torch.zeros(1, 4, 16, 32, dtype=torch.float64), torch.tensor([0.5]), conditions)
    handle.remove()


def test_a_pipeline_is_as_it_was_after_it_was_followed():
    pipe = pipeline("flux schnell")
    before = {name: value for name, value in pipe.__dict__.items() if name[0] != "_"}
    family = Generic(Parts(pipe), CaptionReading())
    family.predict(torch.zeros(1, 4, 16, 32, dtype=torch.float64), torch.tensor([0.5]), embedded(family, PROMPTS[:1]))
    after = {name: value for name, value in pipe.__dict__.items() if name[0] != "_"}
    assert before.keys() == after.keys() and all(after[name] is value for name, value in before.items())
    assert "step" not in pipe.scheduler.__dict__


def test_a_package_that_a_pipeline_lacks_is_named(monkeypatch):
    pipe = pipeline("prx")
    monkeypatch.delattr(sys.modules[type(pipe).__module__], "ftfy")
    with pytest.raises(ConfigError, match=r"works by ftfy, which is not installed(?s:.*)pip install ftfy"):
        embedded(open_family(pipe), ["a dog"])


@pytest.mark.parametrize("kind", ["generic, levels by betas", pytest.param("easyanimate", marks=pytest.mark.slow)])
def test_a_file_of_a_model_without_a_table_is_taken_for_no_other(kind, tmp_path):
    pipe = made(KINDS | FOLLOWED, kind, torch.float32)
    attach(pipe, LoraConfig(r=2), "style", targets="attn")
    save_lora(pipe, tmp_path / "style.safetensors", name="style", format="diffusers")
    seen = converters.inspect(tmp_path / "style.safetensors")
    assert (seen.family, seen.readable_by) == ("", ())
    with pytest.raises(WrongBaseError, match="unknown family"):
        converters.convert(tmp_path / "style.safetensors", tmp_path / "other.safetensors", to="kohya")
    report = load_lora(pipe, tmp_path / "style.safetensors", name="again")
    assert seen.layers == len(slots_of(pipe, "again")) > 0 and len(report.matched) == seen.layers


def test_a_clip_skip_and_a_length_that_cannot_be_told_are_refused():
    with pytest.raises(ConfigError, match="Leave --clip-skip out"):
        Generic(Parts(pipeline("sd15")), CaptionReading(clip_skip=2))
    with pytest.raises(ConfigError, match="leave --max-length out"):
        Generic(Parts(pipeline("sd15")), CaptionReading(max_length=60))


def test_what_was_flattened_comes_back_filled_up_or_not():
    short = [(torch.rand(1, 3, 2), None, [torch.arange(4)]), "x"]
    long = [(torch.rand(1, 5, 2), None, [torch.arange(7)]), "a longer one"]
    rows = stacked([flattened("one", short), flattened("two", long)])
    for n, want in enumerate((short, long)):
        got = restored({name: value[n] for name, value in rows.items()}, torch.device("cpu"))
        assert torch.equal(got[0][0], want[0][0]) and got[0][1] is None and got[1] == want[1]
        assert torch.equal(got[0][2][0], want[0][2][0]) and type(got[0]) is tuple

"""Every family against its pipeline's own sampler: what the pipeline hands its denoiser is what training hands it, and the true target leads back."""

from __future__ import annotations

import contextlib
import inspect
import re

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, MochiPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.utils._python_dispatch import TorchDispatchMode

from diffpeft.drawing.calls import images_of, led
from diffpeft.drawing.prompts import of_line
from diffpeft.errors import ConfigError, WrongBaseError
from diffpeft.families import FAMILIES, CaptionReading, Frame, family_of, named_as, open_family
from diffpeft.families.densities import DENSITIES
from diffpeft.families.dit import ClipTransformer
from diffpeft.families.flow import Flow
from diffpeft.families.latents import spread
from diffpeft.families.prompts import embedded, stacked
from diffpeft.model.target import select
from diffpeft.train.cache import Texts
from diffpeft.train.config import TrainConfig
from diffpeft.train.sample import pictures, prompted
from diffpeft.train.samples import drawn as drawn_sample
from diffpeft.train.samples import keywords_of, settled, usual
from tests.families import clips, table
from tests.families.followed import FOLLOWED
from tests.families.pipelines import EDITS, KINDS, cells, pipeline

HEIGHT, WIDTH = 32, 64
UNREAD = ("self", "return_dict", "joint_attention_kwargs", "attention_kwargs")  # by the denoiser
PROMPTS = ["a red cat", "dog, very small, on a long wooden table"]
FRAMES = [Frame((HEIGHT, WIDTH), (0, 0), (HEIGHT, WIDTH))] * 2


@pytest.fixture(scope="module", params=cells([kind for kind in KINDS if kind not in EDITS]))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    """A pipeline whose one step ends at no noise."""
    pipe = pipeline(kind)
    if isinstance(pipe.scheduler, DDIMScheduler):
        pipe.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, set_alpha_to_one=True, timestep_spacing="trailing"
        )
    return pipe


@pytest.fixture
def family(kind, pipe):
    return open_family(pipe, CaptionReading(max_length=READ.get(KINDS[kind][0])))


@pytest.fixture
def latents(family):
    """Of images: the VAE's own mean of their latents, those that are trained on, and noise."""
    return latents_of(family, torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.float64) * 2 - 1)


def latents_of(family, pixels):
    """Of pixels [b, 3, *size]: the VAE's own mean of their latents, those that are trained on, and noise."""
    z, _ = family.encode(pixels)
    return (
        raw_latents(family, pixels),
        z,
        torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )


def packed(pipe, x):
    """Latents as tokens in the order of the pipeline."""
    return pipe._pack_latents(x, *x.shape)


def plain(pipe, x):
    return x


def tokens(pipe, x):
    """One token a pixel."""
    return x.flatten(2).mT


def frames_first(pipe, x):
    """Clips with frames before channels."""
    return x.transpose(1, 2)


def one_frame(pipe, x):
    """Images as clips."""
    return x.unsqueeze(2)


def beside_nothing(pipe, x):
    """Clips with channels last, and zeros for a first frame and its mask."""
    x = x.movedim(1, -1)
    return torch.cat([x, torch.zeros_like(x), torch.zeros_like(x[..., :1])], dim=-1)


# {family: how its pipeline takes latents, and how its denoiser says a velocity}; as they are, if it is not here
SPELT = {
    "flux": (packed, packed),
    "flux_kontext": (packed, packed),
    "chroma": (packed, packed),
    "qwen_image": (packed, packed),
    "flux2": (plain, tokens),
    "lumina2": (plain, lambda pipe, v: -v),
    "hidream": (plain, lambda pipe, v: -v),
    "krea2": (packed, packed),
    "ideogram4": (tokens, lambda pipe, v: -torch.cat([v.new_zeros(len(v), TEXT, v.shape[1]), tokens(pipe, v)], 1)),
    "ltx": (tokens, tokens),
    "pixart": (plain, lambda pipe, v: torch.cat([v, torch.ones_like(v)], dim=1)),
    "z_image": (plain, lambda pipe, v: [-one.unsqueeze(1) for one in v]),
    "ltx2": (tokens, tokens),
    "cogvideox": (frames_first, frames_first),
    "mochi": (plain, lambda pipe, v: -v),
    "cosmos": (one_frame, one_frame),
    "kandinsky5_video": (beside_nothing, lambda pipe, v: v.movedim(1, -1)),
}
BINNED = {
    name: {"use_resolution_binning": False} for name in ("pixart", "sana")
}  # whose pictures have sizes of their own
# {family: how its pipeline is asked for one picture without guidance}
ASKED = {
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0},
    **BINNED,
    "krea2": {"guidance_scale": 0.0},
    "ideogram4": {"guidance_schedule": None},
    "ernie_image": {"use_pe": False},
    "wan": {"num_frames": 1},
    "ltx": {"num_frames": 1},
    "hunyuan_video": {"num_frames": 1, "true_cfg_scale": 1.0},
    "hunyuan_video15": {"num_frames": 1, "guidance_scale": None},  # it has a guider
    "ltx2": {"num_frames": 1, "stg_scale": 0.0, "modality_scale": 1.0}
    | {
        f"audio_{scale}": one for scale, one in {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}.items()
    },
    "cogvideox": {"num_frames": 1},
    "mochi": {"num_frames": 1},
    "sana_video": {"frames": 1, "use_resolution_binning": False},
    "kandinsky5_video": {"num_frames": 1},
    "skyreels_v2": {"num_frames": 1},
    "easyanimate": {"num_frames": 1},
    "cosmos25": {"num_frames": 1},
}


# {family: how its pipeline is asked for guidance, and for it by a blank prompt}, where that is not as it is elsewhere
GUIDED = {"qwen_image": {"true_cfg_scale": 3.0}, "hunyuan_video15": {}}
BLANK = {
    name: {"negative_prompt": ["", ""]}
    for name in ("qwen_image", "kandinsky5_video", "easyanimate", "cosmos", "cosmos25")
}
# {family: how many tokens of captions are read here: less than usual, for speed}
TEXT = 40
READ = {family: TEXT for family in FAMILIES if family not in ("sd15", "sd2", "sdxl", "flux", "flux_kontext")}
READ["easyanimate"] = 256
READ |= dict.fromkeys(("hunyuan_video", "krea2", "qwen_image", "flux2", "cosmos25"), 120) | {
    "lumina2": 80
}  # most are of the system prompt
# that take no negative texts; the second has no system prompt before them, and the last no instruction
BLANK_ONLY = {"flux2", "lumina2", "ideogram4", "sana_video"}
UNCOUNTED = {"ernie_image", "hunyuan_video15", "easyanimate"}  # whose pipelines take no number of tokens


def asked(family, height=HEIGHT, width=WIDTH):
    """How the pipeline is asked for one picture of a size without guidance or control images."""
    name = NAMES[type(family)]
    length = {"max_sequence_length": READ[name]} if name in READ and name not in UNCOUNTED else {}
    settings = {"guidance_scale": 1.0} | ASKED.get(name, {}) | length | family.pictured((), (width, height))
    return {name: value for name, value in settings.items() if value is not None or name == "guidance_schedule"}


NAMES = {cls: name for name, cls in FAMILIES.items()}


def prompts_of(family):
    """Two prompts for one call of the pipeline, which fills up the shorter: where it says so to nobody, they are of one length."""
    return ["a red cat", "a big dog"] if NAMES[type(family)] in UNMASKED else PROMPTS


UNMASKED = ("kandinsky5_video",)


def spelt(family, x, answer=False):
    """Latents as the pipeline takes them, or an answer of the denoiser."""
    return SPELT.get(NAMES[type(family)], (plain, plain))[answer](family.pipe, x)


def raw_latents(family, pixels):
    """The VAE's own mean of the latents, of clips of one frame where it reads clips."""
    vae = family.pipe.vae
    clips = any(isinstance(m, torch.nn.Conv3d) for m in vae.modules())
    pixels = pixels.unsqueeze(2) if clips and pixels.ndim == 4 else pixels
    with torch.no_grad():
        answers = [vae.encode(one) for one in pixels.split(1)]
    return torch.cat([out.latent if "latent" in out else out.latent_dist.mean for out in answers])


def draw(family, x, sigma=None, prompts=PROMPTS, **options):
    """One step of the pipeline from noised latents, without guidance; its decoder is asked for nothing but what it was given.

    It begins at a share of noise, where it is said.
    """
    pipe, decoded, times = family.pipe, [], type(family.pipe.scheduler).set_timesteps

    def begun(scheduler, *_, sigmas=None, timesteps=None, mu=None, device=None, **__):
        said = {} if mu is None else {"mu": mu}
        if explodes(scheduler):
            times(scheduler, 2, device=device)
            scheduler.sigmas[:2] = torch.tensor([sigma / (1 - sigma), 1e-7])
            return
        times(
            scheduler,
            sigmas=[sigma],
            device=device,
            **(said if timesteps is None else said | {"timesteps": [1000 * sigma]}),
        )

    def decode(z, *_, **__):
        decoded.append(z)
        return DecoderOutput(torch.zeros(len(z), 3, *z.shape[2:-2], HEIGHT, WIDTH))

    pipe.vae.decode = decode
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2 if isinstance(pipe, MochiPipeline) else 1}
    if explodes(pipe.scheduler):  # (1 - s) z + s n is handed over as z + s n / (1 - s), which it multiplies
        x = x / (1 - sigma) / pipe.sigma_max
    try:
        with times_set_by(pipe, times if sigma is None else begun):
            pipe(prompt=list(prompts), latents=spelt(family, x), output_type="pt", **size | asked(family) | options)
    finally:
        del pipe.vae.decode
    return decoded[0]


def explodes(scheduler):
    """Whether latents are z + s n for a scheduler, as Cosmos 2 has them: its last step but one ends at no noise, and the last does nothing."""
    return "sigma_data" in scheduler.config


@contextlib.contextmanager
def times_set_by(pipe, function):
    """Another function that sets the scheduler's times."""
    with pytest.MonkeyPatch.context() as patch:  # of its class: pipelines copy it
        patch.setattr(type(pipe.scheduler), "set_timesteps", function)
        yield


def calls(model, run):
    """[{argument: value}] of every call of a model while `run` runs; what is not given or None is left out."""
    seen = []

    def note(_, args, kwargs):
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        bound = {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in bound.items()
        }  # some change them in place
        seen.append({k: v for k, v in bound.items() if v is not None and k not in UNREAD})

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen


def first_level(family, shape):
    """The level at which the pipeline's first step begins, once it has run: its place, and the time it said."""
    scheduler = family.pipe.scheduler
    if isinstance(family.levels, Flow):
        return family.levels.place(noise_of(scheduler)[:1], shape).repeat(2)
    return (scheduler.timesteps[:1].double() + 0.5).repeat(2) / len(family.levels.alphas)


def noise_of(scheduler):
    """The shares of noise of a flow's steps."""
    if explodes(scheduler):
        return scheduler.sigmas.double() / (1 + scheduler.sigmas.double())
    return 1 - scheduler.sigmas.double() if scheduler.config.get("invert_sigmas") else scheduler.sigmas.double()


SIGMAS = {"flow": [0.6, 0.15]}  # where a pipeline is made to begin


def test_every_family_is_known_by_its_pipeline(kind, pipe):
    family = KINDS[kind][0]
    assert family_of(pipe) == named_as(family) and type(open_family(pipe)) is FAMILIES[family]
    of_texts = {
        id for id, cls in FAMILIES.items() if not (cls.controls[1] or cls.first_frame)
    }  # others have laws of their own
    assert {family for family, _ in (KINDS | FOLLOWED).values()} >= of_texts


@pytest.mark.parametrize("kind", EDITS)
def test_variants_are_known_by_their_pipelines_and_have_the_layer_names_of_their_family(kind):
    pipe, family = pipeline(kind), KINDS[kind][0]
    assert type(open_family(pipe)) is FAMILIES[family] and family_of(pipe) == named_as(family) != family


def test_the_page_of_families_says_what_the_registries_say():
    """`python -m tests.families.table` writes it."""
    assert table.text() in table.PAGE.read_text(encoding="utf-8")


# the pipeline fills texts up, which masks and places make equal to not doing it
TRIMMED = ("krea2", "ideogram4", "hunyuan_video15")
# {family: what its denoiser is told in training alone}: of LTX-2 that nothing of the audio reaches the video
TOLD = {"ltx2": {"isolate_modalities": True}}


def test_the_denoiser_reads_what_the_pipeline_hands_it(kind, family, latents):
    _, z, n = latents
    read_alike(kind, family, z, n)


OF_FRAMES = [kind for kind in KINDS if issubclass(FAMILIES[KINDS[kind][0]], ClipTransformer)]
FRAMES_OF = {"mochi": 7}  # of a clip: what the VAE takes


@pytest.fixture(scope="module")
def clip(kind, pipe):
    """Pixels of clips of several frames, and how a pipeline is asked for such."""
    if kind not in OF_FRAMES:
        pytest.skip("it has no frames")
    n = FRAMES_OF.get(kind, 9)
    pixels = torch.rand(2, 3, n, HEIGHT, WIDTH, dtype=torch.float64) * 2 - 1
    return pixels, {name: n for name in ("num_frames", "frames") if name in ASKED[KINDS[kind][0]]}


def test_of_a_clip_the_denoiser_reads_what_the_pipeline_hands_it(kind, family, clip):
    pixels, options = clip
    _, z, n = latents_of(family, pixels)
    patch = family.parts.configs[family.denoiser].get("patch_size_t") or 1
    assert z.shape[2] == -(-((pixels.shape[2] - 1) // family.temporal + 1) // patch) * patch > 1 and family.rate
    read_alike(kind, family, z, n, **options)


def test_one_step_with_the_true_target_leads_back_to_the_clip(family, clip, monkeypatch):
    pixels, options = clip
    lead_back(family, latents_of(family, pixels), monkeypatch, **options)


def read_alike(kind, family, z, n, **options):
    """Compare what the denoiser reads in a pipeline and in training."""
    prompts = prompts_of(family)
    sigma = SIGMAS.get(family.levels.kind, [None])[0]
    denoiser = family.parts(family.denoiser)
    theirs, *later = calls(denoiser, lambda: draw(family, n, sigma, prompts, **options))
    assert len(later) == len(family.pipe.scheduler.timesteps) - 1
    u = first_level(family, z.shape)
    time = family.levels.noised(z, n, u).t
    conditions = embedded(family, prompts) | family.framed(FRAMES)
    (ours,) = calls(denoiser, lambda: family.predict(n, time, conditions))
    name = KINDS[kind][0]
    if name in TRIMMED or name in TOLD:
        torch.testing.assert_close(ours["timestep"].double(), theirs["timestep"].double(), rtol=1e-6, atol=0)
        said = [reading | TOLD.get(name, {}) for reading in (ours, theirs)]
        with torch.no_grad():
            answers = [denoiser(**reading, return_dict=False)[0][:, -n[0, 0].numel() :] for reading in said]
        torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-6)  # places in fp32
        return
    assert ours.keys() == theirs.keys()
    compare(ours, theirs)


def compare(ours, theirs, rtol=1e-6, atol=1e-9):
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert ours[name].keys() == value.keys()
            compare(ours[name], value, rtol, atol)
        elif isinstance(value, (list, tuple)) and isinstance(value[0], torch.Tensor):
            compare(dict(enumerate(ours[name])), dict(enumerate(value)), rtol, atol)
        elif not isinstance(value, torch.Tensor):
            assert ours[name] == value, name
        else:  # times are in fp32 in the schedulers
            torch.testing.assert_close(
                ours[name].double(), value.double().expand(ours[name].shape), rtol=rtol, atol=atol
            )


def test_one_step_with_the_true_target_leads_back_to_the_picture(family, latents, monkeypatch):
    """Normalisation of the latents, time, sign and target at once: what the pipeline decodes is what the VAE had encoded."""
    lead_back(family, latents, monkeypatch)


def lead_back(family, latents, monkeypatch, **options):
    raw, z, n = latents
    for sigma in SIGMAS.get(family.levels.kind, [None]):
        denoiser, target = family.parts(family.denoiser), [n]

        def answer(*_, target=target, audio_hidden_states=None, return_dict=False, **__):
            velocity = spelt(family, target[0], answer=True)
            if return_dict:
                return Transformer2DModelOutput(velocity)
            return (velocity,) if audio_hidden_states is None else (velocity, torch.zeros_like(audio_hidden_states))

        monkeypatch.setattr(denoiser, "forward", answer)
        draw(family, n, sigma, **options)  # sets the scheduler's times
        noised = family.levels.noised(z, n, first_level(family, z.shape))
        target[0] = noised.target
        torch.testing.assert_close(
            draw(family, noised.x, sigma, **options).double(), raw, rtol=0, atol=2e-5
        )  # fp32 schedulers
        target[0] = noised.target + 0.1  # a test that can fail
        assert (draw(family, noised.x, sigma, **options) - raw).abs().max() > 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_models_in_half_precision_predict_in_single(kind):
    family = open_family(pipeline(kind, torch.bfloat16), CaptionReading(max_length=READ.get(KINDS[kind][0])))
    z, _ = family.encode(torch.zeros(2, 3, HEIGHT, WIDTH))
    noised = family.levels.noised(z, torch.randn_like(z), torch.tensor([0.3, 0.6]))
    answer = family.predict(noised.x, noised.t, embedded(family, PROMPTS) | family.framed(FRAMES))
    assert answer.dtype == torch.float32 and answer.shape == z.shape and answer.isfinite().all()


@pytest.mark.parametrize("place", [0.02, 0.5, 0.97])
def test_every_level_leads_back(place, family, latents):
    _, z, n = latents
    noised = family.levels.noised(z, n, torch.full((2,), place, dtype=torch.float64))
    scheduler = type(family.pipe.scheduler).from_config(family.pipe.scheduler.config)
    if noised.kind == "flow":
        sigma = spread(noised.sigma, n)
        back = noised.x - sigma * noised.target  # Euler's step to 0
    else:
        scheduler.set_timesteps(1)
        back = scheduler.step(noised.target, noised.t[0], noised.x).prev_sample
    torch.testing.assert_close(back, z, rtol=0, atol=2e-5)
    signal = {"flow": 1 - noised.sigma}.get(noised.kind, (1 - noised.sigma**2).sqrt())
    torch.testing.assert_close(spread(signal, z) * z + spread(noised.sigma, z) * n, noised.x, rtol=0, atol=1e-5)
    snr = signal**2 / noised.sigma**2  # 1 - sigma^2 cancels in fp32
    torch.testing.assert_close(snr, noised.snr.to(signal), rtol=1e-4, atol=1e-6)


def test_a_level_and_its_share_of_noise_are_inverse(family):
    shape, u = (1, 4, HEIGHT // 2, WIDTH // 2), torch.linspace(0.0005, 0.9995, 40, dtype=torch.float64)
    sigma = family.levels.sigma(u, shape)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(family.levels.sigma(family.levels.place(sigma, shape), shape), sigma, rtol=1e-6, atol=0)
    z = torch.zeros(len(u), *shape[1:], dtype=torch.float64)
    torch.testing.assert_close(
        family.levels.noised(z, z, u).sigma.double(), sigma.double(), rtol=1e-3, atol=1e-4
    )  # 1 - a cancels in fp32


def test_a_flow_is_shifted_by_the_size_as_the_sampler_shifts_it(kind, family):
    if family.levels.kind != "flow":
        assert family.levels.density == "uniform"
        return
    assert family.levels.density == "logit_normal"
    if KINDS[kind][0] in ("ideogram4", "cosmos"):
        return  # they have levels of their own
    for height, width in ((HEIGHT, WIDTH), (3 * HEIGHT, 2 * WIDTH)):
        scheduler, said = family.pipe.scheduler, set_by(family, height, width)
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2], **said)
        want = noise_of(scheduler)[:3]
        shape = family.encode(torch.zeros(1, 3, height, width, dtype=torch.float64))[0].shape
        got = family.levels.sigma(torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64), shape)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(32, 64), (512, 512), (1024, 2048)])
def test_the_levels_of_ideogram_are_shifted_as_its_pipeline_computes_them(height, width):
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu

    family, n = open_family(pipeline("ideogram4")), 12
    want = _logit_normal_sigmas(n, _resolution_aware_mu(height, width, 0.0), std=1.5).double()
    places = torch.special.ndtri(torch.arange(n, 0, -1, dtype=torch.float64) / n)
    got = family.levels.sigma((1.5 * places).sigmoid(), (1, 16, height // 4, width // 4))
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-5, atol=0)  # the first is cut short of pure noise


class Enough(Exception):
    """What was to be seen has been seen."""


def set_by(family, height, width):
    """The mu that the pipeline gives its scheduler for pictures of a size, in as many steps as it takes by itself."""
    said = {}

    def noted(*_, sigmas=None, timesteps=None, mu=None, **__):
        said.update({} if mu is None else {"mu": mu})
        raise Enough

    with times_set_by(family.pipe, noted), pytest.raises(Enough):
        family.pipe(prompt="a cat", height=height, width=width, **asked(family, height, width))
    return said


def test_prompts_as_embeddings_draw_what_the_texts_draw(family):
    pipe, seed = family.pipe, lambda: torch.Generator().manual_seed(0)
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "pt"}
    name = NAMES[type(family)]
    options |= asked(family) | GUIDED.get(name, {"guidance_scale": 3.0})
    with torch.no_grad():
        prompts = prompts_of(family)
        keywords = family.prompted(embedded(family, prompts), embedded(family, ["", ""]))
        want = pipe(prompt=list(prompts), generator=seed(), **BLANK.get(name, {}), **options)[0]
        encoders = {name: getattr(pipe, name) for name in family.text_encoders}
        for name in encoders:
            setattr(pipe, name, None)  # they have left the device
        got = pipe(**options | keywords, generator=seed())[0]
        for name, encoder in encoders.items():
            setattr(pipe, name, encoder)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_pictures_are_drawn_from_what_was_read(family):
    """Of pipelines of every kind, as class images are, with text encoders that are gone."""
    texts = {prompt: embedded(family, [prompt] * 2) for prompt in (PROMPTS[0], "")}

    def asked_for(prompts):
        size = {"height": HEIGHT, "width": WIDTH, **family.pictured((), (WIDTH, HEIGHT))}
        return prompted(family, lambda prompts, controls: texts[prompts[0]], prompts) | size

    drawn = pictures(family.pipe, [PROMPTS[0]] * 2, [1, 2], steps=2, guidance=3.0, asked=asked_for)
    assert drawn.shape == (2, HEIGHT, WIDTH, 3) and (drawn[0] != drawn[1]).any()  # by their seeds


@torch.no_grad()
def test_a_sample_is_what_the_pipeline_draws_of_its_texts(family):
    """With a negative prompt and guidance, where the model has such; it is told everything else by the settled prompt."""
    guided, name = "cfg" in family.guidance, NAMES[type(family)]
    if name in (*BINNED, "flux_kontext"):
        pytest.skip("it draws in sizes of its own, large ones")
    negative = PROMPTS[1] if guided and name not in BLANK_ONLY else None
    flags = ["--l 2.5"] * guided + [f"--n {negative}"] * (negative is not None)
    line = f"{PROMPTS[0]} --s 2 --w {WIDTH} --h {HEIGHT} --d 5 {' '.join(flags)}"
    (prompt,) = settled(TrainConfig(), family, [of_line(line, "")], 32)
    keys = ("max_sequence_length", "use_pe", "num_frames", "frames", "guidance_schedule", "use_resolution_binning")
    options = {key: value for key, value in asked(family).items() if key in keys}
    options |= {} if negative is None else {"negative_prompt": negative}
    seed = torch.Generator().manual_seed(5)
    with led(family.pipe, keywords_of(family, prompt)) as keywords:
        want = family.pipe(prompt=PROMPTS[0], generator=seed, output_type="pil", **{**options, **keywords})
    got, *_ = drawn_sample(family, Texts(family), prompt, lambda: None)  # small Wans draw two frames at least
    difference = np.asarray(got).astype(int) - np.asarray(images_of(want)[0]).astype(int)
    assert got.size == (WIDTH, HEIGHT) and np.abs(difference).max() <= 1


@torch.no_grad()
def test_a_caption_is_read_alike_alone_and_among_others(family, latents):
    _, z, n = latents
    together, alone = embedded(family, PROMPTS), [embedded(family, [prompt]) for prompt in PROMPTS]
    one_by_one = stacked([{name: t[0] for name, t in row.items()} for row in alone])
    compare(one_by_one, together)
    assert any((t[0] != t[1]).any() for t in together.values())  # not cut before the caption begins
    noised, frames = family.levels.noised(z, n, torch.tensor([0.3, 0.6], dtype=torch.float64)), family.framed(FRAMES)
    both = family.predict(noised.x, noised.t, together | frames)
    each = [
        family.predict(noised.x[i : i + 1], noised.t[i : i + 1], row | family.framed(FRAMES[:1]))
        for i, row in enumerate(alone)
    ]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-6, atol=1e-6 if NAMES[type(family)] in SINGLE else 1e-9)


def test_every_layer_that_a_preset_chooses_is_learnt(family, latents):
    """A layer that nothing reads is no error of the user's: it is not chosen."""
    _, z, n = latents
    model, unread = family.parts(family.denoiser), family.unread.get(family.denoiser)
    model.requires_grad_(True)
    conditions = {k: t.detach() for k, t in embedded(family, PROMPTS).items()} | family.framed(FRAMES)
    noised = family.levels.noised(z, n, torch.tensor([0.3, 0.6], dtype=torch.float64))
    (family.predict(noised.x, noised.t, conditions) - noised.target).square().sum().backward()
    layers = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)}
    idle = {n for n, m in layers.items() if m.weight.grad is None or not m.weight.grad.any()}
    model.zero_grad(set_to_none=True)
    for preset in ("attn", "attn-mlp", "full"):
        chosen = select({"m": model}, targets=family.presets.get(preset, preset), exclude=unread)["m"]
        assert chosen.keys() and not idle & chosen.keys(), preset
    everything = select({"m": model}, targets="full")["m"].keys()
    excluded = {name for name in everything if re.fullmatch(unread or "", name)}
    assert idle & everything <= excluded and ("experts" in str(unread) or idle & everything == excluded)


@pytest.mark.slow
def test_experts_of_hidream_hand_gradients_on():
    """Along one direction, against differences: diffusers' own way without training leaves them out."""
    family, seed = open_family(pipeline("hidream"), CaptionReading(max_length=TEXT)), torch.Generator().manual_seed(0)
    x, weights, along = (torch.randn(1, 4, 16, 32, generator=seed, dtype=torch.float64) for _ in range(3))
    read, t = {k: v.detach() for k, v in embedded(family, PROMPTS[:1]).items()}, torch.tensor([0.5])
    (family.predict(x.requires_grad_(), t, read) * weights).sum().backward()
    with torch.no_grad():
        above, below = ((family.predict(x + s * along, t, read) * weights).sum() for s in (1e-4, -1e-4))
    torch.testing.assert_close((x.grad * along).sum(), (above - below) / 2e-4, rtol=2e-3, atol=0)


def test_a_kandinsky_of_sparse_attention_has_sides_of_whole_squares():
    configs = {"vae": {"spatial_compression_ratio": 8}, "transformer": {"attention_type": "nabla"}}
    kind = FAMILIES["kandinsky5_video"]
    assert kind.sizes(configs).multiple == 128 and kind.sizes(configs).resolution % 128 == 0
    assert kind.sizes(configs | {"transformer": {"attention_type": "regular"}}).multiple == 16


@pytest.mark.slow
def test_hunyuan_video_15_reads_words_in_quotation_marks_and_is_guided_by_its_guider():
    """A caption with such words beside one without, and texts of two lengths in both encoders."""
    pipe = pipeline("hunyuan_video15")
    pipe.guider = ClassifierFreeGuidance(guidance_scale=4.0)
    family = open_family(pipe, CaptionReading(max_length=TEXT))
    assert usual(family, "cfg") == 4.0
    with led(pipe, {"guidance_scale": 2.5}) as keywords:
        assert keywords == {} and pipe.guider.guidance_scale == 2.5
    assert pipe.guider.guidance_scale == 4.0
    prompts = ['a sign that says "open" over a door', "a cat"]
    assert embedded(family, prompts)["glyphs_length"].tolist()[1] == 0 < embedded(family, prompts)["glyphs_length"][0]
    options = {"height": HEIGHT, "width": WIDTH, "num_frames": 1, "num_inference_steps": 2, "output_type": "pt"}
    x = torch.randn(2, 4, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keywords = family.prompted(embedded(family, prompts), embedded(family, ["", ""]))
    with torch.no_grad():
        want = family.pipe(prompt=prompts, latents=x, **options)[0]
        torch.testing.assert_close(family.pipe(latents=x, **options | keywords)[0], want, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_nothing_of_the_audio_reaches_what_ltx_2_trains():
    family, seen = open_family(pipeline("ltx2"), CaptionReading(max_length=TEXT)), []
    model, conditions = family.parts("transformer"), embedded(family, PROMPTS)
    x, t = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)

    def loud(_, args, kwargs):
        return args, kwargs | {"audio_hidden_states": torch.randn(2, 5, 4, dtype=torch.float64), "audio_num_frames": 5}

    with torch.no_grad():
        seen.append(family.predict(x, t, conditions))
        with model.register_forward_pre_hook(loud, with_kwargs=True):
            seen.append(family.predict(x, t, conditions))
    assert torch.equal(*seen)


@pytest.mark.slow
def test_a_skyreels_of_diffusion_forcing_reads_what_its_pipeline_hands_it():
    """At every step of a clip: one time for all frames, and the rate of frames."""
    pipe = clips.skyreels_v2(forced=True)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.double().eval()
    family = open_family(pipe, CaptionReading(max_length=TEXT))
    z, _ = family.encode(torch.rand(1, 3, 9, HEIGHT, WIDTH, dtype=torch.float64) * 2 - 1)
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": 8, "num_inference_steps": 4}  # it rounds up
    read = embedded(family, PROMPTS[:1])
    keywords = family.prompted(read, read) | size | {"guidance_scale": 1.0, "output_type": "latent"}

    def drawn():  # it fails where it is given latents
        return pipe(generator=torch.Generator().manual_seed(0), **keywords)[0].double()

    seen = calls(pipe.transformer, drawn)
    n = seen[0]["hidden_states"].double()
    assert len(seen) == 4 and n.shape == z.shape
    for theirs in seen:
        time = theirs["timestep"][:, 0].double() / 1000
        (ours,) = calls(pipe.transformer, lambda: family.predict(theirs["hidden_states"], time, read))  # noqa: B023
        assert ours.keys() == theirs.keys()
        compare(ours, theirs)
    both, t = torch.cat([n, z]), torch.tensor([0.3, 0.8], dtype=torch.float64)
    answers = [family.predict(x[None], t[i : i + 1], read) for i, x in enumerate(both)]
    torch.testing.assert_close(family.predict(both, t, embedded(family, PROMPTS[:1] * 2)), torch.cat(answers))


def test_a_cogvideox_whose_places_are_added_reads_captions_of_one_length():
    with pytest.raises(ConfigError, match="for 40 tokens"):
        open_family(pipeline("cogvideox"), CaptionReading(max_length=30))
    assert open_family(pipeline("cogvideox 1.5"), CaptionReading(max_length=30)).max_length == 30


SINGLE = ("mochi", "kandinsky5_video")  # that compute in single precision inside


def test_conditions_of_encoders_and_frames_have_names_of_their_own(family):
    names = [name for encoder in family.text_encoders for name in family.embed(encoder, PROMPTS)]
    names += family.framed(FRAMES)
    assert len(names) == len(set(names))
    for conditions in (embedded(family, PROMPTS), family.framed(FRAMES)):
        assert all(len(t) == 2 for t in conditions.values())


def test_sdxl_reads_the_height_before_the_width():
    family = open_family(pipeline("sdxl"))
    frame = Frame(original=(700, 500), crop=(30, 0), target=(512, 448))
    assert family.framed([frame])["time_ids"].tolist() == [[700, 500, 30, 0, 512, 448]]
    want = family.pipe._get_add_time_ids(frame.original, frame.crop, frame.target, torch.float64, 24)
    assert torch.equal(family.framed([frame])["time_ids"].double(), want)


def test_densities_are_distributed_as_they_say():
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    normal = torch.logit(DENSITIES["logit_normal"](u))
    assert abs(normal.mean()) < 1e-6 and abs(normal.std() - 1) < 1e-3 and torch.equal(DENSITIES["uniform"](u), u)
    assert DENSITIES["logit_normal"](torch.zeros(1)) == 0


def test_a_scheduler_with_levels_of_its_own_is_refused():
    from diffusers import EDMEulerScheduler

    pipe = pipeline("sdxl")
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(WrongBaseError, match="EDMEulerScheduler"):
        open_family(pipe)


class NoWaiting(TorchDispatchMode):
    """Notes what comes from the CPU to a device in a way that waits for the device. Values are read off the meta device by nobody."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        moved = isinstance(out, torch.Tensor) and out.is_meta and args and isinstance(args[0], torch.Tensor)
        if moved and not args[0].is_meta and not kwargs.get("non_blocking") and out.numel() > 1:
            self.waits.append((str(func), args[0].shape))
        return out


@pytest.mark.parametrize("kind", ["sd15", "sdxl, v and zero-terminal SNR", "flux dev"])
def test_a_step_waits_for_no_device(kind):
    """On the meta device, whose numbers cannot be read."""
    family = open_family(pipeline(kind))
    conditions = {name: t.detach() for name, t in embedded(family, PROMPTS).items()}
    family.parts(family.denoiser).to("meta")
    z = torch.zeros(2, 4, 16, 16, device="meta", dtype=torch.float64)
    with NoWaiting() as mode:
        noised = family.levels.noised(z, z, torch.tensor([0.2, 0.9]))
        family.predict(noised.x, noised.t, conditions | family.framed(FRAMES))
    assert noised.snr.is_meta and not mode.waits


# -- captions ------------------------------------------------------------------------------------------------------------

PER = 30  # tokens that fit into a chunk: the tokenizer has 32
LONG = " ".join(["cat", "dog", "red", "car"] * 12)
CLIPS = {"sd15": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


@pytest.mark.parametrize("kind", CLIPS)
def test_a_long_caption_is_read_in_chunks(kind):
    """Each chunk as a prompt of its own; a caption without a second chunk has a blank one; what is pooled is the first's."""
    pipe = pipeline(kind)
    one, two = open_family(pipe), open_family(pipe, CaptionReading(max_length=2 * PER))
    assert (one.max_length, two.max_length) == (PER, 2 * PER)
    assert len(pipe.tokenizer(LONG, add_special_tokens=False).input_ids) == len(LONG.split())
    words = LONG.split()
    prompts = [LONG, "a cat", " ".join(words * 3)]
    chunks = [words[:PER], words[PER:], ["a", "cat"], [], words[:PER], (words * 3)[PER : 2 * PER]]
    for encoder in CLIPS[kind]:
        got = two.embed(encoder, prompts)
        want = one.embed(encoder, [" ".join(chunk) for chunk in chunks])
        assert torch.equal(got[encoder], want[encoder].unflatten(0, (3, 2)).flatten(1, 2))
        assert "pooled" not in got or torch.equal(got["pooled"], want["pooled"][::2])


@torch.no_grad()
def test_an_earlier_layer_of_clip_is_the_last_of_one_without_those_after_it():
    pipe = pipeline("sd15")
    ours = [
        open_family(pipe, CaptionReading(clip_skip=n)).embed("text_encoder", PROMPTS)["text_encoder"] for n in (1, 2, 3)
    ]
    layers = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder.layers
    for states in ours:
        theirs, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        torch.testing.assert_close(states, theirs, rtol=0, atol=1e-12)
        del layers[-1]


@pytest.mark.parametrize("kind, reading", [("sd15", {}), ("sd15", {"clip_skip": 2}), ("sdxl", {}), ("flux dev", {})])
def test_what_no_gradient_would_reach_is_said(kind, reading):
    """Of the layers of the encoders that can be trained, those that the denoiser's conditions do not depend on."""
    family = open_family(pipeline(kind, torch.float32), CaptionReading(**reading))
    for encoder in family.adaptable:
        model = family.parts(encoder)
        sum(t.square().sum() for t in family.embed(encoder, PROMPTS).values()).backward()
        idle = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.grad is None}
        assert idle == {n for n in idle if encoder in family.unread and re.fullmatch(family.unread[encoder], n)}
        reached = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - idle
        assert not any(re.fullmatch(family.unread.get(encoder, ""), n) for n in reached)


@pytest.mark.parametrize(
    "kind, reading, says",
    [
        ("sd15", CaptionReading(max_length=PER + 1), "30, 60"),
        ("sdxl", CaptionReading(max_length=PER + 2), "30, 60"),
        ("flux dev", CaptionReading(max_length=513), "512"),
        ("sd15", CaptionReading(clip_skip=4), "to 3"),
        ("sdxl", CaptionReading(clip_skip=2), "Leave --clip-skip out"),
        ("flux dev", CaptionReading(clip_skip=2), "Leave --clip-skip out"),
    ],
)
def test_a_way_to_read_captions_that_a_model_cannot_is_refused(kind, reading, says):
    with pytest.raises(ConfigError, match=says):
        open_family(pipeline(kind), reading)


def test_flux_reads_as_many_tokens_of_t5_as_it_is_told():
    family = open_family(pipeline("flux schnell"), CaptionReading(max_length=256))
    theirs, _, _ = family.pipe.encode_prompt(PROMPTS, None, max_sequence_length=256)
    torch.testing.assert_close(family.embed("text_encoder_2", PROMPTS)["text"], theirs, rtol=0, atol=1e-12)

"""Samples while training: each is what the stock pipeline draws with the saved adapter, and drawing changes nothing else. On tiny pipelines."""

import json
import os
import signal
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffpeft
from diffpeft import ConfigError, TrainConfig
from diffpeft.drawing.prompts import of_line
from diffpeft.errors import WrongBaseError
from diffpeft.families import open_family
from diffpeft.model.attach import attach
from diffpeft.model.state import trained_parameters
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth, samples
from diffpeft.train.check import check
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.gallery import forget, newest_sample
from diffpeft.train.signals import Interrupted
from tests.families.pipelines import pipeline
from tests.single_file import original
from tests.train.pictures import photos_in

XL = "sdxl, latent statistics and blank prompts"
KINDS = ["sd15", "flux dev"]
KINDS += [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd2, v", "sdxl", XL, "flux schnell")]
LINES = "a red cat --n a dog --l 3 --w 48 --h 32 --s 3\na blue cat --d 7\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saves tiny pipelines of a kind; the folder."""
    root, saved = tmp_path_factory.mktemp("models"), {}

    def of(kind, change=None):
        key = (kind, change and change.__name__)
        if key not in saved:
            saved[key] = root / f"model{len(saved)}"
            pipe = pipeline(kind, torch.float32)
            if change:
                change(pipe)
            pipe.save_pretrained(saved[key])
        return str(saved[key])

    return of


@pytest.fixture
def config(models, tmp_path):
    """Options of a short run of a kind of pipeline."""
    photos = photos_in(tmp_path)
    (tmp_path / "prompts.txt").write_text(LINES)

    def of(kind="sd15", **options):
        fixed = {
            "model": models(kind), "data": str(photos), "out": str(tmp_path / "out"), "name": "a", "instance_prompt": "an emoji of [trigger]",
            "trigger": "sks", "resolution": 32, "steps": 3, "rank": 2, "lr": 5e-2, "targets": "attn-mlp", "save_every": 0, "sample_every": 2,
            "sample_steps": 2, "sample_prompts": str(tmp_path / "prompts.txt"), "overwrite": True,
        }  # fmt: skip
        return TrainConfig(**fixed | options)

    return of


def grey(source):
    return np.asarray(source).astype(int)


def drawn(out, step, name):
    return grey(Image.open(out / "samples" / f"step{step:08d}" / name))


def stock(model, file=None, strength=1.0):
    """The stock pipeline, with the adapter in a file of ours."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if file is not None:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="a")
        pipe.set_adapters(["a"], [strength])
    return pipe


def asked(pipe, prompt, seed=42, width=32, height=32, steps=2, **options):
    torch.manual_seed(5)  # of no importance
    generator = torch.Generator().manual_seed(seed)
    size = {"width": width, "height": height, "num_inference_steps": steps, "generator": generator}
    return grey(pipe(prompt, **size, **options).images[0])


def negative(kind, text):
    """A negative prompt and a guidance, in the words of a kind's pipeline."""
    return {"negative_prompt": text, "true_cfg_scale" if kind.startswith("flux") else "guidance_scale": 3.0}


def same(a, b):
    """fp32 operations in another order: at most one grey level apart after rounding."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_what_the_stock_pipeline_draws_with_the_saved_adapter(kind, config, tmp_path):
    encoders = kind in ("sd15", "sdxl")
    run = dreambooth.train(config(kind, train_text_encoder=encoders))
    (file, *_), out = dreambooth.save(run), tmp_path / "out"
    base = stock(run.config.model)
    first = asked(base, "an emoji of sks")
    assert same(drawn(out, 0, "p0_s42_w0.png"), first) and same(drawn(out, 0, "p0_s42.png"), first)
    assert same(drawn(out, 0, "p2_s7_w0.png"), asked(base, "a blue cat", seed=7))
    red = {"width": 48, "height": 32, "steps": 3} | negative(kind, "a dog")
    assert same(drawn(out, 0, "p1_s42_w0.png"), asked(base, "a red cat", **red))
    assert not same(asked(base, "a red cat", **red), asked(base, "a red cat", **red | {"negative_prompt": "x"}))
    for strength, suffix in ((1.0, ""), (0.5, "_w0.5")):
        pipe = stock(run.config.model, file, strength)
        want = asked(pipe, "an emoji of sks")
        assert same(drawn(out, 3, f"p0_s42{suffix}.png"), want) and not same(want, first)
        if strength == 1:
            assert same(drawn(out, 3, "p1_s42.png"), asked(pipe, "a red cat", **red))
            assert same(drawn(out, 3, "p2_s7.png"), asked(pipe, "a blue cat", seed=7))
    names = {p.name: sorted(f.name for f in p.iterdir()) for p in (out / "samples").iterdir()}
    later = ["p0_s42.png", "p0_s42_w0.5.png", "p1_s42.png", "p2_s7.png"]
    assert names == {
        "step00000000": [f"p{n}_s{s}{w}.png" for n, s in ((0, 42), (1, 42), (2, 7)) for w in ("", "_w0")],
        "step00000002": later,
        "step00000003": later,
    }
    assert newest_sample(out) == out / "samples" / "step00000003" / "p0_s42.png"
    said = Image.open(out / "samples" / "step00000003" / "p1_s42.png").text["parameters"]
    assert said.startswith("a red cat\nNegative prompt: a dog\nSteps: 3, ") and "Size: 48x32" in said
    assert run.family.pipe.vae is None and run.report == out / "report.html" and run.report.is_file()


@pytest.mark.parametrize(
    "options",
    [{"ema": 0.9, "train_text_encoder": True}, pytest.param({"optimizer": "schedulefree"}, marks=pytest.mark.slow)],
)
def test_drawing_changes_no_byte_of_what_is_learnt(options, config):
    plain = {"dropout": 0.3, "gradient_checkpointing": True, **options}
    runs = [
        dreambooth.train(config(**plain, **drawing))
        for drawing in (
            {"sample_every": 1, "sample_first": False},
            {"sample_every": 0, "sample_prompts": None, "sample_steps": None},
        )
    ]
    bytes_ = [{n: p.detach().clone() for n, p in trained_parameters(r.family.pipe, "a").items()} for r in runs]
    assert all(r.losses == runs[0].losses for r in runs)
    assert all(torch.equal(t, other[n]) for other in bytes_ for n, t in bytes_[0].items())


def test_what_is_on_only_while_training_is_off_in_samples_and_averages_are_in_them(config, models, tmp_path):
    pipe = open_pipeline(models("sd15"))
    attach(pipe, diffpeft.LoraConfig(r=2, init_lora_weights=False), "t", targets="attn")
    diffpeft.save_lora(pipe, tmp_path / "t.safetensors", name="t")
    run = dreambooth.train(config(training_adapter=str(tmp_path / "t.safetensors"), ema=0.5, dropout=0.2))
    (file, *_), out = dreambooth.save(run), tmp_path / "out"
    assert same(drawn(out, 0, "p0_s42_w0.png"), asked(stock(models("sd15")), "an emoji of sks"))
    assert same(drawn(out, 3, "p0_s42.png"), asked(stock(models("sd15"), file), "an emoji of sks"))


@pytest.mark.slow
def test_an_adapter_to_go_on_with_is_seen_before_the_first_step(config, tmp_path):
    (file, *_) = dreambooth.save(dreambooth.train(config(out=str(tmp_path / "before"))))
    run = dreambooth.train(config(init_from=str(file), sample_first=True))
    assert same(drawn(tmp_path / "out", 0, "p0_s42.png"), drawn(tmp_path / "before", 3, "p0_s42.png"))
    assert same(drawn(tmp_path / "out", 0, "p0_s42_w0.5.png"), drawn(tmp_path / "before", 3, "p0_s42_w0.5.png"))
    assert run.losses


@pytest.mark.parametrize("lr", [5e-2, pytest.param(3.0, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_adapter_of_the_best_step_is_the_one_that_is_seen(lr, config, tmp_path):
    run = dreambooth.train(config(lr=lr, heldout=1, heldout_every=1, sample_every=3, sample_prompts=None))
    (file, *_), out = dreambooth.save(run), tmp_path / "out"
    want = asked(stock(run.config.model, file), "an emoji of sks")
    assert same(drawn(out, run.step, "p0_s42.png"), want) and same(grey(Image.open(newest_sample(out, run.step))), want)
    page = run.report.read_text()
    assert run.best.reason in page and f"<strong>{run.best.step}</strong>" in page and "finished" in page
    shown = run.live.page
    assert [m.step for m in shown.heldout] == [0, 1, 2, 3] and shown.measures["heldout_loss"]["standard_error"] >= 0
    assert shown.before_after.rows[0].pictures[2] == out / "samples" / f"step{run.step:08d}" / "p0_s42.png"
    assert [use.program for use in shown.uses] == ["diffpeft", "diffusers", "ComfyUI", "A1111"]


# -- another model ---------------------------------------------------------------------------------------------------------


def _turbo(pipe):
    """Another checkpoint of the same layers, with a text encoder and a VAE of its own."""
    torch.manual_seed(9)
    for name in ("unet", "transformer", "vae", "text_encoder"):
        for p in getattr(pipe, name).parameters() if hasattr(pipe, name) else ():
            p.data += 0.02 * torch.randn_like(p)


def _deeper(pipe):
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 40})


@pytest.mark.parametrize("kind", ["sd15", pytest.param("flux dev", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_another_checkpoint_shows_the_adapter_as_its_own_stock_pipeline_does(kind, config, models, tmp_path):
    turbo = models(kind, _turbo)
    run = dreambooth.train(config(kind, sample_model=turbo, train_text_encoder=kind == "sd15"))
    (file, *_), out = dreambooth.save(run), tmp_path / "out"
    base = asked(stock(turbo), "an emoji of sks")
    assert same(drawn(out, 0, "p0_s42_w0.png"), base)
    assert same(drawn(out, 3, "p0_s42.png"), asked(stock(turbo, file), "an emoji of sks"))
    assert not same(drawn(out, 3, "p0_s42.png"), base)
    assert not same(base, asked(stock(run.config.model), "an emoji of sks"))
    assert f"drawn with {os.path.basename(turbo)}" in run.report.read_text()
    alone = dreambooth.train(
        config(kind, sample_every=0, sample_prompts=None, sample_steps=None, train_text_encoder=kind == "sd15")
    )
    assert alone.losses == run.losses


@pytest.mark.slow
def test_a_single_file_draws_with_the_configs_of_the_model(config, tmp_path):
    whole, changed = (open_pipeline() for _ in range(2))
    _turbo(changed)
    save_file({name: t.contiguous() for name, t in original(changed).items()}, tmp_path / "turbo.safetensors")
    dreambooth.train(
        config(
            model=str(EMBEDDED), sample_model=str(tmp_path / "turbo.safetensors"), resolution=64, steps=1, sample_prompts=None, targets="to_q",
        )
    )  # fmt: skip
    got = drawn(tmp_path / "out", 0, "p0_s42_w0.png")
    prompts = [asked(pipe, "an emoji of sks", width=64, height=64) for pipe in (changed, whole)]
    assert same(got, prompts[0]) and not same(got, prompts[1])


def test_a_sample_model_that_does_not_fit_is_refused_before_anything_is_loaded(config, models, monkeypatch):
    with pytest.raises(WrongBaseError, match="family flux"):
        check(config(sample_model=models("flux dev")))
    with pytest.raises(diffpeft.CheckpointError, match="--sample-model"):
        check(config(sample_model="no/such/model"))
    monkeypatch.setattr(dreambooth, "_encoded", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(WrongBaseError, match=r"other shapes.*attn2\.to_k"):
        dreambooth.train(config(sample_model=models("sd15", _deeper)))


# -- what would do nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, line, says",
    [
        ("sd15", "x --g 3", "--g"),
        ("flux schnell", "x --g 3", "--g"),
        ("sd15", "x --n y --l 1", "--l above 1"),
        ("flux dev", "x --n y", "--l above 1"),
        ("flux2 dev", "x --l 3", "--l"),
        ("flux2 dev", "x --n y", "Leave it out"),
        ("ideogram4", "x --n y", "Leave it out"),
        ("sd15", "x --w 33", "multiple of 4: 32 or 36"),
    ],
)
def test_settings_that_a_model_would_not_read_are_refused(kind, line, says):
    family = open_family(pipeline(kind, torch.float32))
    with pytest.raises(ConfigError, match=says) as raised:
        samples.settled(TrainConfig(), family, [of_line(line, "prompts.txt, line 2")], 32)
    assert "prompts.txt, line 2" in str(raised.value)


def test_they_are_refused_before_anything_is_loaded(config, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("# one\nx --g 3\n")
    monkeypatch.setattr(dreambooth, "_encoded", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=r"prompts\.txt, line 2"):
        dreambooth.train(config())


@pytest.mark.parametrize(
    "kind, line, options, wanted",
    [
        ("sd15", "x", {}, (7.5, None, None, 25)),
        ("sd15", "x", {"sample_guidance": 3.0, "sample_steps": 4}, (3.0, None, None, 4)),
        ("sd15", "x --l 2 --n y --s 6", {"sample_guidance": 3.0}, (2.0, None, "y", 6)),
        ("sdxl", "x", {}, (5.0, None, None, 25)),
        ("flux dev", "x", {"sample_guidance": 2.0}, (1.0, 2.0, None, 25)),
        ("flux dev", "x --l 2", {}, (2.0, 3.5, "", 25)),
        ("flux dev", "x --g 4 --l 2 --n y", {"sample_guidance": 3.0}, (2.0, 4.0, "y", 25)),
        ("flux schnell", "x", {}, (1.0, None, None, 4)),
        ("flux schnell", "x", {"sample_guidance": 3.0}, (3.0, None, "", 4)),
    ],
)
def test_what_is_not_said_is_the_pipelines_own(kind, line, options, wanted):
    family = open_family(pipeline(kind, torch.float32))
    (prompt,) = samples.settled(TrainConfig(**options), family, [of_line(line, "")], 32)
    assert (prompt.cfg, prompt.guidance, prompt.negative, prompt.steps) == wanted
    assert (prompt.width, prompt.height, prompt.seed) == (32, 32, 42)


# -- runs that end before their time ---------------------------------------------------------------------------------------


def failing(error):
    """A way to draw that works once after the first step and then does this."""
    real, calls = samples.drawn, []

    def draw(family, texts, prompt, tick):
        calls.append(prompt)
        if len(calls) == 5:
            error()
        return real(family, texts, prompt, tick)

    return draw


def _broken():
    raise RuntimeError("no memory <b>")


def _asked_to_stop():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "error, raised", [pytest.param(_broken, RuntimeError, marks=pytest.mark.slow), (_asked_to_stop, Interrupted)]
)
@pytest.mark.slow  # three runs
def test_a_run_that_ends_while_it_draws_keeps_its_state_and_goes_on_to_the_same_bytes(
    error, raised, config, tmp_path, monkeypatch
):
    whole = dreambooth.train(config(out=str(tmp_path / "whole")))
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(samples, "drawn", failing(error))
        dreambooth.train(config(overwrite=False))
    (state,) = checkpoints_in(out)
    assert state.step == 2
    done = {p.name for p in (out / "samples" / "step00000002").iterdir()}
    assert "p0_s42.png" in done and "p2_s7.png" not in done  # one whole, and none of what was not begun
    page = (out / "report.html").read_text()
    assert "http-equiv" not in page and f"diffpeft train --resume {out}" in page
    assert "interrupted" in page if raised is Interrupted else "no memory &lt;b&gt;" in page
    (out / "samples" / "step00000009").mkdir()
    run = dreambooth.train(config(resume=str(out), overwrite=False))
    mine, theirs = (trained_parameters(r.family.pipe, "a") for r in (run, whole))
    assert all(torch.equal(p, theirs[n]) for n, p in mine.items()) and run.losses == whole.losses
    for folder in ("step00000000", "step00000002", "step00000003"):
        for path in (tmp_path / "whole" / "samples" / folder).iterdir():
            assert np.array_equal(drawn(out, int(folder[4:]), path.name), grey(Image.open(path))), path
    assert not (out / "samples" / "step00000009").exists()


def test_samples_of_other_prompts_are_drawn_anew_and_not_shown(config, tmp_path):
    run = dreambooth.train(config(steps=1, sample_every=1))
    out, before = tmp_path / "out", run.live.changes.args[1].gallery
    assert replace(before, model="x").pictures() == {}  # another model's
    assert set(before.pictures()) == {0, 1} and len(before.pictures()[0]) == 6
    other = replace(before, prompts=tuple(replace(p, prompt=p.prompt + "!") for p in before.prompts))
    assert other.pictures() == {}
    damaged = before.path(1, samples.Spot(0, 1.0))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert samples.Spot(0, 1.0) not in before.pictures()[1]
    record = json.loads(Image.open(before.path(1, samples.Spot(1, 1.0))).text["diffpeft"])
    assert record["step"] == 1 and record["facts"]["prompt"] == "a red cat"
    (out / "samples" / "notes").mkdir()
    forget(out, 0)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["notes", "step00000000"]
    forget(out, -1)
    assert newest_sample(out) is None

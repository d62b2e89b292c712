"""Sliders: what is learnt against its definition, from which latents, at both signs, in every family; and what is told of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import ConfigError, WrongBaseError
from diffpeft.families import open_family
from diffpeft.families.discrete import Discrete
from diffpeft.families.flow import Flow
from diffpeft.families.prompts import embedded
from diffpeft.model.state import slots_of
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth
from diffpeft.train.check import check
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.concept import Concept
from diffpeft.train.config_files import from_toml
from diffpeft.train.dry import plan
from diffpeft.train.levels import Sampling
from diffpeft.train.objective import Objective
from diffpeft.train.sample import pictures
from diffpeft.train.slider import SliderLoss, canvases, ends
from diffpeft.train.slider_config import SliderConfig
from tests.families.pipelines import KINDS, cells, pipeline
from tests.families.test_family_runs import LANGUAGE

PROMPTS = {"target": "a heart", "positive": "a red heart", "negative": "a blue heart"}


EXAMPLE = Path(diffpeft.__file__).parent.parent / "examples" / "slider_heart.toml"


def config(**options):
    usual = {"model": str(EMBEDDED), "out": "out", "name": "a", "rank": 2, "resolution": 32, "sample_every": 0}
    prompts = {} if "erase" in options or "target" in options else PROMPTS
    return SliderConfig(**{**usual, **prompts, **options})


def adapted(kind, options, fill=True):
    """A tiny pipeline with an adapter that is being trained, and the loss of a slider."""
    family = open_family(pipeline(kind))
    dreambooth.adapt(options, family, "a")
    for slot in slots_of(family.pipe, "a").values():
        slot.double()
        for p in slot.parameters() if fill else ():
            nn.init.normal_(p, std=0.5)

    def texts(prompts):
        return embedded(family, prompts)

    device = family.parts(family.denoiser).device
    sampling = Sampling(family.levels)
    loss = SliderLoss(options, family, texts, canvases(family, [32]), lambda step: sampling, Objective(), device)
    return family, loss


def folded(kind, family, sign):
    """The same pipeline without an adapter, with sign x B A in its weights."""
    other = open_family(pipeline(kind))
    model = other.parts(other.denoiser)
    with torch.no_grad():
        for layer, slot in slots_of(family.pipe, "a").items():
            weight = model.get_submodule(layer.partition(".")[2]).weight
            change = slot.tensors["lora_B"].flatten(1) @ slot.tensors["lora_A"].flatten(1)
            weight += sign * change.view_as(weight)
    return other


@pytest.mark.parametrize("kind", cells(("sd15", "sd2, v", "flux dev"), ("sd15",)))
@pytest.mark.parametrize("erase", [False, True])
def test_the_loss_is_that_of_the_definition_at_both_signs(kind, erase):
    """In float64, against pipelines without an adapter: one as it is, and one with the adapter in its weights."""
    said = {"erase": "a heart", "negative": "a key"} if erase else PROMPTS
    options = config(**said, guidance=1.7, batch_size=2)
    family, loss = adapted(kind, options)
    shares = [loss(3, part) for part in (0, 1)]
    noised, frames = loss.point[1].noised, loss.point[1].frames
    base = open_family(pipeline(kind))

    def says(model, prompt):
        with torch.no_grad():
            return model.predict(noised.x, noised.t, embedded(model, [prompt] * 2) | frames)

    toward, away = ("a key", "a heart") if erase else ("a red heart", "a blue heart")
    for sign, share in zip((1, -1), shares, strict=True):
        want = says(base, "a heart") + sign * 1.7 * (says(base, toward) - says(base, away))
        error = (says(folded(kind, family, sign), "a heart") - want).square().mean()
        torch.testing.assert_close(share, error / 2, rtol=1e-9, atol=0)
    assert float(shares[0].detach()) != float(shares[1].detach())


def test_gradients_are_those_of_both_signs_also_where_activations_are_computed_twice():
    def gradients(checkpointing, parts):
        options = config(gradient_checkpointing=checkpointing, dropout=0.0)
        family, loss = adapted("sd15", options)
        with dreambooth.prepared(options, family):
            family.parts("unet").train()
            for part in parts:
                loss(0, part).backward()
        return [slot.tensors["lora_A"].grad for slot in slots_of(family.pipe, "a").values()]

    both, plus, minus = (gradients(False, parts) for parts in ((0, 1), (0,), (1,)))
    for got, want in (
        (gradients(True, (0, 1)), both),
        ([p + m for p, m in zip(plus, minus, strict=True)], both),
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-14)
    assert (plus[0] - minus[0]).norm() > 0.1 * plus[0].norm()


def test_without_guidance_the_base_is_what_is_learnt():
    _, loss = adapted("sd15", replace(config(), guidance=0.0), fill=False)
    shares = loss(0, 0) + loss(0, 1)
    shares.backward()
    slots = slots_of(loss.family.pipe, "a").values()
    assert shares.detach() == 0 and not any(p.grad.any() for slot in slots for p in slot.parameters())


ALPHAS = {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.2, "beta_schedule": "scaled_linear"}
LEVELS = {
    **{kind: Discrete(SimpleNamespace(config={**ALPHAS, "prediction_type": kind})) for kind in ("epsilon", "sample")},
    "v_prediction": Discrete(SimpleNamespace(config={**ALPHAS, "prediction_type": "v_prediction"})),
    "flow": Flow(3.0),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_a_prediction_comes_to_the_picture_and_the_noise_that_it_is_of(kind):
    z, n, u = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double(), torch.tensor([0.1, 0.5, 0.9])
    noised = LEVELS[kind].noised(z, n, u)
    noised = noised._replace(snr=noised.snr.double())
    for got, want in zip(ends(noised, noised.target), (z, n), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # the table of betas is in fp32


@pytest.mark.parametrize("kind", LEVELS)
def test_a_model_that_knows_the_picture_is_led_to_it(kind):
    """Whatever the number of steps: DDIM's and Euler's are exact on straight lines."""
    levels, z, n = LEVELS[kind], torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)

    def predict(x, t, texts):
        sigma = t / 1 if kind == "flow" else (1 - levels.alphas[t]).sqrt()
        sigma = sigma.view(-1, 1, 1, 1)
        signal = 1 - sigma if kind == "flow" else (1 - sigma.square()).sqrt()
        noise = (x - signal * z) / sigma
        return {"epsilon": noise, "sample": z, "flow": noise - z}.get(kind, signal * noise - sigma * z)

    family = SimpleNamespace(levels=levels, predict=predict)
    drawer = SimpleNamespace(family=family, texts=lambda prompts: {}, config=SimpleNamespace(draw_steps=7), cfg=3.0)
    u = torch.tensor([0.3, 0.7])
    drawn = SliderLoss.drawn(drawer, n, u, ["a", "b"], {})
    first = levels.noised(torch.zeros_like(n), n, torch.full((2,), 1 - 1e-4))
    noise = ends(first, predict(first.x, first.t, {}))[1]
    want = levels.noised(z, noise, u)
    torch.testing.assert_close(drawn.x, want.x, rtol=0, atol=2e-3)
    assert torch.equal(drawn.t, want.t)


@pytest.mark.slow
def test_latents_follow_from_seed_step_and_number_and_both_signs_have_the_same():
    _, loss = adapted("sd15", config(batch_size=1, accumulate=2))
    first = [loss.learnt_at(5, place).noised.x for place in (0, 1)]
    _, again = adapted("sd15", config(batch_size=1, accumulate=2))
    assert all(torch.equal(loss.learnt_at(5, p).noised.x, x) for p, x in enumerate(first))
    assert not torch.equal(*first)
    again(5, 2)
    point = again.point[1]
    again(5, 3)
    assert again.point[1] is point and torch.equal(point.noised.x, first[1])


def test_each_attribute_has_its_turn():
    options = config(preserve=["young, old", "tall"], batch_size=3)
    assert options.concepts()[1] == Concept("old a heart", "old a red heart", "old a blue heart")
    _, loss = adapted("sd15", options)
    assert {concept.target for concept in loss.learnt_at(0, 0).concepts} == {
        "young a heart",
        "old a heart",
        "tall a heart",
    }


@pytest.mark.parametrize(
    ("said", "concept"),
    [
        ({"target": "x", "positive": "y"}, ("x", "y", "x")),
        ({"target": "x", "positive": "y", "negative": "z"}, ("x", "y", "z")),
        ({"erase": "x"}, ("x", "", "x")),
        ({"erase": "x", "negative": "z"}, ("x", "z", "x")),
    ],
)
def test_what_is_learnt(said, concept):
    assert config(**said).concepts() == (concept,)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"target": "x"}, "--positive is missing"),
        ({"target": None}, "--target is missing"),
        ({"target": None, "positive": "y"}, "positive without target"),
        ({"target": None, "negative": "y"}, "negative without"),
        ({"target": "x", "positive": "x"}, "both prompts"),
        ({"target": "x", "positive": "y", "negative": "y"}, "both prompts"),
        ({"erase": "x", "target": "y"}, "erase with target"),
        ({"erase": "x", "negative": "x"}, "both prompts"),
        ({"guidance": 0.0}, "guidance is 0"),
        ({"target": "x", "positive": "y", "preserve": " , "}, "preserve is"),
    ],
)
def test_what_would_do_nothing_is_refused(said, word):
    with pytest.raises(ConfigError, match=word):
        config(**said).validate()


def _of_data():
    """The options of data, which a slider does not have."""
    return {*dreambooth.TrainConfig.names()} - {*SliderConfig.names()}


def test_the_account_says_what_is_learnt_and_no_option_of_images_is_there(tmp_path):
    options = config(out=str(tmp_path / "out"), erase="a blue heart " + "very " * 90, sample_every=2)
    checked = check(options)
    assert not _of_data() & options.resolved().keys() and {"data", "heldout", "control", "frames"} < _of_data()
    assert [prompt.where for prompt in checked.prompts] == ["--erase"]
    assert "to ''" in str(checked.account) and "cut there" in str(checked.account)
    assert json.loads(json.dumps(checked.account.table()))["concepts"][0]["positive"] == ""


def test_a_dry_run_says_what_is_learnt_and_needed(tmp_path):
    options = config(out=str(tmp_path / "out"), resolution=64)
    said = str(plan(options, check(options)))
    assert "from 'a blue heart' to 'a red heart'" in said and "a.kohya.safetensors" in said and "peak" in said
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_to_the_same_bytes_and_shows_five_strengths(tmp_path):
    pipeline("sd15", torch.float32).save_pretrained(tmp_path / "model")
    options = config(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "whole"),
        steps=2,
        save_every=1,
        keep=3,
        sample_every=2,
        sample_steps=2,
        sample_prompt="a tree --w 32 --h 32",
        draw_steps=3,
    )
    run = dreambooth.train(options)
    want = [p.read_bytes() for p in dreambooth.save(run)]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert all(f">strength {s}<" in page for s in (-2, -1, 0, 1, 2)) and page.count("a tree, strength") == 5
    assert not _of_data() & {word.strip() for word in page.replace("<", ">").split(">")}
    strengths = {path.name for path in (tmp_path / "whole/samples/step00000002").iterdir()}
    assert strengths == {f"p{n}_s42{w}.png" for n in (0, 1) for w in ("", "_w-1", "_w-2", "_w2")}
    half = checkpoints_in(tmp_path / "whole")[0]
    resumed = dreambooth.train(replace(options, resume=str(half.folder), out=str(tmp_path / "resumed"), name="a"))
    assert [p.read_bytes() for p in dreambooth.save(resumed)] == want and run.losses == resumed.losses
    table = json.loads((half.folder / "facts.json").read_text()) if (half.folder / "facts.json").exists() else {}
    assert table.get("command", "slider") == "slider"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_every_family(kind, tmp_path):
    pipe = pipeline(kind, torch.float32)
    if open_family(pipe).controls[0]:
        with pytest.raises(WrongBaseError, match="control images"):
            canvases(open_family(pipe), [32])
        return
    pipe.save_pretrained(tmp_path / "model")
    options = config(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "out"),
        steps=2,
        draw_steps=3,
        save_every=0,
        lr=1e-2,
        max_length=LANGUAGE.get(kind),
    )
    run = dreambooth.train(options)
    assert len(run.losses) == 2 and np.isfinite(run.losses).all() and dreambooth.save(run)


@pytest.mark.slow
@pytest.mark.parametrize("method", dreambooth.ADAPTERS)
def test_every_method_learns_it(method, tmp_path):
    """On one point the loss falls at both signs."""
    options = config(method=method, rank=4, batch_size=2, targets="attn")
    family, loss = adapted("sd15", options, fill=False)
    slots = slots_of(family.pipe, "a").values()
    point, parameters = copy.deepcopy(loss.learnt_at(0, 0)), [p for slot in slots for p in slot.parameters()]
    loss.learnt_at = lambda step, place: point
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        shares = [loss(0, part) for part in (0, 1)]
        history.append([float(share.detach()) for share in shares])
        for part in (0, 1):
            loss(0, part).backward()
        optimizer.step()
    assert all(last < first for first, last in zip(history[0], history[-1], strict=True)), (history[0], history[-1])


def redness(images):
    """How much redder than blue what is not white is, the mean over images [n, h, w, 3]."""
    x = images / 255.0
    return float((x[..., 0] - x[..., 2])[x.min(-1) < 0.93].mean())


@pytest.mark.slow
def test_a_slider_of_the_embedded_base_moves_a_heart_from_blue_to_red_and_little_else(tmp_path):
    undrawn = {"sample_every": 0, "sample_prompt": None, "sample_guidance": None}
    place = {"out": str(tmp_path / "out"), "name": "a", "model": str(EMBEDDED)}
    run = dreambooth.train(from_toml(EXAMPLE, place | undrawn, SliderConfig))
    pipe, prompts = run.family.parts.whole(), ["an emoji of heart"] * 2 + ["an emoji of key", "an emoji of dog face"]
    drawn = {}
    for strength in (-2, -1, 0, 1, 2):
        with torch.no_grad(), diffpeft.adapters(pipe, {"a": strength}):
            drawn[strength] = pictures(pipe, prompts, [1, 2, 1, 1], steps=15, guidance=4).astype(float)
    reds = [redness(images[:2]) for images in drawn.values()]
    assert reds == sorted(reds) and reds[1] < -0.3 < 0.3 < reds[2]
    heart, others = (np.abs(drawn[-1] - drawn[0])[at].mean() for at in (slice(2), slice(2, 4)))
    assert others < heart / 8


def test_a_model_that_draws_with_control_images_alone_is_refused_by_its_configs(tmp_path):
    index = {"_class_name": "FluxControlPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(WrongBaseError, match="a slider has none"):
        check(config(model=str(tmp_path), out=str(tmp_path / "out")))

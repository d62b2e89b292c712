"""Wan 2.2's two denoisers in one run: which one a step trains, at which noise, what the files hold and who reads them."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import diffpeft
from diffpeft import TrainConfig, converters
from diffpeft.errors import ConfigError
from diffpeft.families import CaptionReading, open_family
from diffpeft.families.prompts import embedded
from diffpeft.model.state import slots_of
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth
from diffpeft.train.check import check
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.dry import plan
from diffpeft.train.experts import asked_alone, experts_of
from diffpeft.train.showing import uses_of
from tests.families.pipelines import pipeline

BOUNDARY = 0.4
TIMES = torch.tensor([0.1, 0.4, 0.9, 0.399])  # the pipeline asks the first from the boundary on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    pipeline("wan, two experts", torch.float32).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for name in ("cat_face", "airplane"):
        (folder / "photos" / f"{name}.png").write_bytes((EMBEDDED.parent / "demo/train" / f"{name}.png").read_bytes())
    return folder


def config_of(folder, **more):
    said = {
        "sample_every": 0,
        "instance_prompt": "a cat",
        "out": str(folder / "out"),
        "name": "style",
        "resolution": 32,
    }
    said |= {"model": str(folder / "model"), "data": str(folder / "photos"), "max_length": 40}
    return TrainConfig(**{**said, "steps": 6, "rank": 2, "lr": 1e-2, "batch_size": 2, "save_every": 0, **more})


@pytest.fixture(scope="module")
def run(folder):
    """A finished run of both, and what each denoiser's layers were asked in it: [(denoiser, shares of noise)]."""
    run = dreambooth.train(config_of(folder))
    return run, dreambooth.save(run)


def reading(pipe):
    """The training side of a pipeline, as the run reads captions."""
    return open_family(pipe, CaptionReading(40))


@torch.no_grad()
def answer(family):
    """At times of both denoisers."""
    x = torch.randn(4, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return family.predict(x, TIMES, embedded(family, ["a cat"] * 4))


def test_each_row_is_asked_of_the_denoiser_that_the_pipeline_asks_at_its_time():
    pipe = pipeline("wan, two experts")
    family = open_family(pipe)
    x, texts = torch.randn(4, 4, 1, 16, 16, dtype=torch.float64), embedded(family, ["a", "b", "c", "d"])
    got = family.predict(x, TIMES.double(), texts)
    for row, time in enumerate(TIMES.double()):
        model = pipe.transformer if 1000 * time >= 1000 * BOUNDARY else pipe.transformer_2
        want = model(x[row : row + 1], 1000 * time[None], texts["text"][row : row + 1], return_dict=False)[0]
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-9, atol=1e-9)
    assert not torch.equal(pipe.transformer.proj_out.weight, pipe.transformer_2.proj_out.weight)


def test_a_step_of_one_expert_reads_no_times():
    """They are on the device, which would have to be waited for; and at the boundary rounding would tell."""
    family = open_family(pipeline("wan, two experts"))
    x, t = torch.randn(2, 4, 1, 16, 16, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    texts, read = embedded(family, ["a", "b"]), []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read.extend(function.__name__ for a in args if a is t and function.__name__.startswith(("ge", "_to_copy")))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), asked_alone(family, "transformer"), Watched():
        got = family.predict(x, t, texts)
    want = family.pipe.transformer(x, 1000 * t, texts["text"], return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not read and family.only is None


def test_every_pair_of_steps_trains_each_at_its_noise_and_leaves_the_other_alone(folder, monkeypatch):
    seen, denoising = [], dreambooth.denoising

    def noted(family, batch, *rest):
        seen.append(family.levels.sigma(batch.u, batch.latents.shape))
        return denoising(family, batch, *rest)

    monkeypatch.setattr(dreambooth, "denoising", noted)
    config = config_of(folder, steps=8, out=str(folder / "noted"))
    run = dreambooth.train(config)
    experts = experts_of(config, run.family)
    turns = [experts.at(config.seed, step) for step in range(8)]
    assert all({*turns[at : at + 2]} == {"transformer", "transformer_2"} for at in range(0, 8, 2))
    assert turns != [experts.at(config.seed + 1, step) for step in range(8)]
    for turn, sigma in zip(turns, seen, strict=True):
        assert (sigma >= BOUNDARY - 1e-6).all() if turn == "transformer" else (sigma <= BOUNDARY + 1e-6).all()
    assert experts.begins(config.seed) == {
        name: tuple(step for step, turn in enumerate(turns[:4]) if turn == name) for name in experts.spans
    }


def test_one_file_has_both_and_a_format_of_one_denoiser_two(run, folder):
    finished, files = run
    assert [file.name for file in files] == [
        "style.diffusers.safetensors",
        "style.high.diffusers.safetensors",
        "style.low.diffusers.safetensors",
        "style.high.kohya.safetensors",
        "style.low.kohya.safetensors",
    ]
    whole, high, low, *kohya = files
    assert {key.partition(".")[0] for key in load_file(whole)} == {"transformer", "transformer_2"}
    assert load_file(high).keys() == load_file(low).keys()
    assert [converters.inspect(file).readable_by for file in (whole, high, low)] == [(), *[("diffusers",)] * 2]
    assert [converters.inspect(file).readable_by for file in kohya] == [("ComfyUI",)] * 2  # of attention alone
    for file, component in zip((high, low, *kohya), ("transformer", "transformer_2") * 2, strict=True):
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        assert said["diffpeft.component"] == component
        assert json.loads(said["diffpeft.experts"]) == {
            "transformer": [BOUNDARY, 1.0],
            "transformer_2": [0.0, BOUNDARY],
        }
    want = answer(finished.family)
    fresh = open_pipeline(finished.config.model)
    base = answer(reading(fresh))
    assert ((want - base).abs().amax((1, 2, 3, 4)) > 1e-3).all()
    diffpeft.load_lora(fresh, whole)
    torch.testing.assert_close(answer(reading(fresh)), want, rtol=0, atol=1e-5)


def test_the_page_says_how_both_halves_are_used(run):
    finished, files = run
    stock, comfyui = (use.command for use in uses_of(finished.config, files, "a cat", finished.family)[1:3])
    _, high, low, *kohya = files
    assert [line.partition("(")[0] for line in stock.split("\n")] == [
        "pipe = WanPipeline.from_pretrained",
        "pipe.load_lora_weights",
        "pipe.load_lora_weights",
    ]
    assert high.name in stock and f'"{low.name}", load_into_transformer_2=True)' in stock
    assert all(file.name in comfyui for file in kohya)


def test_the_halves_are_loaded_one_after_the_other(run):
    finished, (_, high, low, *kohya) = run
    want = answer(finished.family)
    for files in ((low, high), kohya):
        fresh = open_pipeline(finished.config.model)
        for file in files:
            diffpeft.load_lora(fresh, file)
        torch.testing.assert_close(answer(reading(fresh)), want, rtol=0, atol=1e-5)
    alone = open_pipeline(finished.config.model)
    diffpeft.load_lora(alone.transformer_2, low)  # a model that is given is the one that is meant
    rows = TIMES < BOUNDARY
    torch.testing.assert_close(answer(reading(alone))[rows], want[rows], rtol=0, atol=1e-5)
    stock = diffusers.DiffusionPipeline.from_pretrained(finished.config.model)
    stock.load_lora_weights(str(high.parent), weight_name=high.name, adapter_name="high")
    stock.load_lora_weights(str(low.parent), weight_name=low.name, adapter_name="low", load_into_transformer_2=True)
    torch.testing.assert_close(answer(reading(stock)), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_comes_to_the_same_bytes(run, folder):
    _, files = run
    config = config_of(folder, out=str(folder / "halted"), save_every=3)
    dreambooth.train(config)
    first, _ = checkpoints_in(folder / "halted")
    again = replace(config, resume=str(first.folder), out=str(folder / "again"))
    resumed = dreambooth.save(dreambooth.train(again))
    for mine, theirs in zip(resumed, files, strict=True):
        a, b = load_file(mine), load_file(theirs)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("experts, component, ending", [("high", "transformer", ""), ("low", "transformer_2", ".low")])
def test_one_of_both_is_trained_alone(experts, component, ending, folder):
    """At its noise, and its samples are drawn with both; the other one is not loaded for the steps."""
    config = config_of(
        folder, experts=experts, out=str(folder / experts), heldout=1, steps=4, sample_every=4, sample_steps=2
    )
    run = dreambooth.train(config)
    assert {layer.partition(".")[0] for layer in slots_of(run.family.pipe, "style")} == {component}
    assert run.heldout[-1].bands[0].low == (BOUNDARY if experts == "high" else 0.0)
    other = next(name for name in run.family.denoisers if name != component)
    assert getattr(run.family.pipe, other) is None
    files = dreambooth.save(run)
    assert files[-1].name == f"style{ending}.kohya.safetensors"
    assert list((folder / experts / "samples").glob("step00000004/*.png"))


@pytest.mark.slow
def test_gradients_are_checkpointed_in_both(folder):
    config = config_of(folder, gradient_checkpointing=True, out=str(folder / "checkpointed"), steps=2)
    run = dreambooth.train(config)
    with dreambooth.prepared(run.config, run.family):
        assert all(getattr(run.family.pipe, name).is_gradient_checkpointing for name in run.family.denoisers)


def test_a_dry_run_counts_both(folder):
    both, low = (
        plan(config, check(config))
        for config in (
            config_of(folder, out=str(folder / "dry")),
            config_of(folder, out=str(folder / "dry"), experts="low"),
        )
    )
    assert {*both.layers} == {"transformer", "transformer_2"} and {*low.layers} == {"transformer_2"}
    assert both.files[:5] == (
        "style.diffusers.safetensors",
        "style.high.diffusers.safetensors",
        "style.low.diffusers.safetensors",
        "style.high.kohya.safetensors",
        "style.low.kohya.safetensors",
    )
    assert both.phases[-1].weights > 1.9 * low.phases[-1].weights and low.phases[-1].computed


def test_experts_that_there_are_not_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="nothing of it is left for --experts low"):
        dreambooth.train(config_of(folder, experts="low", sigma_range="0.5,1", out=str(tmp_path / "a")))
    one = open_family(pipeline("wan"))
    with pytest.raises(ConfigError, match="one denoiser"):
        experts_of(TrainConfig(experts="low"), one)
    narrow = experts_of(TrainConfig(sigma_range="0.5,1"), open_family(pipeline("wan, two experts")))
    assert dict(narrow.spans) == {"transformer": (0.5, 1.0)}

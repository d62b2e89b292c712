"""Runs that are fitted into a memory: the least slow way whose estimate fits, and what was said stays."""

from dataclasses import replace

import pytest
import torch

import diffpeft
from diffpeft import ConfigError, TrainConfig
from diffpeft.pipeline.open import open_parts
from diffpeft.train import budget, dry, estimate
from diffpeft.train import config as config_module
from diffpeft.train.check import check
from diffpeft.train.estimate import Outline
from tests.families.pipelines import pipeline
from tests.train import presets, published
from tests.train.pictures import photos_in

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    photos_in(folder)
    pipeline("flux dev", torch.float32).save_pretrained(folder / "model")
    usual = {"model": str(folder / "model"), "data": str(folder / "photos"), "out": str(folder / "out")}
    return TrainConfig(
        **usual, instance_prompt="x", resolution=128, batch_size=4, steps=1, rank=2, log="none", sample_every=0
    )


@pytest.fixture(scope="module")
def totals(config):
    """{a way: the most bytes of a run that goes so}, each by itself."""
    totals = {}
    for way in budget.ways(config, {}):
        if way.offload in (0.0, 0.4, 1.0) and way.quantize != "nf4":
            options = replace(config, **vars(way))
            totals[way] = max(phase.total for phase in Outline(options, check(options)).phases(way.offload))
    return totals


@pytest.fixture
def nothing_reserved(monkeypatch):
    monkeypatch.setattr(config_module, "RESERVED", 0)


def picked(config, size):
    return budget.fitted(check(replace(config, memory=f"{size / 2**30:.9f}GB")))


@pytest.mark.slow  # a plan for each way
def test_the_least_slow_way_that_fits_is_picked(config, totals, nothing_reserved):
    for size in (max(totals.values()), sorted(totals.values())[len(totals) // 2]):
        options, checked = picked(config, size + 2048)
        way = budget.Way(options.gradient_checkpointing, options.quantize, options.offload)
        fitting = [other for other, total in totals.items() if total <= size + 2048]
        assert way.slowing <= min(other.slowing for other in fitting) + 1e-9
        assert way not in totals or totals[way] <= size + 2048
        changed = {name for name, value in vars(way).items() if value != getattr(config, name)}
        assert {name for name, origin in checked.origins.items() if origin.startswith("memory")} == changed


@pytest.mark.slow
def test_what_was_said_stays_and_what_cannot_be_is_refused_with_the_least(config, totals, nothing_reserved):
    with pytest.raises(ConfigError, match=r"too little: the least is \S+, for .*, with") as caught:
        picked(config, min(totals.values()) / 4)
    said = str(caught.value).split("the least is ")[1].split(",")[0]
    budget.fitted(check(replace(config, memory=said)))  # is enough
    options, _ = picked(replace(config, offload=0.4), max(totals.values()))
    assert options.offload == 0.4
    ways = budget.ways(replace(config, compile=True, quantize="fp8"), {"gradient_checkpointing": "command line"})
    assert ways == [budget.Way(False, "fp8", 0.0)]


def test_what_cannot_be_counted_is_not_taken_for_nothing(config, monkeypatch):
    monkeypatch.setattr(estimate, "peak", lambda step: None)
    with pytest.raises(ConfigError, match=r"cannot be told \('captions .*'training'\)"):
        picked(config, 24 * 2**30)


@pytest.mark.parametrize("said", ["x8", "0GB", "much", "8TB", "300MB", "1GB", "1024 MiB", "0.5"])
def test_what_is_no_memory_or_too_little_for_any_run_is_refused_by_the_options(said, config):
    with pytest.raises(ConfigError, match="8GB, 12GB, 16GB or 24GB, or another number of GB or MB"):
        replace(config, memory=said).validate()


def test_a_memory_is_said_in_gigabytes_or_megabytes(config):
    sizes = [replace(config, memory=said).memory_bytes() for said in ("1.5GB", "1536MB", "1.5 GiB", "1536mib", "1.5g")]
    assert set(sizes) == {3 * 2**29}


@pytest.mark.slow  # a plan and a run
def test_a_run_says_what_was_picked(config, totals, nothing_reserved, tmp_path):
    size = sorted(totals.values())[2] + 2048
    options = replace(config, memory=f"{size / 2**30:.9f}GB", out=str(tmp_path / "out"))
    plan = dry.plan(options, check(options))
    assert plan.peak.total <= size and plan.memory != "nothing is done to save any"
    run = diffpeft.train(options)
    assert any(origin.startswith("memory") for origin in run.origins.values())
    assert "# memory" in (tmp_path / "out" / "config.toml").read_text()


@pytest.mark.slow  # large models, several times each
@pytest.mark.parametrize("memory", ["8GB", "12GB", "16GB", "24GB"])
@pytest.mark.parametrize("name", published.MODELS)
def test_published_models_fit_the_usual_cards(name, memory, tmp_path):
    published.write(name, tmp_path / "model")
    photos_in(tmp_path)
    usual = {"model": str(tmp_path / "model"), "data": str(tmp_path / "photos"), "out": str(tmp_path / "out")}
    options = TrainConfig(**usual, instance_prompt="x", dtype="bf16", memory=memory)
    plan = dry.plan(options, check(options))
    print(name, memory, plan.memory, plan.peak)
    assert plan.peak.total <= options.memory_left()


@pytest.mark.slow  # large models, several times each
@pytest.mark.parametrize("name, memory", [("z-image", "12GB"), ("sana-1.6b", "8GB"), ("flux2-klein-4b", "16GB")])
def test_what_is_recorded_of_published_models_is_what_is_picked(name, memory, tmp_path):
    config, _ = budget.fitted(check(presets.config_for(name, tmp_path, memory)))
    way = budget.Way(config.gradient_checkpointing, config.quantize, config.offload)
    assert str(way) == presets.recorded()[name][memory]


@pytest.mark.slow
@pytest.mark.parametrize("name", published.GROWN_SIZES)
def test_configs_of_published_models_have_their_sizes(name, tmp_path):
    parts = open_parts(str(published.write_grown(name, tmp_path / "model")), device="meta", dtype="bf16")
    number = sum(p.numel() for p in parts.outline("transformer").parameters())
    assert number / 1e6 == pytest.approx(published.GROWN_SIZES[name], rel=0.03)


def test_every_model_with_configs_is_in_the_table():
    assert presets.recorded().keys() <= {*published.MODELS, *published.GROWN}
    missing = {*published.MODELS, *published.GROWN} - presets.recorded().keys()
    assert missing <= {"pixart-sigma"}  # which takes too long

"""Pipelines that are not made without NVIDIA's guardrail are trained where it is lacking, and draw nothing."""

import inspect

import diffusers
import pytest
import torch

from diffpeft import TrainConfig
from diffpeft.errors import ConfigError
from diffpeft.families import open_family
from diffpeft.pipeline import guardrail
from diffpeft.pipeline.open import open_pipeline
from diffpeft.train.check import check
from tests.families.pipelines import pipeline
from tests.train.pictures import photos_in


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Cosmos."""
    folder = tmp_path_factory.mktemp("cosmos")
    pipeline("cosmos", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def lacking(monkeypatch):
    monkeypatch.setattr(guardrail.importlib.util, "find_spec", lambda name: None)


def test_the_list_is_of_the_pipelines_that_ask_for_it():
    """By what diffusers' own classes do."""
    for name in (name for name in dir(diffusers) if name.startswith("Cosmos") and name.endswith("Pipeline")):
        source = inspect.getsource(getattr(diffusers, name).__init__)
        made = "safety_checker = CosmosSafetyChecker()" in source and "enable_safety_checker" not in source
        assert guardrail.is_lacking(name) == made, name


def test_it_is_opened_and_draws_nothing(model, caplog):
    pipe = open_pipeline(str(model))
    assert open_family(pipe).name == "Cosmos" and "safety_checker" not in caplog.text
    with pytest.raises(ConfigError, match="pip install cosmos_guardrail"):
        pipe("a cat", num_inference_steps=2, height=32, width=32)


def test_a_run_with_pictures_is_refused_before_it_begins(model, tmp_path):
    run = {"model": str(model), "data": str(photos_in(tmp_path)), "out": str(tmp_path / "out"), "instance_prompt": "x"}
    with pytest.raises(ConfigError, match="--sample-every 0"):
        check(TrainConfig(**run))
    assert not check(TrainConfig(**run, sample_every=0)).prompts


def test_a_transformer_that_scales_by_torchvision_is_refused_without(monkeypatch):
    from diffusers.models.transformers import transformer_cosmos

    pipe = pipeline("cosmos", torch.float32)
    monkeypatch.delattr(transformer_cosmos, "transforms")
    with pytest.raises(ConfigError, match="pip install torchvision"):
        open_family(pipe)

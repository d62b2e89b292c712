"""The base as the target under other prompts: which are asked, what is compared, and that it keeps what class images would keep."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffpeft
from diffpeft import ConfigError, TrainConfig, UnknownNameError
from diffpeft.families import Frame, open_family
from diffpeft.families.parts import Parts
from diffpeft.families.prompts import embedded as conditions_of
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth
from diffpeft.train.check import check
from diffpeft.train.data import Example
from diffpeft.train.data.captions import without_trigger
from diffpeft.train.objective import BaseRange, Batch, denoising, preserved
from diffpeft.train.prior_prompts import PriorPrompts, prior_prompts
from tests.train.pictures import photos_in


@pytest.fixture
def config(tmp_path):
    photos_in(tmp_path, ("cat_face", "airplane"))
    (tmp_path / "photos" / "airplane.txt").write_text("an emoji of airplane, [trigger] style")
    return TrainConfig(
        sample_every=0,
        model=str(EMBEDDED), data=str(tmp_path / "photos"), out=str(tmp_path / "out"), instance_prompt="an emoji of cat", trigger="sks",
        steps=2, rank=2, batch_size=2, prior="base",
    )  # fmt: skip


@pytest.mark.parametrize(
    "caption, trigger, want",
    [
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("sks, red, [trigger]", "sks", "red"),
        ("sksy and sks", "sks", "sksy and"),
        ("a dog", "sks", "a dog"),
        ("[trigger] dog , cat", None, "dog, cat"),
        ("c++ style by c++", "c++", "style by"),
        ("a sks dog, b", "sks dog", "a, b"),
    ],
)
def test_a_caption_without_its_trigger(caption, trigger, want):
    assert without_trigger(caption, trigger) == want


def test_prompts_are_drawn_by_weight():
    prompts = PriorPrompts({"class": 1.0, "blank": 2.0, "caption": 1.0}, "a dog")
    named, unnamed = (Example(Path("a"), caption, trigger="sks") for caption in ("sks dog on grass", "a cat"))
    drawn = Counter(prompts.at(named, 0, n) for n in range(2000))
    assert drawn.keys() == {"a dog", "", "dog on grass"}
    for prompt, share in {"a dog": 0.25, "": 0.5, "dog on grass": 0.25}.items():
        assert abs(drawn[prompt] / 2000 - share) < 0.05  # five standard deviations
    assert prompts.all([named, unnamed]) == ["a dog", "", "dog on grass"]
    assert "a cat" not in {prompts.at(unnamed, 0, n) for n in range(50)}  # what is trained on is not to be kept


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, {"blank": 1, "caption": 1}),
        ({"class_prompt": "an emoji"}, {"class": 1, "blank": 1, "caption": 1}),
        ({"trigger": None}, {"blank": 1}),
        ({"class_prompt": "an emoji", "prior_prompts": "class:3, blank:.5"}, {"class": 3, "blank": 0.5}),
        ({"prior": None}, None),
    ],
)
def test_what_is_asked_of_the_base(options, want, config):
    prompts = prior_prompts(replace(config, **options))
    assert (prompts and prompts.weights) == want


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"prior_prompts": "class"}, ConfigError, "no class_prompt"),
        ({"prior_prompts": "captions"}, UnknownNameError, "caption"),
        ({"prior_prompts": "blank:0"}, ConfigError, "above 0"),
        ({"prior_prompts": "blank:x"}, ConfigError, "above 0"),
        ({"prior_prompts": "blank", "prior": None}, ConfigError, "prior"),
        ({"prior": "images"}, ConfigError, "class_prompt"),
        ({"num_class_images": 3, "class_prompt": "x"}, ConfigError, "prior base"),
        ({"class_data": "c", "class_prompt": "x"}, ConfigError, "prior base"),
        ({"prior": None, "prior_weight": 1.0}, ConfigError, "class_prompt or prior base"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error, says, config):
    check(config)
    with pytest.raises(error, match=says):
        check(replace(config, **options))


def test_the_error_is_against_the_model_without_the_adapter(embedded):
    family = open_family(Parts(embedded))
    diffpeft.attach(embedded.unet, diffpeft.LoraConfig(r=2), "style", targets="attn")
    with torch.no_grad():
        for slot in dreambooth.slots_of(embedded, "style").values():
            for parameter in slot.parameters():
                parameter.normal_(std=0.3)
    z, n = torch.randn(2, 3, 4, 8, 8)[0][:, :1].expand(3, 4, 8, 8)[:2], torch.randn(2, 4, 8, 8)
    z = torch.randn(2, 4, 8, 8)
    prompts = ["", "an emoji of lemon"]
    batch = Batch(z, n, torch.tensor([0.2, 0.7]), ["x", "y"], torch.zeros(2, dtype=torch.bool), [], None, prompts)
    texts = lambda prompts, controls=(): conditions_of(family, prompts)  # noqa: E731
    got = preserved(family, batch, texts, lambda: diffpeft.adapters(embedded, {"style": 0.0}))
    x = family.levels.noised(z, n, batch.u)
    with torch.no_grad():
        on = embedded.unet(x.x, x.t, texts(prompts)["text_encoder"]).sample
        with diffpeft.adapters(embedded, {"style": 0.0}):
            off = embedded.unet(x.x, x.t, texts(prompts)["text_encoder"]).sample
    torch.testing.assert_close(got.detach(), (on - off).square().mean((1, 2, 3)))
    got.sum().backward()
    assert got.min() > 0 and any(p.grad is not None and p.grad.abs().max() > 0 for p in embedded.unet.parameters())


@pytest.mark.parametrize("kind", ["", "an emoji of lemon"])
def test_in_the_bases_range_its_own_predictions_are_the_targets_and_elsewhere_the_noise(kind, embedded):
    family = open_family(Parts(embedded))
    diffpeft.attach(embedded.unet, diffpeft.LoraConfig(r=2), "style", targets="attn")
    with torch.no_grad():
        for slot in dreambooth.slots_of(embedded, "style").values():
            for parameter in slot.parameters():
                parameter.normal_(std=0.3)
    z, n, u = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.95, 0.5, 0.85])
    frames = [Frame((64, 64), (0, 0), (64, 64))] * 3
    batch = Batch(z, n, u, ["a", kind, "b"], torch.zeros(3, dtype=torch.bool), frames)
    texts = lambda prompts, controls=(): conditions_of(family, prompts)  # noqa: E731
    x = family.levels.noised(z, n, u)
    low = float(x.sigma[2])  # an end counts
    base = lambda: diffpeft.adapters(embedded, {"style": 0.0})  # noqa: E731
    got = denoising(family, batch, texts(batch.prompts), None, BaseRange(low, 1.0, 3.0, texts, base))
    with torch.no_grad():
        on = embedded.unet(x.x, x.t, texts(batch.prompts)["text_encoder"]).sample
        with base():
            off = embedded.unet(x.x, x.t, texts(batch.prompts)["text_encoder"]).sample
    target = torch.stack([off[0], n[1], off[2]])
    weights = torch.tensor([3.0, 1.0, 3.0])
    torch.testing.assert_close(got.detach(), (on - target).square().mean((1, 2, 3)) * weights)
    plain = denoising(family, batch, texts(batch.prompts), None, BaseRange(0.9999, 1.0, 3.0, texts, base))
    torch.testing.assert_close(plain, denoising(family, batch, texts(batch.prompts)))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"base_range": "0.9"}, "base_range is '0.9'"),
        ({"base_range": "0.9,0.5"}, "base_range"),
        ({"base_range": "0,1"}, "leaves nothing"),
        ({"base_weight": 2.0}, "base_weight without base_range"),
        ({"base_range": "0.5,1", "sigma_range": "0.6,0.9"}, "leaves nothing"),
        ({"base_range": "0.9,1", "sigma_range": "0,0.9"}, "outside"),
    ],
)
def test_a_base_range_that_is_none_or_would_leave_nothing_is_refused(options, says, config):
    with pytest.raises(ConfigError, match=says):
        check(replace(config, prior=None, **options))


@pytest.mark.slow
def test_a_run_with_a_base_range_has_nothing_to_learn_of_the_base_there(config):
    """A fresh adapter changes nothing, so that of its first step's loss only what is outside of the range is left."""
    options = {"prior": None, "steps": 1, "batch_size": 8, "overwrite": True}
    whole, outside, inside = (
        dreambooth.train(replace(config, **options, **said)).losses[0]
        for said in ({}, {"base_range": "0.6,1"}, {"base_range": "0,0.6"})
    )
    assert 0 < outside < whole and 0 < inside < whole
    assert outside + inside == pytest.approx(whole, rel=1e-5)


def drift(run, prompt="an emoji", steps=range(50, 1000, 120)):
    """How far the adapter moves the base's predictions under a prompt that does not name the subject."""
    family, g = run.family, torch.Generator().manual_seed(1)
    t = torch.tensor(list(steps))
    x = torch.randn(len(t), 4, 8, 8, generator=g)
    with torch.no_grad():
        conditions = conditions_of(family, [prompt] * len(t))
        on = family.predict(x, t, conditions)
        with diffpeft.adapters(family.pipe, {run.name: 0.0}):
            return (on - family.predict(x, t, conditions)).square().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("live", [False, True])
def test_the_base_is_kept_under_other_prompts(live, config):
    options = {"steps": 25, "lr": 3e-3, "class_prompt": "an emoji", "overwrite": True, "train_text_encoder": live}
    free = dreambooth.train(
        replace(config, **options, prior=None, class_data=str(config.data), num_class_images=1, prior_weight=1e-6)
    )
    held = dreambooth.train(replace(config, **options, prior_weight=10.0))
    assert drift(held) < 0.5 * drift(free)
    assert held.config.prior == "base" and held.config.num_class_images is None
    assert not (Path(config.out) / "class").exists()

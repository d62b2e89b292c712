import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffpeft
from diffpeft import ConfigError, DivergedError, TrainConfig
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth
from diffpeft.train.checkpoints import checkpoints_in
from tests.train.pictures import DATA, photos_in


@pytest.fixture
def photos(tmp_path):
    return photos_in(tmp_path)


def config(photos, **options):
    return TrainConfig(
        **{
            "model": str(EMBEDDED),
            "data": str(photos),
            "out": str(photos.parent / "out"),
            "instance_prompt": "an emoji of sks",
            "steps": 2,
            "rank": 2,
            "batch_size": 2,
            "flip": True,
            "caption_dropout": 0.3,
            "overwrite": True,
            "sample_every": 0,
            **options,
        }
    )


def trained(**options):
    run = dreambooth.train(config(**options))
    return run, {key: t for path in dreambooth.save(run) if "kohya" in path.name for key, t in load_file(path).items()}


def test_a_run_follows_from_its_seed(photos):
    run, first = trained(photos=photos, seed=5)
    torch.manual_seed(1)  # whatever the global generator does
    again, second = trained(photos=photos, seed=5)
    other, third = trained(photos=photos, seed=6)
    assert run.losses == again.losses and all(torch.equal(first[k], second[k]) for k in first)
    assert run.losses != other.losses and not all(torch.equal(first[k], third[k]) for k in first)


QUICK_METHODS = ("lora", "boft")
METHODS = [
    method if method in QUICK_METHODS else pytest.param(method, marks=pytest.mark.slow)
    for method in dreambooth.ADAPTERS
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_files_load(method, photos, embedded):
    run = dreambooth.train(config(photos, method=method, lr=1e-2))
    files = dreambooth.save(run)
    assert files
    x = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 7, 192)
    with torch.no_grad():
        want, base = run.family.pipe.unet.eval()(*x).sample, embedded.unet(*x).sample
        assert (want - base).abs().max() > 1e-4
        for file in files:
            assert diffpeft.load_lora(embedded, file, name="trained").methods == {method}
            torch.testing.assert_close(embedded.unet(*x).sample, want, rtol=0, atol=1e-5)  # fp32, a whole UNet
            diffpeft.unload(embedded)


def test_a_run_knows_what_its_defaults_came_to(photos):
    run = dreambooth.train(config(photos, steps=1))
    assert (run.config.alpha, run.config.resolution, run.config.dtype, run.config.name) == (2, 64, "fp32", "out")


def test_only_the_adapter_is_trained(photos):
    base = open_pipeline().unet.state_dict()
    run, tensors = trained(photos=photos)
    diffpeft.unload(run.family.pipe)
    assert all(torch.equal(base[k], v) for k, v in run.family.pipe.unet.state_dict().items())
    assert any(t.abs().max() > 0 for k, t in tensors.items() if "lora_up" in k)
    assert not any(k.startswith("lora_te_") for k in tensors)


def test_the_text_encoder_is_trained_on_request(photos):
    _, tensors = trained(photos=photos, train_text_encoder=True)
    ups = [t for k, t in tensors.items() if k.startswith("lora_te_") and "lora_up" in k]
    assert len(ups) == 4 * 4 and all(t.abs().max() > 0 for t in ups)


def test_missing_class_images_are_generated_and_kept(photos, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "mine.png").write_bytes((DATA / "cat_face.png").read_bytes())
    options = dict(photos=photos, class_prompt="an emoji", class_data=str(folder), num_class_images=3, steps=1)
    run, _ = trained(**options)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(files) == ["class-0000.png", "class-0001.png", "class.json", "mine.png"]
    again, _ = trained(**options)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files and again.losses == run.losses
    plain, _ = trained(photos=photos, steps=1)
    assert plain.losses != run.losses


def test_bf16_trains_an_fp32_adapter(photos):
    run, tensors = trained(photos=photos, dtype="bf16")
    assert run.family.pipe.unet.dtype == torch.bfloat16
    assert {t.dtype for t in tensors.values()} == {torch.float32} and np.isfinite(run.losses).all()


def test_a_run_that_diverges_keeps_the_last_good_state_and_no_adapter(photos):
    with pytest.raises(DivergedError) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dreambooth.train(config(photos, lr=1e30, steps=5, max_grad_norm=1e30))
    (checkpoint,) = checkpoints_in(photos.parent / "out")
    assert not checkpoint.damage() and str(checkpoint.folder) in raised.value.__notes__[0]
    assert all(t.isfinite().all() for t in load_file(checkpoint.folder / "state.safetensors").values())
    kept = {"checkpoints", "report.html", "config.toml", "account.json", "metrics.csv", "samples"}
    assert {path.name for path in (photos.parent / "out").iterdir()} <= kept


@pytest.mark.parametrize(
    "options",
    [{"targets": "to_qq"}, {"class_data": "photos/cat_face.png"}, {"out": "photos/cat_face.png"}],
)
def test_what_can_be_checked_is_checked_before_class_images_are_drawn(photos, options, monkeypatch):
    monkeypatch.chdir(photos.parent)
    before = sorted(photos.parent.rglob("*"))
    with pytest.raises(diffpeft.DiffpeftError):
        dreambooth.train(config(photos, class_prompt="an emoji", num_class_images=2, **options))
    assert sorted(photos.parent.rglob("*")) == before


def test_a_resolution_that_the_model_cannot_have_is_refused(photos):
    with pytest.raises(ConfigError, match="multiple of 16"):
        dreambooth.train(config(photos, resolution=72))


def test_the_package_does_what_the_command_does(photos):
    run = diffpeft.train(config(photos, name="a", heldout="1"))
    out = photos.parent / "out"
    assert run.report == out / "report.html" and "finished" in run.report.read_text()
    assert {path.name for path in run.files} == {"a.diffusers.safetensors", "a.kohya.safetensors", "README.md"}
    assert all(path.is_file() for path in run.files) and run.best.step == 2
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["heldout_loss"].keys() >= {"before", "after", "standard_error"} and figures["steps"] == 2
    assert {"seconds", "samples_per_second", "peak_memory"} <= figures.keys()

"""A pipeline is opened model by model, from folders and files of every kind, and what was opened piece by piece is what was opened whole."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from diffpeft import CheckpointError, ConfigError, TrainConfig
from diffpeft.families import open_family
from diffpeft.families.parts import Parts
from diffpeft.pipeline import open as opening
from diffpeft.pipeline.open import EMBEDDED, check_model, open_parts, open_pipeline
from diffpeft.train import dreambooth, prior
from diffpeft.train.check import _usual_tokens
from tests.families.pipelines import KINDS, cells, pipeline
from tests.single_file import original

MODELS = {
    "sd15": ("unet", "text_encoder", "vae"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2", "vae"),
    "flux dev": ("transformer", "text_encoder", "text_encoder_2", "vae"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2", "vae"),
    "z_image": ("transformer", "text_encoder", "vae"),
    "flux2 klein": ("transformer", "text_encoder", "vae"),
    "qwen_image": ("transformer", "text_encoder", "vae"),
}


@pytest.fixture(scope="module", params=cells(MODELS, ("sd15", "sdxl", "flux dev")))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipeline(kind, torch.float32).save_pretrained(folder)
    return str(folder)


def same(ours, theirs):
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_model_is_loaded_when_it_is_asked_for(kind, folder):
    parts = open_parts(folder)
    assert not any(isinstance(part, torch.nn.Module) for part in parts.pipe.components.values())
    family = open_family(parts)
    whole = open_family(open_pipeline(folder))
    assert (family.resolution, family.multiple) == (whole.resolution, whole.multiple)
    for name in MODELS[kind]:
        shapes = {k: t.shape for k, t in parts.outline(name).state_dict().items()}
        assert getattr(parts.pipe, name) is None
        assert parts(name) is parts(name) is parts.outline(name) is getattr(parts.pipe, name)
        assert same(parts(name), getattr(whole.pipe, name)) and not parts(name).training
        assert shapes == {k: t.shape for k, t in parts(name).state_dict().items()}


UNSAVED = {"kolors"}  # whose tokenizer cannot be saved here


@pytest.mark.parametrize("name", cells(sorted(KINDS.keys() - UNSAVED), ("wan, two",)))
def test_a_pipeline_is_opened_without_its_weights(name, tmp_path):
    pipe = pipeline(name, torch.float32)
    pipe.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").rglob("*.safetensors"):
        weights.unlink()
    parts = open_parts(str(tmp_path / "model"))
    models = {part for part, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    assert all(parts.has(part) and parts.outline(part) is not None for part in models)


def test_what_is_freed_is_gone_and_comes_back(kind, folder):
    parts = open_parts(folder)
    for name in MODELS[kind]:
        model = weakref.ref(parts(name))
        parts.free(name)
        assert model() is None and getattr(parts.pipe, name) is None
    assert same(parts("vae"), open_pipeline(folder).vae)
    ready = Parts(parts.whole())
    ready.free("vae")
    assert ready("vae") is parts("vae")  # what nothing loads again stays


def config(tmp_path, **options):
    """A run of two steps on one picture."""
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    photo.write_bytes((EMBEDDED.parent / "demo/train/cat_face.png").read_bytes())
    fixed = {"data": str(photo.parent), "out": str(tmp_path / "out"), "instance_prompt": "x", "caption_dropout": 0.5}
    fixed["overwrite"] = True
    return TrainConfig(**fixed, resolution=32, steps=2, rank=2, **{"sample_every": 0, **options})


@pytest.fixture
def together(monkeypatch):
    """The models that are there whenever one is loaded, with that one."""
    alive: list[tuple[str, weakref.ref]] = []
    together: list[set[str]] = []
    load = opening._Files.load

    def noted(files, name):
        gc.collect()
        together.append({other for other, model in alive if model() is not None} | {name})
        model = load(files, name)
        alive.append((name, weakref.ref(model)))
        return model

    monkeypatch.setattr(opening._Files, "load", noted)
    return together


def test_a_run_has_room_for_one_model_at_a_time(kind, folder, tmp_path, together):
    """Neither of the text encoders, the VAE and the denoiser is there while another is."""
    dreambooth.train(config(tmp_path, model=folder))
    assert together == [{name} for name in [*MODELS[kind][1:], MODELS[kind][0]]]


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux dev"], indirect=True)  # whose pictures are small
@pytest.mark.slow  # runs of each family, whose parts are asked above
def test_class_images_are_drawn_without_text_encoders(kind, folder, tmp_path, together, monkeypatch):
    monkeypatch.setattr(prior, "STEPS", 1)
    options = config(tmp_path, model=folder, class_prompt="a dog", num_class_images=2, dtype="bf16")
    run = dreambooth.train(options)
    denoiser, *encoders, vae = MODELS[kind]
    assert together == [*({name} for name in encoders), {vae}, {vae, denoiser}]
    assert len(list((tmp_path / "out" / "class").glob("*.png"))) == 2
    assert all(math.isfinite(loss) for loss in run.losses)
    assert dreambooth.train(replace(options, overwrite=True)).losses == run.losses


def test_how_much_of_captions_is_read_is_told_without_the_model(kind, folder):
    most = _usual_tokens(folder)
    assert most in (None, open_family(open_parts(folder)).max_length) and (most is None) == (kind in SAID)


SAID = ("sd15", "sdxl", "flux dev")  # by their tokenizers


# -- single files --------------------------------------------------------------------------------------------------------


def single_file(kind, folder, tmp_path, marks=()):
    """A single file with the original names of a Stable Diffusion, or diffusers' own of a denoiser alone."""
    pipe = open_pipeline(folder)
    tensors = original(pipe) if kind == "sd15" else dict(getattr(pipe, MODELS[kind][0]).state_dict())
    path = tmp_path / "model.safetensors"
    save_file({k: t.contiguous() for k, t in tensors.items()} | {m: torch.zeros(0) for m in marks}, path)
    return str(path)


def split_files(kind, folder, tmp_path):
    """The VAE and the text encoders of a pipeline in files of their own, the encoders under transformers' older names."""
    pipe, files = open_pipeline(folder), {}
    for name in MODELS[kind][1:]:
        tensors = getattr(pipe, name).state_dict()
        if name == "text_encoder":
            tensors = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in tensors.items()}
        files[name] = str(tmp_path / f"{name}.safetensors")
        save_file({k: t.clone() for k, t in tensors.items()}, files[name])
    return files


def without_weights(folder, tmp_path):
    """The configs and tokenizers of a pipeline."""
    import shutil

    return str(shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize(
    "kind", cells([kind for kind in MODELS if kind != "sd15"], ("sdxl", "flux dev")), indirect=True
)  # whose files hold all
def test_the_files_of_comfyui_are_opened_one_by_one(kind, folder, tmp_path):
    base, model = without_weights(folder, tmp_path), single_file(kind, folder, tmp_path)
    files, whole = split_files(kind, folder, tmp_path), open_pipeline(folder)
    encoders = [file for name, file in files.items() if name != "vae"]
    for order in (encoders, encoders[::-1]):
        parts = open_parts(model, base, vae=files["vae"], text_encoders=order)
        assert all(same(parts(name), getattr(whole, name)) for name in MODELS[kind])
    with pytest.raises(CheckpointError, match="none of the model's text encoders"):
        open_parts(model, base, vae=files["vae"], text_encoders=[files["vae"]])
    with pytest.raises(CheckpointError):  # which file has them, nobody said
        open_parts(model, base)(MODELS[kind][-2])


@pytest.mark.parametrize("kind", ["flux dev"], indirect=True)
@pytest.mark.slow
def test_a_run_from_split_files_is_the_run_from_the_folder(kind, folder, tmp_path):
    run = config(tmp_path, model=folder)
    files = split_files(kind, folder, tmp_path)
    split = replace(
        run,
        out=str(tmp_path / "other"),
        model=single_file(kind, folder, tmp_path),
        base=without_weights(folder, tmp_path),
        vae=files.pop("vae"),
        text_encoder=", ".join(files.values()),
    )
    assert dreambooth.train(run).losses == dreambooth.train(split).losses


@pytest.mark.parametrize("kind", ["sd15", "sdxl"], indirect=True)
def test_a_whole_single_file_is_opened_one_by_one(kind, folder, tmp_path):
    base, whole = without_weights(folder, tmp_path), open_pipeline(folder)
    save_file(original(whole), tmp_path / "model.safetensors")
    parts = open_parts(str(tmp_path / "model.safetensors"), base)
    assert not any(isinstance(part, torch.nn.Module) for part in parts.pipe.components.values())
    assert all(same(parts(name), getattr(whole, name)) for name in MODELS[kind])


@pytest.mark.parametrize("scheduler", ["as it is", "PNDMScheduler"])
@pytest.mark.parametrize(
    "marks, kind, last",
    [((), "epsilon", False), (("v_pred",), "v_prediction", False), (("v_pred", "ztsnr"), "v_prediction", True)],
)
def test_marks_in_a_single_file_say_what_it_predicts(marks, kind, last, scheduler, tmp_path):
    base = without_weights(EMBEDDED, tmp_path)
    if scheduler != "as it is":
        import diffusers

        known = open_pipeline().scheduler.config
        getattr(diffusers, scheduler).from_config(known).save_pretrained(f"{base}/scheduler")
    parts = open_parts(single_file("sd15", None, tmp_path, marks), base)
    levels = open_family(parts).levels
    assert levels.kind == kind and (levels.alphas[-1] == 0) == last
    sampler = parts.pipe.scheduler.config
    assert sampler.prediction_type == kind and bool(sampler.get("rescale_betas_zero_snr")) == last


def test_files_that_nothing_would_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="vae"):
        check_model(str(EMBEDDED), None, vae="vae.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no such file of the text encoder"):
        check_model(str(tmp_path / "m.safetensors"), str(EMBEDDED), text_encoders=[str(tmp_path / "clip.safetensors")])


def test_every_family_is_opened_by_some_test():
    assert {KINDS[kind][0] for kind in MODELS} >= {"sd15", "sdxl", "flux"}

"""A model opens with every weight from its files, or not at all."""

import json
import re
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpeft import CheckpointError, ConfigError
from diffpeft.families.base import Sizes
from diffpeft.families.sd import StableDiffusion
from diffpeft.llm import sft
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.complete import not_loaded
from diffpeft.pipeline.open import EMBEDDED, Facts, check_model, facts, open_pipeline
from tests.llm import chat
from tests.single_file import original

FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def changed(path, change):
    """Rewrite a file of weights; the name of the weight that was changed."""
    tensors = load_file(path)
    name = next(k for k, t in tensors.items() if t.ndim > 1)
    change(tensors, name)
    save_file(tensors, path, {"format": "pt"})
    return name.removeprefix("text_model.")


CHANGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "renamed": lambda tensors, name: tensors.update({f"old.{name}": tensors.pop(name)}),
    "of another shape": lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}),
}


@pytest.mark.parametrize("component", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_no_file_holds_is_an_error_that_names_it(component, change, folder):
    name = changed(folder / component / f"{FILES[component]}.safetensors", CHANGES[change])
    with pytest.raises(CheckpointError) as caught:
        open_pipeline(str(folder))
    assert name in str(caught.value) and caught.value.remedy
    if change != "of another shape" or component == "text_encoder":  # diffusers itself names the weight, and the file
        assert component in str(caught.value)


def test_all_weights_under_other_names_are_told_in_one_line(folder):
    path = folder / "text_encoder" / "model.safetensors"
    save_file({f"old.{k}": t for k, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_encoder .*lacks 68 of its weights.* and 65 more"):
        open_pipeline(str(folder))


def test_what_is_wrong_beside_the_weights_is_not_blamed_on_them(folder, monkeypatch):
    def load(folder, **parts):
        model = parts["vae"]  # which the library is at
        raise OSError(f"no image processor beside {type(model).__name__}")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    with pytest.raises(CheckpointError, match="no image processor"):
        open_pipeline(str(folder))


@pytest.mark.parametrize("kind", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_a_single_file_that_lacks_a_weight_is_refused(kind, tmp_path):
    tensors = original(open_pipeline())
    name = next(k for k, t in tensors.items() if k.startswith(kind) and t.ndim > 1)
    save_file({k: t for k, t in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 of its weights"):
        open_pipeline(str(tmp_path / "model.safetensors"), str(EMBEDDED))


def test_a_model_of_a_later_library_names_the_version_that_is_wanted(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "99.1.0"}))
    changed(folder / "text_encoder" / "model.safetensors", CHANGES["missing"])
    with pytest.raises(CheckpointError, match=r"transformers 99\.1\.0"):
        open_pipeline(str(folder))


@pytest.mark.parametrize("change", CHANGES)
def test_a_language_model_opens_with_every_weight_from_its_files(change, tmp_path):
    folder = chat.write_model(tmp_path / "model")
    config = SftConfig(model=str(folder), data="d", out="o", dtype="fp32")
    sft.open_model(config, "cpu")
    name = changed(folder / "model.safetensors", CHANGES[change])
    with pytest.raises(CheckpointError) as caught:
        sft.open_model(config, "cpu")
    assert name in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path):
    folder = chat.write_model(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, opened = sft.open_model(SftConfig(model=str(folder), data="d", out="o", dtype="fp32"), "cpu")
    assert opened.lm_head.weight is opened.get_input_embeddings().weight


def test_the_embedded_base_has_clips_names_as_every_version_of_transformers_reads_them():
    names = load_file(EMBEDDED / "text_encoder" / "model.safetensors")
    assert names and all(name.startswith("text_model.") for name in names)


def test_the_configs_tell_what_a_pipeline_is_without_loading_it(folder):
    known = facts(None)
    assert known == facts(str(folder)) and known.pipeline == "StableDiffusionPipeline"
    unet, vae = known.configs["unet"], known.configs["vae"]
    assert (unet["in_channels"], vae["latent_channels"]) == (4, 4) and StableDiffusion.sizes(known.configs) == Sizes(
        64, 16
    )
    (folder / "model_index.json").write_text("[]")
    assert facts(str(folder)).pipeline is None and facts("/nowhere") == Facts()


def test_of_a_model_on_the_hub_the_configs_are_fetched_once_and_then_known(tmp_path, monkeypatch):
    asked = []

    def download(repo, name):
        asked.append(name)
        return str(EMBEDDED / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert facts("owner/name") == facts(None) and asked == ["model_index.json", "unet/config.json", "vae/config.json"]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(EMBEDDED / name))
    assert facts("owner/name") == facts(None) and len(asked) == 3
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: asked.append(name) or 1 / 0)
    assert facts("owner/name") == Facts() and asked[3:] == ["model_index.json"]


def test_a_base_that_nothing_would_read_is_refused():
    with pytest.raises(ConfigError, match="base"):
        check_model(str(EMBEDDED), str(EMBEDDED))


@pytest.mark.parametrize(
    "error, remedy",
    [
        (
            ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint"),
            r"pip install diffpeft\[llm\]",
        ),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), r"pip install diffpeft\[llm\]"),
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"), "pip install sentencepiece"),
        (ImportError("requires the protobuf library"), "package that it names"),
        (OSError("no such repository"), "the network"),
    ],
)
def test_a_package_that_is_missing_has_a_remedy_of_its_own(error, remedy):
    assert re.search(remedy, not_loaded(error, "m").remedy)

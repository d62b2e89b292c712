"""What files say of a run: sd-scripts' and ModelSpec's names, in every file and every state, the same bytes from the same run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from diffpeft import TrainConfig, converters
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth, metadata
from diffpeft.train.metadata import metadata_of
from tests.train.pictures import DATA

PRIVATE = "a private folder"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three images in two folders, one of which counts three times."""
    home = tmp_path_factory.mktemp("home") / PRIVATE
    for path, caption in (
        ("photos/3_sks dog/a.png", "sks dog, Sitting, , on grass"),
        ("photos/3_sks dog/b.png", "sks dog, sitting"),
        ("photos/more/c.png", "a CAT"),
    ):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        size = (96, 64) if path.endswith("b.png") else (64, 64)
        Image.open(DATA / "cat_face.png").convert("RGB").resize(size).save(home / path)
        (home / path).with_suffix(".txt").write_text(caption)
    (home / "class").mkdir()
    for name in "xy":
        Image.new("RGB", (64, 64), "red").save(home / "class" / f"{name}.png")
    config = TrainConfig(
        model=str(EMBEDDED),
        data=str(home / "photos"),
        out=str(home / "out"),
        name="dog",
        trigger="sks dog",
        class_prompt="a dog",
        class_data=str(home / "class"),
        num_class_images=2,
        steps=4,
        save_every=2,
        sample_every=0,
        batch_size=2,
        accumulate=2,
        rank=2,
        lr=1e-3,
        author="Ann",
        license="mit",
        optimizer_args="eps=1e-6",
    )
    finished = dreambooth.train(config)
    return finished, dreambooth.save(finished), home


def told_by(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


def test_the_words_of_sd_scripts_say_what_the_run_was(run):
    finished, files, _ = run
    for file in files:
        told = told_by(file)
        expected = {
            "ss_output_name": "dog",
            "ss_network_dim": "2",
            "ss_network_alpha": "2",
            "ss_learning_rate": "0.001",
            "ss_unet_lr": "0.001",
            "ss_optimizer": "torch.optim.AdamW(eps=1e-6)",
            "ss_mixed_precision": "no",
            "ss_seed": "0",
            "ss_num_train_images": "7",  # 2 x 3 + 1
            "ss_num_reg_images": "2",
            "ss_batch_size_per_device": "2",
            "ss_total_batch_size": "4",
            "ss_gradient_accumulation_steps": "2",
            "ss_num_batches_per_epoch": "4",  # 7 pictures, 2 a batch
            "ss_num_epochs": "2",  # 4 batches are 2 steps
            "ss_epoch": "2",
            "ss_steps": "4",
            "ss_max_train_steps": "4",
            "ss_resolution": "(64, 64)",
            "ss_enable_bucket": "True",
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_sd_model_name": EMBEDDED.name,
            "ss_prior_loss_weight": "1.0",
            "ss_loss_type": "l2",
        }
        assert {name: told.get(name) for name in expected} == expected
        tables = {
            "ss_dataset_dirs": {
                "3_sks dog": {"n_repeats": 3, "img_count": 2},
                "more": {"n_repeats": 1, "img_count": 1},
            },
            "ss_reg_dataset_dirs": {"class": {"n_repeats": 1, "img_count": 2}},
            "ss_tag_frequency": {"3_sks dog": {"sks dog": 2, "sitting": 2, "on grass": 1}, "more": {"a cat": 1}},
        }
        assert {name: json.loads(told[name]) for name in tables} == tables
        buckets = json.loads(told["ss_bucket_info"])
        counts = {tuple(of["resolution"]): of["count"] for of in buckets["buckets"].values()}
        wide = finished.account.targets["3_sks dog/b.png"][0]
        assert counts == {(64, 64): 4, wide: 3} and [*buckets["buckets"]] == ["0", "1"]
        assert buckets["mean_img_ar_error"] == pytest.approx(abs(wide[0] / wide[1] - 1.5) / 3)
    assert told_by(files[1])["ss_network_module"] == "networks.lora"


def test_the_words_of_modelspec_say_what_the_file_is(run):
    for file in run[1]:
        told = told_by(file)
        spec = {name.partition(".")[2]: text for name, text in told.items() if name.startswith("modelspec.")}
        digest = spec.pop("hash_sha256")
        assert spec.pop("usage_hint") and spec.pop("tags") == "lora, sd15"
        assert spec == {
            "sai_model_spec": "1.0.1",
            "architecture": "stable-diffusion-v1/lora",
            "implementation": "diffusers",
            "title": "dog",
            "author": "Ann",
            "license": "mit",
            "resolution": "64x64",
            "prediction_type": "epsilon",
            "trigger_phrase": "sks dog",
        }
        assert digest == f"0x{told['sshs_model_hash']}"
        assert json.loads(told["trained_words"]) == ["sks dog"]
        assert converters.inspect(file).trigger_words == ("sks dog",)


def test_every_file_and_every_state_has_its_hashes_and_says_nothing_of_the_machine(run):
    _, files, home = run
    states = list(home.glob("out/checkpoints/*/dog.*.safetensors"))
    assert len(states) == 4
    for file in [*files, *states]:
        told, content = told_by(file), file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        assert told["sshs_model_hash"] == hashlib.sha256(content[begin:]).hexdigest()
        shown = save(load_file(file), {name: text for name, text in told.items() if name.startswith("ss_")})
        assert told["sshs_legacy_hash"] == hashlib.sha256(shown[0x100000:0x110000]).hexdigest()[:8]
        text = json.dumps(told)
        assert PRIVATE not in text and str(Path(EMBEDDED).parent) not in text and "/tmp" not in text
        assert not re.search(r'"None"|"nan"|"null"', text)
    steps = {told_by(path)["ss_steps"]: told_by(path)["ss_epoch"] for path in states}
    assert steps == {"2": "1", "4": "2"}
    assert "thumbnail" not in json.dumps(told_by(states[0]))


def test_the_options_that_the_adapter_follows_from_are_in_it(run):
    _, files, _ = run
    options = json.loads(told_by(files[0])["diffpeft.options"])
    assert options["data"] == "photos" and options["class_data"] == "class" and options["trigger"] == "sks dog"
    assert options["model"] == EMBEDDED.name and "out" not in options and "save_every" not in options


def test_the_same_run_elsewhere_has_the_same_bytes(run, tmp_path):
    finished, files, home = run
    (tmp_path / "there").mkdir()
    for name in ("photos", "class"):
        (home / name).rename(tmp_path / "there" / name)
    try:
        again = replace(
            finished.config,
            data=str(tmp_path / "there/photos"),
            class_data=str(tmp_path / "there/class"),
            out=str(tmp_path / "other"),
            save_every=0,
        )
        assert [p.read_bytes() for p in dreambooth.save(dreambooth.train(again))] == [p.read_bytes() for p in files]
    finally:
        for name in ("photos", "class"):
            (tmp_path / "there" / name).rename(home / name)


def test_the_newest_picture_is_the_thumbnail(run, tmp_path):
    finished, _, _ = run
    for step, name, colour in (
        (0, "p0_s42", "red"),
        (4, "p0_s42", "blue"),
        (4, "p0_s42_w0", "black"),
        (4, "p1_s42", "white"),
        (5, "p0_s42", "green"),
    ):
        path = tmp_path / "out/samples" / f"step{step:08d}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (512, 300), colour).save(path)
    shown = replace(finished, config=replace(finished.config, out=str(tmp_path / "out")))
    for file in dreambooth.save(shown):
        head, _, data = told_by(file)["modelspec.thumbnail"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert head == "data:image/jpeg;base64" and image.format == "JPEG" and image.size == (256, 150)
            r, g, b = image.getpixel((5, 5))
            assert b > 200 and r < 50 and g < 50


METHODS = {
    "lora": ("networks.lora", None),
    "dora": ("lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
    "lokr": ("lycoris.kohya", {"algo": "lokr"}),
    "oft": ("lycoris.kohya", {"algo": "oft"}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind, module, names",
    [
        ("sd15", None, "diffusers"),
        ("sdxl", None, "https://github.com/Stability-AI/generative-models"),
        ("flux dev", "networks.lora_flux", "https://github.com/black-forest-labs/flux"),
    ],
)
def test_module_arguments_and_names_follow_from_method_family_and_format(kind, module, names, method, tmp_path):
    import torch

    from tests.families.pipelines import pipeline
    from tests.train.test_saving import run_of

    run = run_of(
        pipeline(kind, torch.float32), tmp_path, method=method, formats="kohya,kohya-diffusers", targets="attn-mlp"
    )
    usual, arguments = METHODS[method]
    for file in dreambooth.save(run):
        told = told_by(file)
        if "kohya.safe" in file.name:
            assert told["ss_network_module"] == ((module or usual) if method == "lora" else usual)
        assert told["modelspec.implementation"] == (names if "kohya.safe" in file.name else "diffusers")
        assert (json.loads(told["ss_network_args"]) if arguments else told.get("ss_network_args")) == arguments


def test_what_an_earlier_run_said_of_the_file_is_gone(run, tmp_path):
    """A run that goes on with an adapter says what it itself was."""
    finished, _, _ = run
    noisy = replace(
        finished, config=replace(finished.config, noise_offset=0.1, out=str(tmp_path / "noisy"), description="x")
    )
    start = dreambooth.save(noisy)[1]
    assert told_by(start)["ss_noise_offset"] == "0.1"
    again = replace(finished.config, init_from=str(start), out=str(tmp_path / "again"), steps=1, save_every=0)
    for file in dreambooth.save(dreambooth.train(again)):
        told = told_by(file)
        assert "ss_noise_offset" not in told and "modelspec.description" not in told and told["ss_steps"] == "1"


def test_a_single_file_is_known_by_its_hashes(run, tmp_path):
    finished, _, _ = run
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    told = metadata_of(replace(finished, config=replace(finished.config, model=str(tmp_path / "model.safetensors"))))
    content = (tmp_path / "model.safetensors").read_bytes()
    assert told["ss_sd_model_name"] == "model.safetensors"
    assert told["ss_new_sd_model_hash"] == hashlib.sha256(content).hexdigest()
    assert told["ss_sd_model_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_an_id_of_the_hub_is_no_path():
    assert metadata.is_id("stabilityai/sdxl-base-1.0") and not metadata.is_id("/home/me/model")
    assert metadata._without_folders("/home/ann/a.safetensors:0.5,me/b") == "a.safetensors:0.5,me/b"
    assert metadata._without_folders([r"C:\Users\ann\photos:3", "x/y/z/"]) == ["photos:3", "z"]


def test_inspect_shows_trigger_words_and_tags(run):
    from click.testing import CliRunner

    from diffpeft.cli import cli

    _, files, _ = run
    text = CliRunner().invoke(cli, ["inspect", str(files[0])]).output
    assert re.search(r"trigger words +sks dog\n", text)
    assert re.search(r"tags +sks dog 2, sitting 2, on grass 1, a cat 1\n", text)


def test_captions_of_any_size_and_any_letters_do_not_keep_a_file_from_being_written(run, tmp_path):
    """All that is learnt would be lost: only as many tags are told as a header has room for, the most frequent ones."""
    finished, _, _ = run
    example = finished.account.examples[0]
    captions = [f"sks dog, {'x' * 2000} {number}" for number in range(6000)] + ["half \ud800 of a pair\0"]
    examples = tuple(replace(example, caption=caption) for caption in captions)
    config = replace(finished.config, out=str(tmp_path), instance_prompt="\ud800", formats="kohya,peft")
    large = replace(finished, config=config, account=replace(finished.account, examples=examples))
    for file in dreambooth.save(large)[:1]:
        (tags,) = json.loads(told_by(file)["ss_tag_frequency"]).values()
        assert tags["sks dog"] == 6000 and 100 < len(tags) < 1000

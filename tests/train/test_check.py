"""What can be told before a large library is loaded is told then: unusable options, data and models, by name and with a remedy."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file

import diffpeft
from diffpeft import ConfigError, DataError, TrainConfig, UnknownNameError, WrongBaseError
from diffpeft.llm.sft_check import check as check_sft
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import budget
from diffpeft.train.check import check
from diffpeft.train.config import OTHER_NAMES, target_names
from diffpeft.train.config_files import from_toml
from diffpeft.train.other_names import TABLE, hint

PHOTO = EMBEDDED.parent / "demo" / "train" / "cat_face.png"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(PHOTO.read_bytes())
    return TrainConfig(
        model=str(EMBEDDED), data=str(tmp_path / "photos"), out=str(tmp_path / "out"), instance_prompt="sks"
    )


# -- options that would do nothing ---------------------------------------------------------------------------------------

NOTHING = {  # {options: what the message names}
    ("lr", 0.0): "lr",
    ("alpha", 0.0): "alpha",
    ("alpha", -1.0): "alpha",
    ("snr_gamma", 0.0): "snr_gamma",
    ("max_grad_norm", 0.0): "max_grad_norm",
    ("warmup", 501): "warmup",
    ("prior_weight", 2.0): "class_prompt",
    ("num_class_images", 5): "class_prompt",
    ("class_data", "c"): "class_prompt",
    ("base", str(EMBEDDED)): "base",
    ("class_prompt", ""): "class_prompt",
    ("class_prompt", " \t"): "class_prompt",
    ("instance_prompt", ""): "instance_prompt",
    ("name", ""): "name",
    ("targets", ""): "targets",
    ("targets", ()): "targets",
    ("targets", ("to_q", "")): "targets",
    ("data", ""): "data",
}


@pytest.mark.parametrize("option, says", NOTHING.items())
def test_an_option_that_would_do_nothing_is_refused(option, says, config):
    with pytest.raises(ConfigError, match=says) as caught:
        check(replace(config, **dict([option])))
    assert caught.value.remedy and "None" not in str(caught.value)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_class_images_that_would_not_count_are_refused(weight, config):
    with pytest.raises(ConfigError, match="prior_weight"):
        check(replace(config, class_prompt="a dog", prior_weight=weight))


SFT = [("lr", 0.0), ("alpha", 0.0), ("max_grad_norm", 0.0), ("warmup", 501), ("targets", ""), ("heldout", "")]


@pytest.mark.parametrize("option", SFT)
def test_sft_refuses_them_too(option, tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "config.json").write_text("{}")
    config = SftConfig(model=str(tmp_path), data=str(tmp_path / "a.txt"), out=str(tmp_path / "out"))
    check_sft(config)
    with pytest.raises(ConfigError, match=option[0]):
        check_sft(replace(config, **dict([option])))


@pytest.mark.parametrize("kind", [TrainConfig, SftConfig])
def test_an_option_that_needs_another_names_one_that_there_is(kind):
    names = {f.name for f in fields(kind)}
    assert {f.metadata["needs"] for f in fields(kind)} - {""} <= names


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my dog", "a/b", "..", ".", "x" * 129, "é"])
def test_a_name_that_no_adapter_can_have_is_refused(name, config):
    with pytest.raises(ConfigError, match="name"):
        check(replace(config, name=name))


@pytest.mark.parametrize(
    "out, name", [("my dog", "my_dog"), ("...", "adapter"), ("x" * 200, "x" * 128), ("v1.2", "v1.2")]
)
def test_the_name_of_the_output_folder_is_made_one(out, name, config, tmp_path):
    assert check(replace(config, out=str(tmp_path / out))).name == name


@pytest.mark.parametrize(
    "given, means",
    [
        ("attn", "attn"),
        ("full", "full"),
        (["full"], "full"),
        ("to_q", ["to_q"]),
        ("to_q, to_v", ["to_q", "to_v"]),
        (("to_q", "attn1.to_v"), ["to_q", "attn1.to_v"]),
        ("to_out.0", ["to_out.0"]),
        (r".*\.to_[qv]", r".*\.to_[qv]"),
        (r"a,b.*", r"a,b.*"),
    ],
)
def test_targets_are_names_as_everywhere_or_an_expression(given, means):
    assert target_names(given, ("attn", "full")) == means


@pytest.mark.parametrize("given", ["attn,to_q", ["to_q", "full"]])
def test_a_preset_among_names_is_refused(given):
    with pytest.raises(ConfigError, match="preset"):
        target_names(given, ("attn", "full"))


def test_every_hint_names_an_option():
    known = {f.name for kind in (TrainConfig, SftConfig) for f in fields(kind)}
    assert {text.partition(",")[0] for text in OTHER_NAMES.values()} <= known
    assert not OTHER_NAMES.keys() & known
    assert hint("huber_delta", {f.name for f in fields(SftConfig)}) == ""


# -- the file of options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learning_rate", "network_dim", "max_train_steps", "train-batch-size"])
def test_another_trainers_option_is_taken_as_ours_and_elsewhere_answered_with_it(name, tmp_path):
    (tmp_path / "a.toml").write_text(f"{name} = 3")
    ours = TABLE[name.replace("-", "_")].ours
    assert getattr(from_toml(tmp_path / "a.toml", {}), ours) == 3
    with pytest.raises(UnknownNameError, match=f"Here that is {ours}"):
        from_toml(tmp_path / "a.toml", {}, SftConfig)


def test_all_options_are_listed(tmp_path):
    (tmp_path / "a.toml").write_text("stpes = 1")
    with pytest.raises(UnknownNameError, match="Did you mean 'steps'") as caught:
        from_toml(tmp_path / "a.toml", {})
    assert all(f.name in caught.value.remedy for f in fields(TrainConfig))


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_file(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfrank = 4\r\nout = 'a'\r\ntargets = ['to_q', 'to_v']\r\n")
    config = from_toml(tmp_path / "a.toml", {})
    assert (config.rank, config.out, list(config.targets)) == (4, "a", ["to_q", "to_v"])


@pytest.mark.parametrize(
    "line",
    [
        'data = "C:\\Users\\me"',
        'data = "C:\\new"',
        'out = "D:\\temp\\x"',
        'model = "\\\\server\\share"',
        'data = "C:\\b"',
    ],
)
def test_a_windows_path_in_double_quotes_is_explained(line, tmp_path):
    (tmp_path / "a.toml").write_text(f"rank = 4\n{line}\n")
    with pytest.raises(ConfigError, match="single quotes"):
        from_toml(tmp_path / "a.toml", {})


@pytest.mark.parametrize(
    "line, path", [("data = 'C:\\new'", "C:\\new"), ('data = "C:\\\\new"', "C:\\new"), ('data = "a b"', "a b")]
)
def test_a_windows_path_that_is_spelt_right_is_taken(line, path, tmp_path):
    (tmp_path / "a.toml").write_text(line)
    assert from_toml(tmp_path / "a.toml", {}).data == path


@pytest.mark.parametrize(
    "wrong, says", [({"rank": "a"}, "whole number"), ({"rank": 2.0}, "rank is 2.0"), ({"flip": 1}, "true or false")]
)
def test_what_a_value_is_and_should_be_is_said_in_words(wrong, says, config):
    with pytest.raises(ConfigError, match=says):
        check(replace(config, **wrong))


# -- models ----------------------------------------------------------------------------------------------------------------

CLASSES = {  # {a pipeline for another task: those of its kind that are trained}
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline": "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline": "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline": "StableDiffusionPipeline",
    "StableDiffusionDepth2ImgPipeline": "StableDiffusionPipeline",
    "WanVACEPipeline": "WanPipeline or a WanImageToVideoPipeline",
    "FluxControlInpaintPipeline": "FluxPipeline or a FluxKontextPipeline or a FluxControlPipeline",
    "QwenImageEditInpaintPipeline": "QwenImagePipeline or a QwenImageEditPipeline",
}


def folder_of(tmp_path, index=None, unet=None):
    """A copy of the embedded base without its weights, with other configs."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in (("model_index.json", index), ("unet/config.json", unet)):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **(change or {})}))
    return str(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipeline_that_cannot_be_trained_is_told_by_its_class(name, config, tmp_path):
    with pytest.raises(WrongBaseError, match=f"a {name} cannot be trained.*another task") as caught:
        check(replace(config, model=folder_of(tmp_path, {"_class_name": name})))
    assert f"of a {CLASSES[name]}" in caught.value.remedy and len(caught.value.remedy) < 300


@pytest.mark.parametrize("channels", [5, 7, 8, 9])
def test_a_unet_that_reads_more_than_an_image_is_told_by_its_channels(channels, config, tmp_path):
    with pytest.raises(WrongBaseError, match=f"{channels} channels"):
        check(replace(config, model=folder_of(tmp_path, unet={"in_channels": channels})))


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CHECKPOINTS = {
    "inpainting": ({FIRST: torch.zeros(8, 9, 3, 3)}, "9 channels"),
    "SDXL": ({FIRST: torch.zeros(8, 4, 3, 3), "conditioner.embedders.0.x": torch.zeros(1)}, "Diffusion XL"),
    "SD3": ({"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, "Diffusion 3"),
    "Flux": ({"double_blocks.0.x": torch.zeros(1)}, "Flux.*--base"),
    "Chroma": ({"double_blocks.0.x": torch.zeros(1), "distilled_guidance_layer.x": torch.zeros(1)}, "Chroma.*--base"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_single_file_of_another_kind_is_told_by_its_names(kind, config, tmp_path):
    tensors, says = CHECKPOINTS[kind]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WrongBaseError, match=says):
        check(replace(config, model=str(tmp_path / "model.safetensors"), base=str(EMBEDDED)))


FOREIGN = {  # {what a single file is: (its tensors, what is said with the base of a Flux)}
    "of Stable Diffusion": ({"cond_stage_model.x": torch.zeros(1)}, "Stable Diffusion 1 or 2.*FluxPipeline.*--base"),
    "for filling": ({"double_blocks.0.x": torch.zeros(1), "img_in.weight": torch.zeros(8, 384)}, "384 channels"),
    "right": ({"double_blocks.0.x": torch.zeros(1), "img_in.weight": torch.zeros(8, 16)}, None),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_single_file_is_compared_with_its_base(kind, config, tmp_path):
    tensors, says = FOREIGN[kind]
    save_file(tensors, tmp_path / "model.safetensors")
    base = tmp_path / "base"
    for name, values in {
        "model_index.json": {
            "_class_name": "FluxPipeline",
            "transformer": ["diffusers", "x"],
            "vae": ["diffusers", "x"],
        },
        "transformer/config.json": {"in_channels": 16},
        "vae/config.json": {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8]},
    }.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps(values))
    single = replace(config, model=str(tmp_path / "model.safetensors"), base=str(base))
    if says is None:
        assert check(single).account.examples
        return
    with pytest.raises(WrongBaseError, match=says):
        check(single)


def test_a_refiner_is_told_from_its_model_by_its_text_width(config, tmp_path):
    folder = folder_of(tmp_path, {"_class_name": "StableDiffusionXLPipeline"}, {"cross_attention_dim": 1280})
    with pytest.raises(WrongBaseError, match="sdxl_refiner"):
        check(replace(config, model=folder))


def test_the_account_knows_the_models_resolution(config):
    assert check(config).account.resolution == 64 and check(replace(config, resolution=32)).account.resolution == 32


# -- and all of it at once ---------------------------------------------------------------------------------------------------

_RUN = """
import json, sys
from diffpeft.cli.errors import run
from diffpeft.cli import cli
for args in json.loads(sys.argv[1]):
    code = run(cli, args)
    assert code in (2, 3, 4), (code, args)
    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), args
"""


def test_no_mistake_that_needs_no_model_waits_for_torch(config, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "b.png").write_bytes(b"no picture")
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": null}]}')
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    base = ["train", "-m", config.model, "-d", config.data, "-o", config.out, "--instance-prompt", "x"]
    sft = ["sft", "-m", str(tmp_path / "m.gguf"), "-o", config.out, "-d"]
    runs = [
        [*base, "-d", str(tmp_path / "photo")],
        [*base, "-d", config.model],
        [*base, "-d", str(tmp_path / "bad")],
        [*base[:-2]],
        [*base, "--lr", "0"],
        [*base, "--name", "my dog"],
        [*base, "--method", "lorra"],
        [*base, "--learning-rate", "0"],
        [*base, "--scale_lr"],
        [*base, "--network_dim", "x"],
        [*base, "--learnin-rate", "1"],
        [*base, "--class-prompt", "x", "--class-data", str(tmp_path / "bad")],
        [*base, "-m", folder_of(tmp_path, {"_class_name": "FluxFillPipeline"})],
        [*base, "-m", str(tmp_path / "nothing")],
        [*sft, str(tmp_path / "rows.jsonl")],
        [*sft, str(tmp_path / "nothing.jsonl")],
        [*sft, str(tmp_path / "rows.jsonl"), "--quantize", "nf4"],
        ["inspect", str(tmp_path / "nothing")],
        ["generate", "-p", "x", "-o", "x.doc"],
        ["generate", "-p", "x", "--lora", str(tmp_path / "nothing")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(runs)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_a_list_of_names_says_how_many_it_leaves_out():
    few = UnknownNameError.of("layer", "x", [f"layer{i}" for i in range(60)])
    assert "layer59" in few.remedy and "more" not in few.remedy
    many = UnknownNameError.of("layer", "x", [f"down_blocks.{i}.attentions.0.to_q" for i in range(900)])
    shown = many.remedy.count("to_q")
    assert many.remedy.endswith(f"and {900 - shown} more.") and 20 < shown < 900
    assert "none" in UnknownNameError.of("layer", "x", ()).remedy


def test_what_was_typed_is_never_suggested():
    from diffpeft.errors import near

    assert near("to_q", ["to_q", "to_v"]) == "Did you mean 'to_v'?" and near("to_q", ["to_q"]) == ""


def test_data_errors_are_no_config_errors(config, tmp_path):
    with pytest.raises(DataError, match="photos"):
        check(replace(config, data=str(tmp_path / "photo")))
    assert issubclass(diffpeft.NothingLearntError, diffpeft.DiffpeftError)


def test_one_of_two_denoisers_is_told_of_a_model_that_has_one(config, tmp_path):
    for said in ("high", "low", "both"):
        with pytest.raises(ConfigError, match=f"experts is {said}, and this model has one"):
            check(replace(config, experts=said))
    two = {"transformer": ["diffusers", "X"], "transformer_2": ["diffusers", "X"]}
    check(replace(config, model=folder_of(tmp_path, two), experts="low"))


def test_a_denoiser_that_a_library_holds_in_few_bits_stays_as_it_is(config, tmp_path):
    held = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    there = replace(config, model=folder_of(tmp_path, unet=held))
    for options in ({"offload": 0.5}, {"quantize": "int8"}, {"quantize": "nf4", "offload": 1.0}):
        with pytest.raises(ConfigError, match=rf"{next(iter(options))} is .*few bits \(bitsandbytes\)"):
            check(replace(there, **options))
    check(there)
    assert {(way.quantize, way.offload) for way in budget.ways(there, {})} == {(None, 0.0)}
    assert len(budget.ways(config, {})) > 2


@pytest.mark.parametrize("kind", ["gguf", "float8"])
def test_a_file_in_few_bits_stays_as_it_is(kind, config, tmp_path):
    file = tmp_path / f"model.{'gguf' if kind == 'gguf' else 'safetensors'}"
    save_file({"model.diffusion_model.x": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, file)  # no GGUF is looked into
    single = replace(config, model=str(file), base=str(EMBEDDED))
    for quantize in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=f"quantize is {quantize}, and this file holds"):
            check(replace(single, quantize=quantize))
    check(replace(single, offload=0.5))

"""What a run is saved as: every method of every family ends in a file, and each file holds what was learnt."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import ConfigError, NothingLearntError, TrainConfig, UnknownNameError, converters, io
from diffpeft.families import family_of, open_family
from diffpeft.model.state import bundle_of, slots_of
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth, save
from diffpeft.train.check import check
from diffpeft.train.data import Account
from diffpeft.train.formats import INSTEAD, WRITABLE, asked, chosen, file_of
from diffpeft.train.method import ADAPTERS
from diffpeft.train.outcome import refuse_unread
from tests.families.pipelines import pipeline
from tests.train.pictures import photos_in

FAMILIES = ("sd15", "sdxl", "flux dev")
METHODS = tuple(ADAPTERS)


def run_of(pipe, out, **options):
    """A run that has ended, with random numbers for what was learnt."""
    family = open_family(pipe)
    options = {"rank": 2, "model": "m", "data": "d", **options}
    config = TrainConfig(out=str(out), name="a", **options)
    config = dreambooth.adapt(config, family, "a")
    for slot in slots_of(pipe, "a").values():
        slot.eval()
        for p in slot.parameters():
            nn.init.normal_(p, std=0.1)
    return dreambooth.TrainRun(config, family, "a", [1.0], 0.0, Account(out, (), {}, {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_method_of_every_family_is_saved_whatever_was_asked_for(kind, method, tmp_path):
    pipe = pipeline(kind, torch.float32)
    run = run_of(pipe, tmp_path / "out", method=method, train_text_encoder=method in ("lora", "oft"))
    bundle = bundle_of(pipe, "a", family_of(pipe))
    for names in itertools.chain(itertools.combinations(WRITABLE, 1), itertools.combinations(WRITABLE, 2)):
        formats = chosen(bundle, names)
        assert formats.written and {*formats.written, *formats.refused} == {
            *names,
            *([formats.instead] * bool(formats.instead)),
        }
        assert bool(formats.instead) == (len(formats.refused) == len(names))
    run.config.formats, run.config.save_dtype = ",".join(WRITABLE), "bf16"
    files = dreambooth.save(run)  # and each is compared
    assert [file.name for file in files] == [file_of("a", f) for f in WRITABLE if f in chosen(bundle, WRITABLE).written]
    told = dreambooth.readers(run, files)
    assert len(told) == len(WRITABLE) and all(text for text in told.values())


def test_a_format_that_nobody_asked_for_is_written_where_none_of_those_can_hold_the_method(tmp_path):
    run = run_of(pipeline("flux dev", torch.float32), tmp_path, method="lokr", formats="diffusers,kohya,comfyui")
    (file,) = dreambooth.save(run)
    assert file.name == "a.kohya-diffusers.safetensors" and run.files == [file, tmp_path / "README.md"]
    told = dreambooth.readers(run, [file])
    assert told.keys() == {file.name, "no diffusers file", "no kohya file", "no comfyui file"}
    assert "ComfyUI" in told[file.name] and "neither diffusers, kohya nor comfyui can hold" in told[file.name]
    dreambooth.exported(run, tmp_path / "state", 1)
    assert [path.name for path in (tmp_path / "state").iterdir()] == [file.name]


def test_those_that_are_written_instead_are_all_that_can_be():
    assert sorted(INSTEAD) == sorted(WRITABLE)


@pytest.mark.parametrize(
    "formats, error, words",
    [
        ("komfyui", UnknownNameError, "comfyui"),
        ("kohya,difusers", UnknownNameError, "diffusers"),
        ("safeloras", ConfigError, "only read.*kohya"),
        ("kohya,", UnknownNameError, "kohya"),
        ([""], ConfigError, "empty"),
    ],
)
def test_formats_that_are_none_are_told_before_anything_is_loaded(formats, error, words, tmp_path):
    config = TrainConfig(model="/no/model", data="/no/data", out=str(tmp_path / "out"), formats=formats)
    with pytest.raises(error, match=words) as raised:
        check(config)
    assert raised.value.exit_code == 2


def test_formats_are_named_once_in_any_case():
    assert asked(TrainConfig(formats="Kohya, kohya,PEFT")) == ("kohya", "peft")
    assert asked(TrainConfig(formats=["comfyui", "kohya"])) == ("comfyui", "kohya")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_files_have_the_dtype_that_was_asked_for_and_alphas_keep_theirs(kind, dtype, tmp_path):
    run = run_of(pipeline(kind, torch.float32), tmp_path, targets="attn-mlp", save_dtype=dtype, alpha=1)
    for file in dreambooth.save(run):
        dtypes = {key: t.dtype for key, t in zip(*_tensors(file), strict=True)}
        assert {d for key, d in dtypes.items() if not key.endswith("alpha")} == {save.DTYPES[dtype]}
        assert {d for key, d in dtypes.items() if key.endswith("alpha")} <= {torch.float32}


def _tensors(path):
    handles, _ = io.header(path)
    return [*handles], io.load(handles.values())


def test_numbers_too_large_for_fp16_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    run = run_of(pipeline("sd15", torch.float32), tmp_path / "out", save_dtype="fp16", targets="to_q")
    layer, slot = next(iter(slots_of(run.family.pipe, "a").items()))
    nn.init.constant_(slot.tensors["lora_B"], 7e4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"1 layers.*--save-dtype bf16") as raised:
        dreambooth.save(run)
    assert layer in str(raised.value) and not (tmp_path / "out").exists()
    (place,) = (path for path in tmp_path.iterdir() if str(path) in raised.value.__notes__[0])
    refuse_unread(run.family.pipe, place / "a.kohya.safetensors", "a")
    dreambooth.exported(run, tmp_path / "state", 1)  # a state is kept whatever happens
    for path in (tmp_path / "state").iterdir():
        refuse_unread(run.family.pipe, path, "a")


def test_large_models_have_files_of_half_the_size(monkeypatch):
    family = open_family(pipeline("sd15", torch.float32))
    assert save.file_dtype(family) == "fp32"
    monkeypatch.setattr(save, "LARGE", sum(p.numel() for p in family.pipe.unet.parameters()) - 1)
    assert save.file_dtype(family) == "bf16"


@pytest.mark.parametrize("live", [False, True])
def test_a_peft_folder_is_a_format_too_one_for_each_component(live, tmp_path):
    pipe = pipeline("sd15", torch.float32)
    run = run_of(pipe, tmp_path, formats="peft", train_text_encoder=live)
    for _ in range(2):  # the second time over the first
        (folder,) = dreambooth.save(run)
    assert folder == tmp_path / "a.peft" and {p.name for p in folder.iterdir()} == (
        {"unet", "text_encoder"} if live else {"adapter_config.json", "adapter_model.safetensors"}
    )
    assert dreambooth.readers(run, [folder]) == {"a.peft": "read by PEFT, transformers"}
    fresh = pipeline("sd15", torch.float32)
    diffpeft.load_lora(fresh, folder)
    assert slots_of(fresh, "a.peft").keys() == slots_of(pipe, "a").keys()


DAMAGE = {
    "a number": lambda t: t.view(-1)[0].add_(1e-3),
    "all of it": lambda t: t.zero_(),
    "a thousandth": lambda t: t.mul_(1.001),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind, layer", [("sd15", "to_q"), ("flux dev", "single_transformer_blocks.1.proj_mlp")])
def test_a_file_that_holds_something_else_is_an_error_that_names_the_layers(kind, layer, damage, tmp_path, monkeypatch):
    """Also where the format has several layers as one, as kohya's has Flux's."""
    run = run_of(pipeline(kind, torch.float32), tmp_path, targets="attn-mlp", formats="kohya")
    real = converters.write

    def other(bundle, path, **options):
        slot = next(slot for name, slot in slots_of(run.family.pipe, "a").items() if name.endswith(layer))
        kept = slot.tensors["lora_B"].clone()
        with torch.no_grad():
            DAMAGE[damage](slot.tensors["lora_B"])
            real(bundle_of(run.family.pipe, "a", bundle.family), path, **options)
            slot.tensors["lora_B"].copy_(kept)

    monkeypatch.setattr(converters, "write", other)
    with pytest.raises(NothingLearntError, match=r"in 1 layers") as raised:
        dreambooth.save(run)
    assert layer in str(raised.value) and str(tmp_path) in raised.value.where


@pytest.mark.parametrize("targets", ["to_q", r"single_transformer_blocks\.0\.proj_mlp", "attn"])
def test_a_part_of_the_layers_that_a_format_has_as_one_is_no_change_of_the_others(targets, tmp_path):
    """kohya's Flux has q, k and v, and the MLP beside them, in one layer: what was not trained has zeros there."""
    for seed in range(3):
        torch.manual_seed(seed)
        run = run_of(
            pipeline("flux dev", torch.float32), tmp_path / str(seed), targets=targets, formats="kohya,comfyui"
        )
        assert [path.name for path in dreambooth.save(run)] == ["a.kohya.safetensors", "a.comfyui.safetensors"]


def test_a_base_in_bf16_hides_nothing(tmp_path):
    """What is compared is in float32, whatever the base computes in."""
    run = run_of(pipeline("sd15", torch.bfloat16), tmp_path, targets="to_q")
    for slot in slots_of(run.family.pipe, "a").values():
        slot.to(torch.float32)
    dreambooth.save(run)
    slot = next(iter(slots_of(run.family.pipe, "a").values()))
    with torch.no_grad():
        slot.tensors["lora_B"].mul_(1 + 2**-12)
    with pytest.raises(NothingLearntError):
        refuse_unread(run.family.pipe, tmp_path / "a.kohya.safetensors", "a")


def test_files_of_an_earlier_run_are_told(tmp_path):
    run = run_of(pipeline("sd15", torch.float32), tmp_path, formats="kohya", targets="to_q")
    dreambooth.save(run)
    assert not save.earlier_files(run)
    run.config.formats = "lycoris"
    dreambooth.save(run)
    assert save.earlier_files(run) == ["a.kohya.safetensors"]


@pytest.mark.slow
def test_a_finished_run_is_saved_once_more_in_another_way(tmp_path):
    """It goes on from its last state, and takes no step."""
    photos_in(tmp_path)
    options = {"targets": "to_q", "rank": 2, "steps": 1, "save_every": 1, "sample_steps": 2}
    config = TrainConfig(str(EMBEDDED), str(tmp_path / "photos"), str(tmp_path / "out"), instance_prompt="x", **options)
    exact = load_file(dreambooth.save(dreambooth.train(replace(config, formats="kohya")))[0])
    again = replace(config, resume="latest", formats="lycoris", save_dtype="bf16")
    (file,) = dreambooth.save(dreambooth.train(again))
    rounded = {key: t for key, t in load_file(file).items() if not key.endswith("alpha")}
    assert io.header(file)[1]["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")  # of the last step
    assert file.name == "out.lycoris.safetensors" and len(rounded) == len(exact) * 2 / 3
    for key, t in rounded.items():
        assert torch.equal(t, exact[key.replace("lycoris_", "lora_unet_")].bfloat16())

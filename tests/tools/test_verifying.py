"""What verify says of a file is what load_lora does with it, on the model itself; and it says all that is wrong at once."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

import diffpeft
from diffpeft import CheckpointError, DiffpeftError, verify
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.model.target import components
from diffpeft.pipeline.open import open_pipeline, weightless
from tests.converters.factory import checkpoint


def lora(target, suffixes=("to_q", "fc1"), rank=2, seed=0):
    """A LoRA on layers of a pipeline, in diffusers' names."""
    torch.manual_seed(seed)
    tensors = {}
    for component, model in components(target).items():
        for layer, module in model.named_modules():
            if layer.endswith(suffixes):
                tensors[f"{component}.{layer}.lora_A.weight"] = torch.randn(rank, module.in_features)
                tensors[f"{component}.{layer}.lora_B.weight"] = torch.randn(module.out_features, rank)
    return tensors


@pytest.fixture(scope="module")
def tensors():
    return lora(weightless())


def save(tensors, path):
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path)


def renamed(tensors, old, new):
    return {key.replace(old, new): t for key, t in tensors.items()}


def first(tensors, end, value):
    key = next(key for key in tensors if key.endswith(end))
    return {**tensors, key: value(tensors[key])}


# {case: (tensors of a file from those that fit, the kinds of problems, the kinds of notes)}
FILES = {
    "as it should be": (lambda t: t, [], []),
    "no text encoder": (lambda t: {k: v for k, v in t.items() if k.startswith("unet")}, [], []),
    "a layer of another model": (lambda t: renamed(t, "mid_block.attentions.0", "mid_block.attentions.7"), ["no such layer"], []),
    "another width": (lambda t: first(t, "attn2.to_q.lora_A.weight", lambda v: v[:, :-1]), ["other sizes"], []),
    "another height": (lambda t: first(t, "attn1.to_q.lora_B.weight", lambda v: torch.cat([v, v])), ["other sizes"], []),
    "NaN": (lambda t: first(t, "lora_A.weight", lambda v: v * float("nan")), ["not finite"], []),
    "Inf": (lambda t: first(t, "lora_B.weight", lambda v: v / 0), ["not finite"], []),
    "zeros": (lambda t: first(t, "lora_B.weight", torch.zeros_like), [], ["change nothing"]),
    "another component": (lambda t: {**t, **renamed(t, "text_encoder.", "text_encoder_3.")}, [], ["of components that the model lacks"]),
    "other keys": (lambda t: {**t, "more": torch.ones(2)}, [], ["keys that are no adapter's"]),
    "everything wrong": (
        lambda t: first(first({**renamed(t, "mid_block.attentions.0", "mid_block.attentions.7"), "more": torch.ones(2)},
                              "attn2.to_q.lora_A.weight", lambda v: v[:, :-1]), "fc1.lora_A.weight", lambda v: v / 0),
        ["no such layer", "other sizes", "not finite"], ["keys that are no adapter's"],
    ),
    "another family": (lambda t: checkpoint("kohya", "sdxl", text=False, carried=False).tensors, ["the adapter is for sdxl, this pipeline is sd15"], []),
    "a weight of the base": (lambda t: {**t, "unet.conv_in.weight": torch.ones(2)}, ["the file holds weights of the base model, not only an adapter"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_it_is_what_load_lora_says(case, tensors, tmp_path, embedded):
    change, problems, notes = FILES[case]
    save(change(tensors), tmp_path / "a.safetensors")
    seen = verify(tmp_path / "a.safetensors")
    assert {*seen.problems} == {*problems} and [*seen.notes] == notes and seen.fits == (not problems)
    assert seen.model_family == "sd15" and seen.family == ("sdxl" if "family" in case else "sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if problems:
            with pytest.raises(DiffpeftError):
                diffpeft.load_lora(embedded, tmp_path / "a.safetensors")
            return
        report = diffpeft.load_lora(embedded, tmp_path / "a.safetensors")
    assert len(report.matched) == seen.layers
    assert seen.layers == seen.of - len(seen.notes.get("of components that the model lacks", ()))


def test_numbers_may_be_left_unread(tensors, tmp_path, monkeypatch):
    save(first(tensors, "lora_A.weight", lambda v: v * float("nan")), tmp_path / "a.safetensors")
    monkeypatch.setattr("diffpeft.io.load", lambda *_: pytest.fail("a tensor was read"))
    assert verify(tmp_path / "a.safetensors", values=False).fits


def test_what_is_missing_is_near_something(tensors, tmp_path):
    save(renamed(tensors, "mid_block.attentions.0", "mid_block.attention.0"), tmp_path / "a.safetensors")
    told = verify(tmp_path / "a.safetensors").problems["no such layer"]
    assert "Did you mean 'unet.mid_block.attentions.0" in told[0] and len(told) == 2


@pytest.mark.parametrize("what", ["file", "model"])
def test_what_is_not_there_is_an_error(what, tensors, tmp_path):
    save(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"no such file|no such model"):
        verify(
            tmp_path / ("a.safetensors" if what == "model" else "b.safetensors"), "./none" if what == "model" else None
        )


def test_the_command(tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    save(tensors, tmp_path / "a.safetensors")
    save(FILES["everything wrong"][0](tensors), tmp_path / "b.safetensors")
    assert run(cli, ["verify", str(tmp_path / "a.safetensors")]) == 0
    assert "fits the embedded base" in capsys.readouterr().out
    assert run(cli, ["verify", str(tmp_path / "b.safetensors")]) == 4
    out = capsys.readouterr().out
    assert all(f"{kind}: " in out for kind in ("no such layer", "other sizes", "not finite"))
    assert run(cli, ["verify", str(tmp_path / "b.safetensors"), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux dev", "sdxl", "wan", "sd3"])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("method", ["LoraConfig", "LoKrConfig"])
def test_joint_layers_of_other_programs_are_judged_as_load_lora_does(kind, to, method, tmp_path):
    from tests.families.pipelines import pipeline

    pipe = pipeline(kind, torch.float32)
    pipe.save_pretrained(tmp_path / "m")
    diffpeft.attach(pipe, getattr(diffpeft, method)(r=2), name="x", targets=["to_q", "to_k", "to_v"])
    for _, module in pipe.components.items():
        for name, p in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            if "adapters" in name:
                torch.nn.init.normal_(p)
    try:
        diffpeft.save_lora(pipe, tmp_path / "a.safetensors", format=to, name="x")
    except diffpeft.CannotConvertError:
        pytest.skip("the format has no place for it")
    seen = verify(tmp_path / "a.safetensors", str(tmp_path / "m"))
    assert seen.fits and seen.layers == seen.of > 0, seen
    report = diffpeft.load_lora(open_pipeline(str(tmp_path / "m")), tmp_path / "a.safetensors")
    assert report.matched

"""A run is refused, or ends in an error, where its adapter could do nothing; and what was learnt is not lost."""

import errno
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import ConfigError, NothingLearntError, TrainConfig, UnknownNameError, converters
from diffpeft.families import open_family
from diffpeft.model.attach import attach
from diffpeft.model.state import slots_of
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth
from diffpeft.train.data import Account
from diffpeft.train.method import ADAPTERS, CONFIGS
from diffpeft.train.outcome import check_rank, check_room, refuse_unlearnt

WIDE, NARROW = nn.Linear(6, 9), nn.Conv2d(2, 4, 3)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(model=str(EMBEDDED), data="d", out=str(tmp_path / "out"), rank=2)


@pytest.mark.parametrize("method, limit", [("lora", 6), ("dora", 6), ("loha", 6), ("lokr", None), ("oft", None)])
def test_a_rank_above_every_layers_is_refused(method, limit, config):
    config = replace(config, method=method)
    check_rank(replace(config, rank=6), [NARROW, WIDE])
    if limit is None:  # of these a rank is something else
        check_rank(replace(config, rank=100), [NARROW, WIDE])
    else:
        with pytest.raises(ConfigError, match=r"rank is 7.* 6"):
            check_rank(replace(config, rank=7), [NARROW, WIDE])


def test_train_refuses_such_a_rank_before_it_makes_tensors(config, pipe):
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="rank is 100000"):
        dreambooth.adapt(replace(config, rank=100000), open_family(pipe), "a")
    assert not diffpeft.get_adapters(pipe) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "given, means",
    [
        ("to_q", ["to_q"]),
        ("to_q, attn2.to_v", ["to_q", "attn2.to_v"]),
        (["to_q", "conv_in"], ["to_q", "conv_in"]),
        (r".*attn1\.to_[kq]", r".*attn1\.to_[kq]"),
        ("attn", "attn"),
    ],
)
def test_targets_choose_the_layers_that_attach_chooses(given, means, config, fresh):
    ours, theirs = fresh(), fresh()
    dreambooth.adapt(replace(config, targets=given), open_family(ours), "a")
    attach(theirs.unet, diffpeft.LoraConfig(r=2), "a", targets=means)
    assert list(slots_of(ours.unet, "a")) == list(slots_of(theirs.unet, "a"))


@pytest.mark.parametrize("targets", ["to_qq", "to_q,to_qq", ["to_q", "attn1.to_qq"], r".*to_qq"])
def test_a_name_that_no_layer_has_is_answered_with_one_that_does(targets, config, pipe):
    with pytest.raises(UnknownNameError) as caught:
        dreambooth.adapt(replace(config, targets=targets), open_family(pipe), "a")
    offered = set(re.findall(r"'([\w.]+)'", caught.value.remedy))
    assert offered and not offered & {"to_qq", "attn1.to_qq"}
    if not isinstance(targets, str) or "*" not in targets:
        dreambooth.adapt(replace(config, targets=list(offered)), open_family(pipe), "a")  # what is offered works


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_that_changes_nothing_is_told_from_one_that_does(method, config, fresh, randomize):
    pipe = fresh()
    settings = CONFIGS[method](replace(config, method=method, alpha=2.0))
    attach(pipe, settings, "a", targets="attn", **ADAPTERS[method])
    if method != "dora":  # whose fresh magnitudes are norms, rounded to fp32
        with pytest.raises(NothingLearntError):
            refuse_unlearnt([pipe.unet, pipe.text_encoder], "a")
    slot = list(slots_of(pipe, "a").values())[-1]
    for p in slot.parameters():
        nn.init.normal_(p, std=1e-4)
    refuse_unlearnt([pipe.unet, pipe.text_encoder], "a")


def test_alpha_zero_changes_nothing_whatever_the_factors_are(pipe, randomize):
    attach(pipe.unet, diffpeft.LoraConfig(r=2, lora_alpha=0), "a", targets="attn")
    randomize(pipe, "a")
    with pytest.raises(NothingLearntError):
        refuse_unlearnt([pipe.unet], "a")


def test_a_change_of_biases_alone_is_a_change(pipe):
    attach(pipe.unet, diffpeft.LoraConfig(r=2, bias="lora_only"), "a", targets=["to_out.0"])
    with pytest.raises(NothingLearntError):
        refuse_unlearnt([pipe.unet], "a")
    bias = next(p for n, p in pipe.unet.named_parameters() if n.endswith("diff_b"))
    nn.init.constant_(bias, 1e-3)
    refuse_unlearnt([pipe.unet], "a")


def test_room_on_the_disk_is_asked_for_before_training(tmp_path, monkeypatch):
    parameters = [nn.Parameter(torch.zeros(1024, 256))]  # 1 MiB
    check_room(tmp_path / "new" / "out", parameters, 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 << 20})())
    check_room(tmp_path / "new" / "out", parameters, 2)
    with pytest.raises(OSError, match=r"3\.0 MiB are needed") as caught:
        check_room(tmp_path / "new" / "out", parameters, 3)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "new" / "out")


def test_an_adapter_that_cannot_be_written_is_saved_elsewhere(config, pipe, randomize, tmp_path, monkeypatch):
    dreambooth.adapt(config, open_family(pipe), "a")
    randomize(pipe, "a")
    run = dreambooth.TrainRun(config, open_family(pipe), "a", [1.0], 0.0, Account(tmp_path, (), {}, {}))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "rescue"))
    (tmp_path / "rescue").mkdir()
    real = converters.write

    def full(target, path, **options):
        if path.is_relative_to(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, path, **options)

    monkeypatch.setattr(converters, "write", full)
    with pytest.raises(OSError, match="No space") as caught:
        dreambooth.save(run)
    assert caught.value.filename == config.out
    (folder,) = (tmp_path / "rescue").iterdir()
    assert str(folder) in caught.value.__notes__[0]
    assert sorted(p.name for p in folder.iterdir()) == ["a.diffusers.safetensors", "a.kohya.safetensors"]
    assert load_file(folder / "a.kohya.safetensors")


def test_the_programs_that_read_a_file_are_told_and_a_format_that_cannot_hold_it(config, fresh, tmp_path, randomize):
    for method, missing in (("lora", set()), ("lokr", {"no diffusers file"})):
        pipe = fresh()
        dreambooth.adapt(replace(config, method=method), open_family(pipe), "a")
        randomize(pipe, "a")
        run = dreambooth.TrainRun(
            replace(config, method=method), open_family(pipe), "a", [1.0], 0.0, Account(tmp_path, (), {}, {})
        )
        files = dreambooth.save(run)
        told = dreambooth.readers(run, files)
        assert told.keys() == {f.name for f in files} | missing
        assert "ComfyUI" in told["a.kohya.safetensors"]

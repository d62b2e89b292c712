"""Where options are from, the files that a run writes of itself, and epochs."""

import json
import tomllib
from dataclasses import fields, replace

import pytest
import torch

from diffpeft import ConfigError, TrainConfig
from diffpeft.model.state import trained_parameters
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth
from diffpeft.train.check import account_of, check
from diffpeft.train.config_files import from_toml
from diffpeft.train.origins import origins_of, text_of
from tests.train.pictures import photos_in


@pytest.fixture
def photos(tmp_path):
    return photos_in(tmp_path)


def config(photos, **options):
    usual = {"model": str(EMBEDDED), "data": [f"{photos}:2"], "out": str(photos.parent / "out"), "steps": 2, "rank": 2}
    return TrainConfig(**{**usual, "instance_prompt": 'an emoji of\n"sks" \\ü', "targets": ["to_q", "to_v"], **options})


@pytest.mark.slow
def test_a_run_writes_what_it_was_and_that_file_gives_the_same_adapter(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    typed = replace(config(photos), data=["photos:2"], out="out", lr=3e-4, flip=True)
    run = dreambooth.train(typed, checked=check(typed, {"rank": "command line", "lr": "alias --learning_rate"}))
    out = photos.parent / "out"
    assert json.loads((out / "account.json").read_text()) == json.loads(json.dumps(run.account.table()))
    assert run.account.table() == account_of(replace(typed, resume=None), steps=True).table()

    origins = run.origins
    assert origins.keys() == {f.name for f in fields(TrainConfig)}
    names = ("rank", "lr", "resolution", "max_length", "alpha", "steps", "batch_size")
    assert [origins[name] for name in names] == [
        "command line",
        "alias --learning_rate",
        "model",
        "model",
        "default",
        "argument",
        "default",
    ]
    text = (out / "config.toml").read_text()
    table = tomllib.loads(text)
    assert table == {n: v for n, v in tomllib.loads(text_of(run.config, origins, "x")).items()}
    assert "alias --learning_rate" in next(line for line in text.splitlines() if line.startswith("lr ="))

    monkeypatch.chdir("/")
    again = dreambooth.train(from_toml(out / "config.toml", {"out": str(photos.parent / "other")}))
    mine, theirs = (trained_parameters(r.family.pipe, r.name) for r in (run, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert run.losses == again.losses and replace(again.config, out=None, data=None) == replace(
        run.config, out=None, data=None
    )


def test_every_option_stands_in_the_file_as_it_is(tmp_path):
    values = {"flip": True, "lr": 1e-05, "resolution": [64, 128], "trigger": 'a"b\\c\td\x7f', "sigma_range": (0.5, 1.0)}
    options = TrainConfig(model="owner/name", data="x", out=str(tmp_path), **values)
    table = tomllib.loads(text_of(options, {}, "x"))
    assert {name: table[name] for name in values} == {**values, "sigma_range": [0.5, 1.0]}
    assert table["model"] == "owner/name" and "resume" not in table and "trigger" in table
    assert set(origins_of(options, options, {}).values()) == {"argument", "default"}


@pytest.mark.parametrize(
    "options, steps",
    [({"batch_size": 4}, 4), ({"batch_size": 2, "accumulate": 2}, 4), ({}, 12), ({"batch_size": 12}, 2)],
)
def test_epochs_are_steps_for_all_pictures_rounded_up(photos, options, steps):
    checked = check(config(photos, steps=500, epochs=2, **options))  # 3 images, twice each
    assert (checked.config.steps, checked.config.epochs) == (steps, None)
    assert checked.account.steps == (steps, checked.config.batch_size * checked.config.accumulate)


def test_steps_and_epochs_exclude_each_other_and_a_warm_up_is_within_them(photos):
    with pytest.raises(ConfigError, match="steps with epochs"):
        check(config(photos, steps=3, epochs=2))
    with pytest.raises(ConfigError, match="warmup is 13"):
        check(config(photos, steps=500, epochs=2, warmup=13))
    check(config(photos, steps=500, epochs=200, warmup=700))

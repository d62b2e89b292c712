from dataclasses import fields

import pytest

from diffpeft import ConfigError, TrainConfig, UnknownNameError
from diffpeft.train.config_files import from_toml

NEEDED = {"model": "m", "data": "d", "out": "o"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": None},
        {"rank": 0},
        {"rank": 1.5},
        {"rank": True},
        {"lr": float("nan")},
        {"lr": -1.0},
        {"lr_scheduler": "cosin"},
        {"caption_dropout": 1.5},
        {"steps": 0},
        {"flip": "yes"},
        {"class_data": "c"},
        {"dtype": "int8"},
        {"method": 3},
    ],
)
def test_a_value_that_is_not_allowed_is_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**{**NEEDED, **wrong}).validate()


def test_the_defaults_are_allowed_and_every_option_has_a_help_text():
    TrainConfig(**NEEDED).validate()
    assert all(f.metadata["help"].endswith(".") for f in fields(TrainConfig))


def test_what_is_typed_wins_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('model = "m"\nrank = 4\nclass-prompt = "a dog"\n')
    config = from_toml(path, {"rank": 8})
    assert (config.model, config.rank, config.class_prompt) == ("m", 8, "a dog")


@pytest.mark.parametrize("text, error", [("rnak = 4", UnknownNameError), ("rank = ", ConfigError)])
def test_a_config_file_with_a_mistake_is_named(tmp_path, text, error):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(error, match=r"a\.toml"):
        from_toml(path, {})

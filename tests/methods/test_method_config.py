"""What configs refuse, and PEFT's rule for patterns."""

import dataclasses

import pytest
import torch

import diffpeft
from diffpeft import patterns as rules
from diffpeft.errors import ConfigError
from diffpeft.methods import LoHaConfig, LoKrConfig
from diffpeft.methods import config as checks

BOTH = [LoHaConfig, LoKrConfig]


@pytest.mark.parametrize("config", BOTH)
def test_defaults_are_valid_and_equal_to_pefts(config):
    import peft

    ours, theirs = config(), getattr(peft, config.__name__)()
    ours.validate()
    assert {name: getattr(theirs, name) for name in vars(ours)} == vars(ours)


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("r", 0, "A rank is a whole number of at least 1."),
        ("r", True, "A rank is a whole number"),
        ("r", 4.0, "A rank is a whole number"),
        ("alpha", float("nan"), "An alpha is a finite number."),
        ("alpha", "8", "An alpha is a finite number."),
        ("rank_dropout", 1.0, "at least 0 and less than 1"),
        ("module_dropout", -0.1, "at least 0 and less than 1"),
        ("init_weights", "gaussian", "It is True"),
        ("rank_pattern", {"to_q": 0}, "A rank is a whole number"),
        ("alpha_pattern", {"to_q": float("inf")}, "An alpha is a finite number."),
        ("rank_pattern", {"to_(q": 4}, "is no regular expression"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(config, field, value, allowed):
    with pytest.raises(ConfigError) as error:
        config(**{field: value}).validate()
    assert error.value.what.startswith(field) and allowed in error.value.remedy


@pytest.mark.parametrize("factor", [0, -2, 2.0, True])
def test_a_decompose_factor_is_a_whole_number_or_minus_one(factor):
    with pytest.raises(ConfigError, match=r"decompose_factor is .*It is -1 or"):
        LoKrConfig(decompose_factor=factor).validate()


def test_choices_read_as_a_sentence():
    with pytest.raises(ConfigError, match=r"It is True, False or 'lycoris'\."):
        checks.check_choice("init_weights", "no", (True, False, "lycoris"))


def test_a_pattern_matches_a_name_or_its_end_at_a_dot_and_the_first_one_wins():
    from peft.utils.other import get_pattern_key

    patterns = {"to_q": 1, "attn2.to_k": 2, "^down.*to_v": 3, r"mid.*": 4, "to_k": 5}
    for layer in (
        "to_q",
        "up.attn1.to_q",
        "x_to_q",
        "attn2.to_k",
        "a.attn2.to_k",
        "down.to_v",
        "a.down.to_v",
        "mid.b",
        "a.to_k",
        "b",
    ):
        theirs = patterns.get(get_pattern_key(patterns, layer), 0)
        assert rules.first(patterns, (layer,), 0) == theirs, layer


@pytest.mark.parametrize("name", ["LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "BOFTConfig", "IA3Config"])
def test_fields_and_defaults_are_pefts(name):
    import peft

    ours, theirs = getattr(diffpeft, name)(), getattr(peft, name)()
    assert {f.name for f in dataclasses.fields(ours)} == {f.name for f in dataclasses.fields(theirs)}
    for field in dataclasses.fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert a == b or (field.name == "runtime_config" and vars(a) == vars(b)), field.name


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (diffpeft.OFTConfig(oft_block_size=2, bias="oft_only"), {"0"}),
        (diffpeft.BOFTConfig(boft_block_size=2, bias="all"), {"0", "1"}),
        (diffpeft.OFTConfig(oft_block_size=2), set()),
    ],
)
def test_biases_train_with_rotations_too(config, names):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    diffpeft.attach(model, config, targets=["0"])
    assert {n.split(".")[0] for n, _ in model.named_parameters() if n.endswith("diff_b")} == names


@pytest.mark.parametrize("config", [diffpeft.OFTConfig(bias="lora_only"), diffpeft.BOFTConfig(bias="oft_only")])
def test_a_bias_of_another_method_is_refused(config):
    with pytest.raises(diffpeft.ConfigError, match="bias"):
        config.validate()

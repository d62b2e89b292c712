"""Fields of adapter_config.json: what may stand in one, the same for every reader."""

from __future__ import annotations

import dataclasses
import json
import math

import peft
import pytest

from diffpeft import errors
from diffpeft.converters.formats.schema import FIELDS, OF_METHOD, check_fields
from diffpeft.llm import config as configs  # noqa: F401  (registers every config class)
from diffpeft.methods.peft_config import PeftConfig

# fields of PEFT's that mean nothing here: a config's own validation speaks of them
PASSED = {
    "runtime_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
}
NEEDED = {"ADALORA": {"total_step": 10}, "OFT": {"oft_block_size": 4, "r": 0}}
HOSTILE = [10**400, -(10**400), 2**63, -1, 0.5, 1e39, -1e308, math.inf, math.nan, "a", "(" * 30_000, True, None]
HOSTILE += [[], [5, None], ["x"] * 70_000, [[0, 10**9]] * 2000, {}, {"a": []}, {"a": "b"}, {"a": -1}, {"a": math.nan}]


@pytest.mark.parametrize("method", PeftConfig.types)
def test_every_field_of_a_config_has_a_kind(method):
    names = {field.name for field in dataclasses.fields(PeftConfig.types[method])}
    assert names - PASSED <= {*FIELDS}


@pytest.mark.parametrize("method", PeftConfig.types)
def test_what_peft_and_this_package_write_is_allowed(method):
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**NEEDED.get(method, {}))
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in theirs.to_dict().items()}
    check_fields(json.loads(json.dumps(plain, default=str)), "x")
    ours = PeftConfig.types[method](**NEEDED.get(method, {}))
    check_fields(json.loads(ours.to_json()), "x")


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_holds_anything_else_is_named_with_its_value_and_what_is_allowed(name):
    refused = 0
    for value in HOSTILE:
        try:
            check_fields({"peft_type": "LORA", name: value}, "here.json")
        except errors.CheckpointError as error:
            refused += 1
            assert error.what.startswith(f"{name} is ") and error.where == "here.json"
            assert error.remedy.startswith(f"{name} is ") and len(str(error)) < 2000
    assert refused >= 8


ALLOWED = {
    "r": [1, 256],
    "lora_alpha": [0, -4, 16.5, 1e30],
    "target_modules": ["all-linear", ".*q", ["q", "v"], None],
    "layers_to_transform": [3, [0, 1], None],
    "layer_replication": [[[0, 4], [2, 5]], None],
    "init_lora_weights": [True, False, "gaussian", "pissa_niter_4"],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}, None],
    "rank_pattern": [{"q": 4}, {}, None],
    "decompose_factor": [-1, 8],
    "eps": [6e-5, 0],
}
REFUSED = {
    "r": [0, 1 << 17, 8.0, "8", None],
    "lora_alpha": [None, "16", math.nan, 10**400],
    "layer_replication": [[[0, 4, 5]], [[0]], [[0, 2]] * 257, [[0, 513]], "a"],
    "num_cayley_neumann_terms": [math.inf, 101, -1],
    "decompose_factor": [0, -2],
    "modules_to_save": [5, "classifier", [5]],
    "peft_type": [[], {}],
    "base_model_name_or_path": ["\ud800", 5],
    "peft_version": ["9" * 5000],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_usual_values_are_allowed(name):
    for value in ALLOWED[name]:
        check_fields({"peft_type": "LORA", name: value}, "x")


@pytest.mark.parametrize("name", REFUSED)
def test_values_beyond_what_means_something_are_refused(name):
    for value in REFUSED[name]:
        with pytest.raises(errors.CheckpointError, match=f"^{name} is "):
            check_fields({name: value}, "x")


def test_a_methods_own_meaning_of_a_field_counts():
    check_fields({"peft_type": "OFT", "r": 0}, "x")
    check_fields({"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True, False]}}, "x")
    with pytest.raises(errors.CheckpointError, match="rank_pattern"):
        check_fields({"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": 4}}, "x")
    assert {*OF_METHOD} <= {*PeftConfig.types}


def test_several_wrong_fields_are_told_together_and_unknown_ones_pass():
    with pytest.raises(errors.CheckpointError, match="r is 0, lora_alpha is 'a'"):
        check_fields({"r": 0, "lora_alpha": "a", "of_another_version": object}, "x")
    check_fields({"of_another_version": [1, {"a": 2}]}, "x")


@pytest.mark.parametrize("config", [None, [], 5, "a"])
def test_a_config_is_a_table(config):
    with pytest.raises(errors.CheckpointError, match="table"):
        check_fields(config, "x")

"""Configs are PEFT's: fields, their order and defaults, what becomes of their values, what is refused or warned of, and with which words."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from pathlib import Path

import peft
import pytest

import diffpeft

CLASSES = sorted(n for n in dir(diffpeft) if n.endswith("Config") and hasattr(peft, n))
NEEDED = {"AdaLoraConfig": dict(total_step=9)}
LAYERED = [n for n in CLASSES if "target_modules" in inspect.signature(getattr(peft, n)).parameters]
FILED = [
    n
    for n in CLASSES
    if hasattr(getattr(peft, n), "from_peft_type") and n not in ("PeftConfig", "PromptLearningConfig")
]


def both(name, **fields):
    return [getattr(lib, name)(**NEEDED.get(name, {}), **fields) for lib in (peft, diffpeft)]


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_their_order_and_defaults_are_pefts(name):
    theirs, ours = (inspect.signature(getattr(lib, name)).parameters for lib in (peft, diffpeft))
    assert list(ours) == list(theirs)
    assert [repr(p.default) for p in ours.values()] == [repr(p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", LAYERED)
def test_names_in_a_list_become_a_set_where_pefts_do(name, tmp_path):
    fields = dict(target_modules=["b", "a", "b"])
    if "exclude_modules" in inspect.signature(getattr(peft, name)).parameters:
        fields["exclude_modules"] = ["c", "d"]
    if "feedforward_modules" in inspect.signature(getattr(peft, name)).parameters:
        fields["feedforward_modules"] = ["a"]
    theirs, ours = both(name, **fields)
    for field in fields:
        assert getattr(ours, field) == getattr(theirs, field) and type(getattr(ours, field)) is set
    assert ours.to_dict() == theirs.to_dict()
    ours.save_pretrained(tmp_path)
    for lib in (peft, diffpeft):
        assert getattr(lib, name).from_pretrained(tmp_path).to_dict() == theirs.to_dict()
    for given in ("a|b", ("b", "a"), None):
        theirs, ours = both(name, target_modules=given)
        assert ours.target_modules == theirs.target_modules and type(ours.target_modules) is type(theirs.target_modules)


@pytest.mark.parametrize("name", FILED)
def test_copies_pickles_and_tables_are_the_config(name):
    theirs, config = both(name, task_type="CAUSAL_LM", inference_mode=True, revision="main")
    assert config.to_dict() == theirs.to_dict()
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is type(config) and other == config and other.to_dict() == config.to_dict()
    table = config.to_dict()
    next((v for v in table.values() if isinstance(v, dict)), {})["new"] = 1
    assert config.to_dict() == theirs.to_dict()  # the table is a copy
    config.r = -1
    assert config != getattr(diffpeft, name)(**NEEDED.get(name, {}))


@pytest.mark.parametrize("name", FILED)
def test_a_file_says_which_of_the_two_libraries_wrote_it_in_nothing(name, tmp_path):
    for config, folder in zip(both(name), ("theirs", "ours"), strict=True):
        config.save_pretrained(
            tmp_path / folder, auto_mapping_dict={"base_model_class": "Net", "parent_library": "nets"}
        )
    tables = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("theirs", "ours")]
    assert tables[0] == tables[1]
    assert "runtime_config" not in tables[1]
    assert diffpeft.PeftConfig.from_json_file(tmp_path / "theirs" / "adapter_config.json") == tables[0]


@pytest.mark.parametrize("lib", [peft, diffpeft], ids=lambda lib: lib.__name__)
def test_what_a_run_sets_is_in_no_file(lib, tmp_path):
    config = lib.LoraConfig()
    config.runtime_config.ephemeral_gpu_offload = True
    config.save_pretrained(tmp_path)
    assert not lib.LoraConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="runtime_config"):
        assert not lib.PeftConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload


@pytest.mark.parametrize(
    "options", [dict(revision="x"), dict(task_type="SEQ_CLS"), dict(r=9), dict(foo=1, token="t")], ids=str
)
def test_options_of_the_way_to_a_file_change_nothing_that_it_says(options, tmp_path):
    """A `revision` is of the adapter's repository; the base's stands in the file, or is not known."""
    diffpeft.LoraConfig(r=3).save_pretrained(tmp_path)
    for _ in range(2):
        theirs, ours = (lib.LoraConfig.from_pretrained(tmp_path, **options).to_dict() for lib in (peft, diffpeft))
        if "task_type" not in options:  # PEFT takes those of LoRA's own fields alone
            assert ours == theirs
        path = tmp_path / "adapter_config.json"
        table = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in table.items() if key not in ("revision", "r")}))
    assert ours["revision"] is None and ours["r"] == options.get("r", 8)


STR = dict(target_modules=".*q")
REFUSED = [
    ("LoraConfig", dict(task_type="x"), "Invalid task type: 'x'. Must be one of the following task types: SEQ_CLS, SEQ_2"),
    ("LoraConfig", dict(layers_to_transform=[0], **STR), "`layers_to_transform` cannot be used when `target_modules` is a"),
    ("LoraConfig", dict(layers_pattern="h", **STR), "`layers_pattern` cannot be used when `target_modules` is a str."),
    ("HRAConfig", dict(layers_pattern=["h"], **STR), "`layers_pattern` cannot be used when `target_modules` is a str."),
    ("LoraConfig", dict(layers_pattern="h"), "When `layers_pattern` is specified, `layers_to_transform` must also be"),
    ("VeraConfig", dict(layers_pattern="h"), "When `layers_pattern` is specified, `layers_to_transform` must also be"),
    ("LoraConfig", dict(target_parameters="a.weight"), "`target_parameters` must be a list of strings or None."),
    ("AdaLoraConfig", dict(target_parameters="a.weight"), "`target_parameters` must be a list of strings or None."),
    ("LoraConfig", dict(use_dora=True, megatron_config={"a": 1}), "DoRA does not support megatron_core"),
    ("LoraConfig", dict(lora_bias=True, use_dora=True), "The argument lora_bias=True is not supported for DoRA"),
    *(
        ("LoraConfig", dict(lora_bias=True, init_lora_weights=init), "The argument lora_bias=True is only supported with")
        for init in ("gaussian", "pissa", "olora", "orthogonal")
    ),
    ("IA3Config", dict(target_modules=["k"], feedforward_modules=["q"]), "`feedforward_modules` should be a subset of"),
    *(("OFTConfig", dict(r=r, oft_block_size=size), "oft_block_size") for r, size in ((8, 32), (0, 0))),
    *(("BOFTConfig", dict(boft_block_num=n, boft_block_size=size), "boft_block_") for n, size in ((2, 4), (0, 0))),
    ("AdaLoraConfig", dict(use_dora=True), "ADALORA does not support DoRA"),
    ("AdaLoraConfig", dict(total_step=None), "AdaLoRA does not work when `total_step` is None, supply a value > 0."),
    ("AdaLoraConfig", dict(total_step=0), "AdaLoRA does not work when `total_step` is None, supply a value > 0."),
    ("AdaLoraConfig", dict(orth_reg_weight=-0.5), "`orth_reg_weight` should be greater than or equal to 0, but the value"),
    ("AdaLoraConfig", dict(tinit=4, tfinal=5), "The supplied schedule values don't allow for a budgeting phase"),
    ("AdaLoraConfig", dict(tinit=0, tfinal=9), "The supplied schedule values don't allow for a budgeting phase"),
    ("PromptTuningConfig", dict(prompt_tuning_init="TEXT"), "When prompt_tuning_init='TEXT', tokenizer_name_or_path can't"),
    (
        "PromptTuningConfig",
        dict(prompt_tuning_init="TEXT", tokenizer_name_or_path="t"),
        "When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None",
    ),
    ("PromptTuningConfig", dict(tokenizer_kwargs={"a": 1}), "tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "words"), REFUSED, ids=str)
def test_what_pefts_config_refuses_is_refused_with_its_words(name, fields, words):
    kinds = []
    for lib in (peft, diffpeft):
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(lib, name)(**{**NEEDED.get(name, {}), **fields})
        assert words in str(caught.value)
        kinds.append(caught.type)
    assert issubclass(kinds[1], kinds[0]) and issubclass(kinds[1], diffpeft.ConfigError)


WARNED = [
    ("LoraConfig", dict(loftq_config={"loftq_bits": 4}), "`loftq_config` specified but will be ignored when"),
    ("AdaLoraConfig", dict(r=10), "Note that `r` is not used in AdaLora and will be ignored."),
    ("VeraConfig", dict(save_projection=False), "Specified to not save vera_A and vera_B"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "words"), WARNED, ids=str)
def test_what_pefts_config_warns_of_is_warned_of_with_its_words(name, fields, words):
    tables = []
    for lib in (peft, diffpeft):
        with pytest.warns(UserWarning, match=words) as said:
            tables.append(getattr(lib, name)(**NEEDED.get(name, {}), **fields).to_dict())
        assert len(said) == 1
    assert tables[0] == tables[1] and said[0].filename == __file__


@pytest.mark.parametrize("name", FILED)
@pytest.mark.parametrize("task", [*diffpeft.TaskType, None])
def test_every_task_is_taken_and_nothing_is_warned_of(name, task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, ours = both(name, task_type=task)
    assert ours.task_type == theirs.task_type and repr(ours.peft_type) == repr(theirs.peft_type)


@pytest.mark.parametrize("init", ["OLoRA", "olora", "Gaussian"])
def test_two_inits_are_known_in_any_case(init):
    diffpeft.LoraConfig(init_lora_weights=init).validate()


def test_what_is_not_built_is_a_not_implemented_error():
    for fields in (dict(bias="invalid"), dict(use_qalora=True), dict(init_lora_weights="eva")):
        with pytest.raises(NotImplementedError, match=next(iter(fields))) as caught:
            diffpeft.LoraConfig(**fields).validate()
        assert isinstance(caught.value, diffpeft.ConfigError)


def test_a_config_is_pushed_as_it_is_saved(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, **options):
            sent["private"] = private
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message=None, **options):
            files = {path.name: json.loads(path.read_text()) for path in Path(folder_path).iterdir()}
            sent.update(repo=repo_id, files=files, message=commit_message)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    config = diffpeft.LoraConfig(r=3, target_modules=["b", "a"])
    config.push_to_hub("me/adapter", commit_message="hello", private=True)
    assert sent.pop("files") == {"adapter_config.json": json.loads(config.to_json())}
    assert sent == {"repo": "me/adapter", "message": "hello", "private": True}

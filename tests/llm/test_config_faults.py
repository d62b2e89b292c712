"""Configs in folders that nobody should have written: typed errors that name the file, the field, its value and what is allowed, in bounded time."""

from __future__ import annotations

import json
import time

import peft
import pytest
import torch
from safetensors.torch import save_file

import diffpeft
from diffpeft import (
    AutoPeftModelForCausalLM,
    CheckpointError,
    ConfigError,
    DiffpeftError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    ShapeMismatchError,
    UnknownNameError,
    get_peft_model,
)
from tests.llm.models import batch, output
from tests.llm.models import model as made
from tests.test_patterns import SLOW

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes the folder of an adapter with these fields in its config."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(made(), config).save_pretrained(folder)
    own = json.loads((folder / "adapter_config.json").read_text())

    def write(without=(), **fields):
        text = json.dumps({k: v for k, v in {**own, **fields}.items() if k not in without})
        (folder / "adapter_config.json").write_text(text)
        return folder

    return write


FAULTS = {
    "target_modules": [5, [5, None], [["q_proj"]], {"q": 1}],
    "exclude_modules": [5, [None]],
    "rank_pattern": [["q"], 5, {"q": "a"}, {"q": 0}, {"q": None}],
    "alpha_pattern": [5, ["q"], {"q": "a"}, {"q": [1]}],
    "peft_type": [[], {}, 5],
    "task_type": [[], 5],
    "modules_to_save": [5, [5], {"a": 1}],
    "target_parameters": [5, [None]],
    "trainable_token_indices": ["a", [[1]], {"a": "b"}, [-1]],
    "layers_to_transform": ["a", [None], -1],
    "layers_pattern": [5, [5]],
    "layer_replication": [5, [[0]], [["a", 1]], [[0, 100_000]] * 2_000],
    "lora_alpha": ["a", None, [1], 10**400],
    "r": ["a", 0, -1, None, 1.5],
    "lora_dropout": ["a", 2, -1],
    "use_rslora": ["yes"],
    "bias": [5],
    "auto_mapping": [5, "a"],
    "inference_mode": ["a"],
    "base_model_name_or_path": [5, ["a"]],
    "ensure_weight_tying": ["a"],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in FAULTS.items() for v in values], ids=lambda v: str(v)[:30]
)
def test_a_value_that_a_field_may_not_have_is_named_with_the_file(field, value, written):
    folder = written(**{field: value})
    model = made()
    keys = list(model.state_dict())
    wrapped = get_peft_model(made(), LoraConfig(r=2, target_modules=["v_proj"]))
    ways = (
        lambda: PeftModel.from_pretrained(model, folder),
        lambda: wrapped.load_adapter(folder, "other"),
        lambda: PeftConfig.from_pretrained(folder),
        lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
    )
    for way in ways:
        began = time.perf_counter()
        with pytest.raises(CheckpointError) as caught:
            way()
        said = str(caught.value)
        assert field in said and "adapter_config.json" in said and str(folder) in said and len(said) < 2_000
        assert time.perf_counter() - began < 2
    assert list(model.state_dict()) == keys and list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(target_modules="("), ["'('", "expression"]),
        (dict(layers_pattern="(", layers_to_transform=[1], target_modules=["q_proj"]), ["'('", "expression"]),
        (dict(modules_to_save=["("]), ["modules_to_save", "'('", "expression"]),
        (dict(rank_pattern={"(": 4}), ["rank_pattern", "'('"]),
        (dict(peft_type="LORO"), ["'LORO'", "LORA"]),
        (dict(task_type="CAUSAL"), ["'CAUSAL'", "CAUSAL_LM"]),
        (dict(bias="some"), ["bias", "'some'", "'lora_only'"]),
        (dict(use_qalora=True), ["use_qalora", "True", "default"]),
        (dict(target_modules=["nowhere"]), ["'nowhere'"]),
        (dict(layer_replication=[[0, 9]]), ["layer_replication", "[0, 9]", "2"]),
        (dict(trainable_token_indices=[1_000]), ["trainable_token_indices", "1000", "95"]),
        (dict(target_parameters=["nothing"], target_modules=[]), ["target_parameters", "'nothing'"]),
    ],
    ids=str,
)
def test_what_the_model_or_the_method_has_not_is_named_with_the_file(fields, words, written):
    folder = written(**fields)
    model = made()
    keys = list(model.state_dict())
    with pytest.raises(DiffpeftError) as caught:
        PeftModel.from_pretrained(model, folder)
    assert all(word in str(caught.value) for word in (*words, str(folder))), str(caught.value)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"]
)
@pytest.mark.parametrize("pattern", [SLOW[0], SLOW[4]])
def test_no_pattern_of_a_config_runs_for_ever(field, pattern, written):
    value = {"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(
        field, pattern
    )
    more = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    folder = written(**{field: value, **more})
    began = time.perf_counter()
    for way in (
        lambda: PeftModel.from_pretrained(made(), folder),
        lambda: get_peft_model(made(), PeftConfig.from_pretrained(folder)),
    ):
        try:
            way()
        except DiffpeftError as error:
            assert "too long" in str(error) or "not found" in str(error) or "no module" in str(error), str(error)
    assert time.perf_counter() - began < 6


@pytest.mark.parametrize("cls", ["PeftConfig", "LoraConfig", "IA3Config"])
def test_a_table_that_is_no_config_is_a_type_error_as_in_peft(cls, tmp_path):
    for fields in ({"foo": 1}, {"foo": 1, "r": 4}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        for lib in (peft, diffpeft):
            with pytest.raises(TypeError, match=r"missing required keys: .'peft_type'."):
                getattr(lib, cls).from_pretrained(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    for lib in (peft, diffpeft):
        assert type(getattr(lib, cls).from_pretrained(str(tmp_path))).__name__ == cls


@pytest.mark.parametrize("name", [".", "..", "", "a/b"])
def test_names_that_are_no_folder_s_are_refused_everywhere(name, written, tmp_path):
    folder = written()
    model = get_peft_model(made(), LoraConfig(r=2, target_modules=["v_proj"]))
    for way in (
        lambda: get_peft_model(made(), LoraConfig(target_modules=["q_proj"]), adapter_name=name),
        lambda: PeftModel.from_pretrained(made(), folder, adapter_name=name),
        lambda: model.add_adapter(name, LoraConfig(target_modules=["q_proj"])),
        lambda: model.load_adapter(folder, name),
        lambda: diffpeft.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), made(), name),
        lambda: model.add_weighted_adapter(["default"], [1.0], name),
    ):
        with pytest.raises(ConfigError, match="adapter name"):
            way()


def test_sizes_of_modules_trained_whole_are_named(written, tmp_path):
    base = made()
    base.resize_token_embeddings(100, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ShapeMismatchError, match=r"\(96, 32\).*\(100, 32\).*resize_token_embeddings\(100\)") as caught:
        PeftModel.from_pretrained(made(), tmp_path)
    assert "embed_tokens" in str(caught.value) or "lm_head" in str(caught.value)
    classifier = get_peft_model(made("bert-cls"), LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    classifier.save_pretrained(tmp_path / "cls")
    tensors = diffpeft.load_peft_weights(tmp_path / "cls")
    key = "base_model.model.classifier.weight"
    save_file({**tensors, key: tensors[key][:, :5].contiguous()}, tmp_path / "cls" / "adapter_model.safetensors")
    with pytest.raises(ShapeMismatchError, match=r"\(3, 32\).*\(3, 5\)") as caught:
        PeftModel.from_pretrained(made("bert-cls"), tmp_path / "cls")
    assert "resize" not in str(caught.value)


def test_layers_to_transform_is_named_where_it_left_out_what_matched():
    for model, fields, word in (
        (made().model, dict(layers_to_transform=[1]), "layers_pattern='layers'"),
        (made(), dict(layers_to_transform=[7]), "layers_to_transform=[7]"),
        (made(), dict(layers_to_transform=[1], layers_pattern="blocks"), "layers_pattern='blocks'"),
    ):
        with pytest.raises(UnknownNameError) as caught:
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], **fields))
        said = str(caught.value)
        assert "layers_to_transform" in said and word in said and "Did you mean 'q_proj'" not in said
    fields = dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert get_peft_model(made().model, LoraConfig(**fields)).base_model.targeted_module_names == [
        "layers.1.self_attn.q_proj"
    ]


def test_a_library_that_a_config_names_is_not_imported_and_named(written, tmp_path):
    made().save_pretrained(tmp_path / "base")
    mapping = {"base_model_class": "Model", "parent_library": "nowhere.at.all"}
    fields = dict(auto_mapping=mapping, base_model_name_or_path=str(tmp_path / "base"))
    folder = written(**fields)
    want = output(PeftModel.from_pretrained(made(), written())(**batch()))
    with pytest.warns(UserWarning, match=r"nowhere\.at\.all.*not imported"):
        model = PeftModel.from_pretrained(made(), written(**fields))
    torch.testing.assert_close(output(model(**batch())), want)
    torch.testing.assert_close(output(AutoPeftModelForCausalLM.from_pretrained(folder)(**batch())), want)
    folder = written(**fields, task_type=None)
    with pytest.raises(diffpeft.UnsafeFileError, match="nowhere"):
        diffpeft.AutoPeftModel.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(output(model(**batch())), want)
    for library in ("transformers.models.nowhere", "transformers"):
        absent = {**fields, "auto_mapping": {**mapping, "parent_library": library}}
        with pytest.raises(ConfigError, match=r"auto_mapping.*'Model'"):
            diffpeft.AutoPeftModel.from_pretrained(written(**absent, task_type=None))
    folder = written(**{**fields, "auto_mapping": None}, task_type=None)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)  # its name says what PEFT asks the config for
    assert type(model) is diffpeft.PeftModelForCausalLM
    torch.testing.assert_close(output(model(**batch())), want)

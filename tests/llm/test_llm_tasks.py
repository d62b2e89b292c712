"""The classes by task are PEFT's: their names, the class of transformers that each loads, and the heads that are trained whole."""

import copy
import dataclasses
import json

import peft
import pytest
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as THEIRS

import diffpeft
from diffpeft.llm.auto import AutoPeftModel
from diffpeft.llm.peft_model import MODELS, PeftModel
from diffpeft.llm.tasks import TASKS, heads_of
from diffpeft.methods.peft_config import PeftConfig, TaskType

FIELDS = {
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "ensure_weight_tying": False,
    "bias": "none",
}  # what code reads of any config


def test_there_is_a_class_for_each_task_and_no_other():
    assert set(TASKS) == set(TaskType) == set(MODELS) == {cls.task for cls in AutoPeftModel.__subclasses__()}
    assert {task.value for task in TASKS} == set(THEIRS)


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_classes_are_pefts(task):
    ours, theirs = MODELS[task], THEIRS[task.value]
    auto = {cls.task: cls for cls in AutoPeftModel.__subclasses__()}[task]
    assert ours.__name__ == theirs.__name__ and auto.__name__ == f"Auto{ours.__name__}"
    assert getattr(peft, auto.__name__)._target_class.__name__ == TASKS[task].auto
    assert getattr(diffpeft, ours.__name__) is ours and getattr(diffpeft, auto.__name__) is auto
    assert TASKS[task].does in ours.__doc__ and TASKS[task].does in auto.__doc__


def test_heads_are_trained_whole_where_pefts_are(monkeypatch):
    for task in TASKS:
        config = MODELS[task]._with_heads(diffpeft.LoraConfig(modules_to_save=["mine", "score"]))
        assert config.modules_to_save == list(dict.fromkeys(["mine", "score", *heads_of(task)]))
    assert PeftModel._with_heads(diffpeft.LoraConfig()).modules_to_save is None and heads_of(None) == ()


def test_a_users_own_class_has_its_parents_task():
    class Mine(diffpeft.PeftModelForCausalLM):
        """One's own words."""

    assert Mine.task == TaskType.CAUSAL_LM and Mine.__doc__ == "One's own words."
    assert MODELS[TaskType.CAUSAL_LM] is diffpeft.PeftModelForCausalLM


@pytest.mark.parametrize("kind", PeftConfig.types.values(), ids=lambda kind: kind.__name__)
def test_fields_that_a_method_lacks_read_as_their_defaults_and_are_in_no_file(kind):
    config = kind(**({"total_step": 10} if kind.__name__ == "AdaLoraConfig" else {}))
    fields = {f.name for f in dataclasses.fields(kind)}
    assert {name: getattr(config, name) for name in FIELDS} == FIELDS
    assert set(config.to_dict()) == fields - {"runtime_config"} and set(json.loads(config.to_json())) <= fields
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    for name in set(FIELDS) - fields:
        with pytest.raises(TypeError):
            kind(**{name: FIELDS[name]})

"""PEFT's tasks: what a model is called that has one, transformers' class for it, and the layers that are its head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from diffpeft.methods.peft_config import TaskType


class Task(NamedTuple):
    """`does`: what a model with it does. `auto`: the Auto class of transformers. `heads`: what its last layer may be called, where it is trained whole.
    `pipeline`: the Hub's name for it, where that is certain."""

    does: str
    auto: str
    heads: tuple[str, ...] = ()
    pipeline: str | None = None


_CLASSIFIERS = ("classifier", "score")
TASKS = {
    TaskType.CAUSAL_LM: Task("continues text", "AutoModelForCausalLM", pipeline="text-generation"),
    TaskType.SEQ_2_SEQ_LM: Task("turns a text into another", "AutoModelForSeq2SeqLM"),
    TaskType.SEQ_CLS: Task("classifies texts", "AutoModelForSequenceClassification", _CLASSIFIERS),
    TaskType.TOKEN_CLS: Task("classifies tokens", "AutoModelForTokenClassification", _CLASSIFIERS),
    TaskType.QUESTION_ANS: Task("finds an answer in a text", "AutoModelForQuestionAnswering", ("qa_outputs",)),
    TaskType.FEATURE_EXTRACTION: Task("gives hidden states", "AutoModel"),
}


def heads_of(task: TaskType | None) -> tuple[str, ...]:
    """What the last layer of a task's model may be called; empty for tasks whose head is not trained whole."""
    return TASKS[task].heads if task in TASKS else ()


def tags_of(model: object, method: str, base: str | None) -> frozenset[str]:
    """The tags of an adapter of a method on a model, which may have some itself."""
    from transformers import PreTrainedModel

    inherited: Iterable[str] = getattr(model, "model_tags", None) or ()
    derived = {
        "transformers": isinstance(model, PreTrainedModel),
        "lora": method == "LORA",
        f"base_model:adapter:{base}": base,
    }
    return frozenset({*inherited, *(tag for tag, holds in derived.items() if holds)})

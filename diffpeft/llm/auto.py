"""AutoPeftModel: the base model and the adapter from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from diffpeft.errors import ConfigError, UnsafeFileError, shown
from diffpeft.llm.peft_model import MODELS, PeftModel, foreign, mapping_of
from diffpeft.llm.tasks import TASKS
from diffpeft.methods.peft_config import PeftConfig, TaskType


class AutoPeftModel:
    """`from_pretrained(folder or Hub id)`: a PeftModel of the class that the config says, around the base model that it names."""

    task: ClassVar[TaskType | None] = None

    def __init_subclass__(cls, *, task: TaskType | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            cls.task, cls.__doc__ = task, f"For a model that {TASKS[task].does}."

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load both. `kwargs` are the base model's (`dtype`, `device_map`, `quantization_config`, ...).

        Raises CheckpointError and its kin or ConfigError.
        """
        where = pretrained_model_name_or_path
        known: PeftConfig = config or PeftConfig.from_pretrained(where, revision=revision)
        if known.base_model_name_or_path is None:
            raise ConfigError(
                "the adapter's config names no base model",
                where=os.fspath(where),
                remedy="Load the base yourself and use PeftModel.from_pretrained(base, folder).",
            )
        if cls.task is not None and known.task_type not in (None, cls.task):
            raise ConfigError(
                f"Expected target PEFT class: {MODELS[cls.task].__name__}, but the adapter's task type is {shown(known.task_type)}",
                remedy=f"Use {_auto_of(TaskType(known.task_type))}.",
            )
        options = {name: kwargs.pop(name) for name in ("autocast_adapter_dtype",) if name in kwargs}
        base = cls._base_class(known).from_pretrained(known.base_model_name_or_path, revision=known.revision, **kwargs)
        _fit_vocabulary(base, where)
        wrapper = MODELS.get(cls.task, PeftModel)
        # the config is read again with the weights: somebody may have saved in between
        return wrapper.from_pretrained(base, where, adapter_name, is_trainable, config, revision=revision, **options)

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        """The class of transformers that a config's base model is loaded with. Raises ConfigError or UnsafeFileError."""
        import transformers

        if config.task_type is not None:
            return getattr(transformers, TASKS[TaskType(config.task_type)].auto)
        library, name = mapping_of(config)
        if cls.task is not None and (not name or foreign(library)):
            return getattr(transformers, TASKS[cls.task].auto)
        if not name:
            raise ConfigError(
                "the adapter's config has neither a task_type nor an auto_mapping",
                remedy="Load the base yourself and use PeftModel.from_pretrained(base, folder).",
            )
        if foreign(library):
            raise UnsafeFileError(
                f"the config wants code of {shown(library)} to be imported",
                remedy="Load the base yourself and use PeftModel.from_pretrained(base, folder).",
            )
        try:
            return getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"auto_mapping names {shown(name)} of {shown(library)}, which is not there ({error})",
                remedy="Load the base yourself and use PeftModel.from_pretrained(base, folder).",
            ) from error


class AutoPeftModelForCausalLM(AutoPeftModel, task=TaskType.CAUSAL_LM): ...


class AutoPeftModelForSeq2SeqLM(AutoPeftModel, task=TaskType.SEQ_2_SEQ_LM): ...


class AutoPeftModelForSequenceClassification(AutoPeftModel, task=TaskType.SEQ_CLS): ...


class AutoPeftModelForTokenClassification(AutoPeftModel, task=TaskType.TOKEN_CLS): ...


class AutoPeftModelForQuestionAnswering(AutoPeftModel, task=TaskType.QUESTION_ANS): ...


class AutoPeftModelForFeatureExtraction(AutoPeftModel, task=TaskType.FEATURE_EXTRACTION): ...


_AUTOS = {cls.task: cls for cls in AutoPeftModel.__subclasses__()}


def _auto_of(task: TaskType) -> str:
    return _AUTOS[task].__name__ if task in _AUTOS else "AutoPeftModel"


def _fit_vocabulary(base: Any, folder: str | os.PathLike[str]) -> None:
    """Make room for the tokens of a tokenizer that was saved beside the adapter."""
    if not (Path(folder) / "tokenizer_config.json").is_file() or not hasattr(base, "resize_token_embeddings"):
        return
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(folder))
    if size > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(size)

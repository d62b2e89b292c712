"""AutoPeftModel: the base model and the adapter from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffpeft.errors import ConfigError, UnsafeFileError, shown
from diffpeft.llm.peft_model import LIBRARIES, MODELS, PeftModel, foreign, mapping_of
from diffpeft.llm.tasks import TASKS
from diffpeft.methods.peft_config import PeftConfig, TaskType

_HUB = ("token", "use_auth_token", "cache_dir", "local_files_only", "force_download")  # for base and adapter
_ADAPTERS = ("autocast_adapter_dtype", "key_mapping", "torch_device", "ephemeral_gpu_offload")
_TOKENIZER = "tokenizer_config.json"
_LOAD_THE_BASE = "Load the base yourself and use PeftModel.from_pretrained(base, folder)."


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
        import_allowlist: Sequence[str] = LIBRARIES,
        **kwargs: Any,
    ) -> PeftModel:
        """Load both, and give the base the rows that a tokenizer beside the adapter needs.

        Args:
            revision: of the adapter's repository; the base's stands in the config.
            import_allowlist: the libraries of which a config without a task type may name the base's class.
            kwargs: the base model's (`dtype`, `device_map`, `quantization_config`, ...); `token`, `cache_dir` and the like are for the adapter too,
                `subfolder`, `autocast_adapter_dtype`, `key_mapping` and `torch_device` for it alone.

        Raises CheckpointError and its kin or ConfigError.
        """
        where = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in _HUB if name in kwargs} | {"revision": revision}
        options = {name: kwargs.pop(name) for name in _ADAPTERS if name in kwargs}
        place = {**hub, "subfolder": kwargs.pop("subfolder", None)}
        known: PeftConfig = config or PeftConfig.from_pretrained(where, **place)
        if known.base_model_name_or_path is None:
            raise ConfigError("the adapter's config names no base model", where=os.fspath(where), remedy=_LOAD_THE_BASE)
        if cls.task is not None and known.task_type not in (None, cls.task):
            raise ConfigError(
                f"Expected target PEFT class: {MODELS[cls.task].__name__}, but the adapter's task type is {shown(known.task_type)}",
                remedy=f"Use {_auto_of(TaskType(known.task_type))}.",
            )
        base_class = cls._base_class(known, import_allowlist)
        base = base_class.from_pretrained(known.base_model_name_or_path, revision=known.revision, **kwargs)
        _fit_vocabulary(base, where, place, bool(kwargs.get("trust_remote_code", False)))
        wrapper = MODELS.get(cls.task, PeftModel)
        # the config is read again with the weights: somebody may have saved in between
        return wrapper.from_pretrained(base, where, adapter_name, is_trainable, config, **options, **place)

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: Sequence[str]) -> Any:
        """The class of transformers that a config's base model is loaded with. Raises ConfigError or UnsafeFileError."""
        import transformers

        if config.task_type is not None:
            return getattr(transformers, TASKS[TaskType(config.task_type)].auto)
        library, name = mapping_of(config)
        if cls.task is not None and (not name or foreign(library, allowed)):
            return getattr(transformers, TASKS[cls.task].auto)
        if not name:
            raise ConfigError(
                "Cannot infer the auto class from the config: it has neither a task_type nor an auto_mapping",
                remedy=_LOAD_THE_BASE,
            )
        if foreign(library, allowed):
            raise UnsafeFileError(
                f"The auto mapping wants to import {shown(library)} which is not in the import allowlist",
                remedy=f"If that is safe, give import_allowlist=[{shown(library)}]. {_LOAD_THE_BASE}",
            )
        try:
            return getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"auto_mapping names {shown(name)} of {shown(library)}, which is not there ({error})",
                remedy=_LOAD_THE_BASE,
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


def _fit_vocabulary(
    base: Any, folder: str | os.PathLike[str], place: Mapping[str, str | None], trust_remote_code: bool
) -> None:
    """Make room for the tokens of a tokenizer that was saved beside the adapter; rows that a model has beyond them stay."""
    if not hasattr(base, "get_input_embeddings") or not _has_tokenizer(folder, place):
        return
    from transformers import AutoTokenizer

    options = {name: value for name, value in place.items() if value is not None}
    size = len(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options))
    if size > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(size)


def _has_tokenizer(folder: str | os.PathLike[str], place: Mapping[str, str | None]) -> bool:
    """Whether there is a tokenizer in an adapter's folder or repository."""
    if Path(folder).exists():
        return Path(folder, place["subfolder"] or "", _TOKENIZER).is_file()
    try:
        return PeftConfig.fetch is not None and bool(PeftConfig.fetch(os.fspath(folder), _TOKENIZER, **place))
    except Exception:  # there is none, or no network
        return False

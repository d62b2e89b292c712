"""PeftModel: PEFT's model class around the same adapters, for code that was written for PEFT.

Where peft is loaded too, these pass for its classes (`isinstance`), because transformers, accelerate and TRL ask that way.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from converters.formats.peft import FILE, PREFIX, WEIGHTS
from diffpeft import io, patterns
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, inside, shown
from diffpeft.llm import renames, state
from diffpeft.llm.prompt_tuner import PromptTuner
from diffpeft.llm.state import Incompatible
from diffpeft.llm.status import Counted
from diffpeft.llm.status import get_layer_status as get_layer_status
from diffpeft.llm.status import get_model_status as get_model_status
from diffpeft.llm.tasks import TASKS, heads_of
from diffpeft.llm.tuner import LoadOptions, Tuner, inject, known
from diffpeft.llm.tuners import TUNERS
from diffpeft.methods.peft_config import Config, Passing, PeftConfig, TaskType
from diffpeft.model.attach import mixes_of
from diffpeft.model.mix import check_name
from diffpeft.model.plan import Plan, planned
from diffpeft.model.precision import Precision

_README = "README.md"
_CARD = """---
base_model: {base}
library_name: peft
tags:
- diffpeft
- {method}
---

# An adapter for {base}

Load it with `PeftModel.from_pretrained(base_model, "this folder")` of diffpeft or PEFT {version}.
"""


class PeftModel(Passing, Counted, nn.Module):
    """A model with adapters, under PEFT's names. `base_model.model` is the user's model.

    Args:
        model: it is adapted in place; layers keep their classes and names.
        peft_config: of the first adapter.
        adapter_name: its name.
    """

    task: ClassVar[TaskType | None] = None

    def __init_subclass__(cls, *, task: TaskType | None = None) -> None:
        super().__init_subclass__()
        if task is not None:
            head = "; the head is trained whole" if heads_of(task) else ""
            cls.task, cls.__doc__ = task, f"A PeftModel that {TASKS[task].does}{head}."

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        check_name(adapter_name)
        self._adopt(model, peft_config)
        precision = Precision(autocast_adapter_dtype, low_cpu_mem_usage, low_cpu_mem_usage)
        with planned({"": self.get_base_model()}) as plan:
            config = self._with_heads(peft_config)
            self.tuner.plan_injected(plan, adapter_name, config, active=True, precision=precision)
            self._plan_checkpoint(plan)

    def _adopt(self, model: nn.Module, config: PeftConfig) -> None:
        """Stand around a model: with a Tuner between for adapters on layers, beside it for prompts, as in PEFT."""
        self.__dict__["_prompts"] = None
        if not config.is_prompt_learning:
            self.base_model: Any = TUNERS.get(str(config.peft_type), Tuner)(model, {})
        else:
            prompts = PromptTuner(model, config.task_type)
            self.__dict__["_prompts"] = prompts  # past nn.Module: its parts are this module's
            self.base_model = model
            self.prompt_encoder, self.word_embeddings = prompts.prompt_encoder, prompts.word_embeddings

    def _plan_checkpoint(self, plan: Plan) -> None:
        """Where activations are computed again, plan to let a frozen embedding's output ask for gradients."""
        base: Any = self.get_base_model()
        if getattr(base, "is_activation_checkpointing", False) and hasattr(base, "enable_input_require_grads"):
            with plan.recorded(base):
                base.enable_input_require_grads()

    @property
    def tuner(self) -> Tuner | PromptTuner:
        """What has the adapters: a Tuner, or a PromptTuner."""
        return self.__dict__["_prompts"] or self.base_model

    @classmethod
    def _with_heads(cls, config: Config) -> Config:
        """The config of an adapter that trains the head of a classifier whole."""
        if heads := heads_of(cls.task):
            config.modules_to_save = list(dict.fromkeys((*(config.modules_to_save or ()), *heads)))
        return config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # -- adapters ------------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, Any]:
        """{adapter: its config}."""
        return self.tuner.peft_config

    @property
    def peft_type(self) -> str | None:
        """The method of the active adapter."""
        return self.active_peft_config.peft_type

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in order."""
        return self.tuner.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if there are several."""
        return self.tuner.active_adapter

    @property
    def active_peft_config(self) -> Any:
        """The first active adapter's config."""
        return self.peft_config[(self.active_adapters or list(self.peft_config))[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that adapters train whole."""
        return {n for c in self.peft_config.values() for n in c.modules_to_save or ()} or None

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters on it."""
        return self.tuner.inner

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: object = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        **_: object,
    ) -> None:
        """Add a fresh adapter, inactive. Without a config: one like the active adapter's. The other options as in `get_peft_model`."""
        config = PeftConfig.of(self.active_peft_config if peft_config is None else peft_config)
        if adapter_name in self.peft_config:
            raise AdapterStateError(
                f"Adapter with name {adapter_name!r} already exists.", remedy="Choose another name."
            )
        if config.is_prompt_learning != (self.__dict__["_prompts"] is not None):
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}.",
                remedy="Prompts and adapters on layers need a PeftModel each.",
            )
        precision = Precision(autocast_adapter_dtype, low_cpu_mem_usage)
        config = self._with_heads(copy.deepcopy(config))
        with planned({"": self.get_base_model()}) as plan:
            self.tuner.plan_injected(plan, adapter_name, config, active=False, precision=precision)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active (or several, in this order) and the only one that is trained."""
        self.tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained, active or not."""
        self.tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first that is left becomes so, with a warning."""
        self.tuner.delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """The user's model without any adapter, as it was."""
        return self.tuner.unload()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, in this thread inside this block."""
        with self.tuner.disabled():
            yield

    # -- use -----------------------------------------------------------------------------------------------------------

    def forward(self, *args: object, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's. `adapter_names` has an adapter's name, or `__base__`, for each row of the batch."""
        kwargs.pop("alora_offsets", None)
        with nullcontext() if adapter_names is None else self._mixed_batch(adapter_names, args, kwargs):
            return self.tuner.call(args, kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's. `adapter_names` as in forward, one a prompt."""
        base: Any = self.get_base_model()
        kwargs.pop("alora_offsets", None)
        if adapter_names is None:
            return self.tuner.generated(args, kwargs)
        options = kwargs.get("generation_config") or base.generation_config
        beams, several = (
            kwargs.get(k) or getattr(options, k, None) or 1 for k in ("num_beams", "num_return_sequences")
        )
        with self._mixed_batch(adapter_names, args, kwargs, max(beams, several)):
            return self.tuner.generated(args, kwargs)

    def _mixed_batch(
        self, names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object], copies: int = 1
    ) -> AbstractContextManager[None]:
        """A block in which row i of the batch has the adapter `names[i // copies]`. Raises ConfigError for a batch of another size."""
        batch = next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), len(names))
        if batch != len(names):
            raise ConfigError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {batch} respectively.",
                remedy="Give one name a row.",
            )
        return self.tuner.rows(names, copies)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `adapter_model.safetensors`, `adapter_config.json` and a README.md for each adapter; those not called default into folders of their names.

        Inits that took a part of the weight (PiSSA, OLoRA) are always written as a LoRA for the untouched base. `state_dict` has tensors that were
        gathered from shards.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"Provided path ({folder}) should be a directory, not a file")
        if not safe_serialization:
            raise ConfigError("safe_serialization is False", remedy="Adapters are written as .safetensors only.")
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        for name in names:
            if name not in self.peft_config:
                raise UnknownNameError.of("adapter", name, self.peft_config)
            if name in (WEIGHTS, FILE, _README) or name.startswith(".diffpeft-"):
                raise ConfigError(f"adapter {name!r} has a file's name", remedy="Save it under another name.")
        files = {
            name: get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            for name in names
        }
        if not is_main_process:
            return
        with io.folder(folder) as staged:
            for name, tensors in files.items():
                state.write(staged if name == "default" else staged / name, tensors, self._config_to_save(name))
            if not os.path.lexists(folder / _README):
                with io.replacing(staged / _README) as f:
                    f.write(self._card().encode())

    def _card(self) -> str:
        """The text of the README.md that is written beside an adapter."""
        config = self.active_peft_config
        return _CARD.format(
            base=config.base_model_name_or_path or self._name() or "a model",
            method=str(config.peft_type).lower(),
            version=config.peft_version,
        )

    def _config_to_save(self, name: str) -> PeftConfig:
        """An adapter's config as its file has it: for inference, with the names of the base model and of its class."""
        config = state.saved(self.peft_config[name])
        config.base_model_name_or_path = config.base_model_name_or_path or self._name()
        config.inference_mode = True
        if config.task_type is None and config.auto_mapping is None:
            base = _plain_class(self.get_base_model())
            config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return config

    def _name(self) -> str | None:
        return self.get_base_model().__dict__.get("name_or_path") or None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a repository on the Hub, which is made. `private`, `token`, `revision`, `commit_message` are the Hub's; the rest is save_pretrained's."""
        from huggingface_hub import HfApi

        options = {k: kwargs.pop(k) for k in ("commit_message", "revision", "create_pr") if k in kwargs}
        api = HfApi(token=kwargs.pop("token", None))
        repo = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return api.upload_folder(repo_id=repo, folder_path=folder, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A model with the adapter in a folder or a repository on the Hub, of the class that its task type says.

        Args:
            autocast_adapter_dtype: keep the adapter in float32 where the base has fewer bits; else it has the base's dtype.
            low_cpu_mem_usage: changes nothing: tensors go straight from the file to their place.
            key_mapping: {expression: replacement} for the file's keys beyond `base_model.model.`, the first that is found in a key; by default the
                model's `_checkpoint_conversion_mapping`, if it has one.

        Raises CheckpointError and its kin, ConfigError or AdapterStateError, in which case the model has not changed.
        """
        check_name(adapter_name)
        config, folder = (
            state.adapter_at(model_id, **kwargs) if config is None else (config, state.located(model_id, **kwargs))
        )
        _warn_foreign(config, model, folder.where)
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = config.base_model_name_or_path or model.__dict__.get("name_or_path") or None
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        how = LoadOptions(is_trainable, True, Precision(autocast_adapter_dtype), key_mapping)
        wrapper = cls._around(model, config)
        with inside(folder.where), planned({"": model}) as plan:
            wrapper.tuner.plan_loaded(plan, adapter_name, wrapper._with_heads(config), folder, how)
            wrapper._plan_checkpoint(plan)
            if not is_trainable:
                plan.evaluate(wrapper)
        return wrapper

    @classmethod
    def _around(cls, model: nn.Module, config: PeftConfig) -> PeftModel:
        """A PeftModel without adapters, of the class that the config's task says, or of this one if it is of that kind."""
        task_class = MODELS.get(config.task_type, cls)
        made = cls if issubclass(cls, task_class) else task_class
        wrapper = made.__new__(made)
        nn.Module.__init__(wrapper)
        wrapper._adopt(model, config)
        return wrapper

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Incompatible:
        """Add an adapter from a folder or the Hub, inactive; or put its tensors into the one that has this name already. Options as in `from_pretrained`."""
        how = LoadOptions(is_trainable, False, Precision(autocast_adapter_dtype), key_mapping)
        if adapter_name in self.peft_config:
            tensors = load_peft_weights(model_id, key_mapping=key_mapping, **kwargs)
            with planned({"": self.get_base_model()}) as plan:
                result = self.tuner.plan_overwritten(plan, adapter_name, tensors)
                if not is_trainable:
                    plan.evaluate(self)
            return result
        config, folder = state.adapter_at(model_id, **kwargs)
        _warn_foreign(config, self.get_base_model(), folder.where)
        config.inference_mode = not is_trainable
        with inside(folder.where), planned({"": self.get_base_model()}) as plan:
            missing = self.tuner.plan_loaded(plan, adapter_name, self._with_heads(config), folder, how)
            if not is_trainable:
                plan.evaluate(self)
        return Incompatible(missing, [], [])


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM): ...


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM): ...


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS): ...


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS): ...


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS): ...


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION): ...


_LIBRARIES = ("transformers", "diffusers")  # a config names a class; only of these will one be imported


def mapping_of(config: PeftConfig) -> tuple[str, str]:
    """The library and the class that a config's `auto_mapping` names; empty where it names none."""
    mapping = config.auto_mapping or {}
    return str(mapping.get("parent_library") or ""), str(mapping.get("base_model_class") or "")


def foreign(library: str) -> bool:
    """Whether a library that a config names is not to be imported."""
    return library.partition(".")[0] not in _LIBRARIES


def _warn_foreign(config: PeftConfig, model: nn.Module, where: str) -> None:
    """Say which library a config names that is neither known nor the model's own. It is not imported."""
    library, _ = mapping_of(config)
    if library and foreign(library) and library != _plain_class(model).__module__:
        warnings.warn(
            f"{where}: auto_mapping names {shown(library)}, which is unknown here and is not imported", stacklevel=4
        )


MODELS: dict[str | None, type[PeftModel]] = {cls.task: cls for cls in PeftModel.__subclasses__()}


def _plain_class(model: nn.Module) -> type:
    """The class that a model had before anything of ours."""
    return next(c for c in type(model).__mro__ if not any(k.startswith("_diffpeft") for k in vars(c)))


def get_peft_model(
    model: nn.Module,
    peft_config: object,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a fresh, trainable adapter, wrapped as its config's task type says. The base is frozen.

    Args:
        autocast_adapter_dtype: keep the adapter in float32 where the base has fewer bits; else it has the base's dtype.
        low_cpu_mem_usage: make its tensors on the meta device, until they are loaded.

    Raises ConfigError, UnknownNameError or AdapterStateError (ValueErrors where PEFT's are), in which case nothing has changed.
    """
    config = PeftConfig.of(peft_config)
    old, new = config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    if old is not None and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from {old!r} to {new!r}. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    config.base_model_name_or_path = new
    config.revision = revision or config.revision
    if isinstance(model, PeftModel):
        raise AdapterStateError("the model is a PeftModel already", remedy="Call its add_adapter, or unload() first.")
    if mixes_of({"": model}):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a different config, "
            "make sure to call `.unload()` before.",
            stacklevel=2,
        )
    return MODELS.get(config.task_type, PeftModel)(
        model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
    )


def inject_adapter_in_model(
    peft_config: object,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put a fresh, trainable adapter on a model, without a wrapper, and freeze the base; the model. With `state_dict`, on the layers that its keys name.

    The adapter has the base's dtype. `low_cpu_mem_usage`: its tensors are on the meta device until `set_peft_model_state_dict` brings them.
    """
    config = PeftConfig.of(peft_config)
    if state_dict is not None:
        config = state.targeting(config, state_dict)
    inject(model, config, adapter_name, active=True, precision=Precision(False, low_cpu_mem_usage))
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """{key: tensor} of one adapter as its file has it: of a PeftModel with `base_model.model.`, of a bare module without."""
    model = getattr(model, "_orig_mod", model)
    gathered = None if state_dict is None else {k.removeprefix(PREFIX): t for k, t in state_dict.items()}
    if isinstance(model, PeftModel):
        known([adapter_name], model.peft_config)
        return model.tuner.tensors(adapter_name, gathered, save_embedding_layers)
    config = state.config_of(model, adapter_name)
    return state.spelt(model, adapter_name, config, gathered=gathered, embeddings=save_embedding_layers)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Incompatible:
    """Put tensors with PEFT's keys into an adapter that is there: all or nothing. -> missing_keys, unexpected_keys, mismatched_keys."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        known([adapter_name], model.peft_config)
        with planned({"": model.get_base_model()}) as plan:
            return model.tuner.plan_overwritten(plan, adapter_name, peft_model_state_dict)
    return state.overwrite(model, adapter_name, state.config_of(model, adapter_name), peft_model_state_dict)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **kwargs: object,
) -> dict[str, Tensor]:
    """{key: tensor} of an adapter's folder or repository on the Hub, on `device`. Raises CheckpointError and its kin.

    `key_mapping` {expression: replacement} renames keys beyond their `base_model.model.`: the first that is found in a key.
    """
    with patterns.limited(ConfigError, "key_mapping"):
        tensors = renames.mapped(state.tensors_in(state.located(model_id, **kwargs)), key_mapping)
    return tensors if device is None else {key: tensor.to(device) for key, tensor in tensors.items()}

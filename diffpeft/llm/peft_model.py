"""PeftModel: PEFT's model class around the same adapters, for code that was written for PEFT.

Where peft is loaded too, these pass for its classes (`isinstance`), because transformers, accelerate and TRL ask that way.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from diffpeft import io, patterns
from diffpeft.converters.formats.peft import FILE, PREFIX, WEIGHTS
from diffpeft.errors import (
    AdapterStateError,
    AdapterStateWarning,
    ConfigError,
    ConfigWarning,
    UnknownNameError,
    WrongKindError,
    inside,
    shown,
)
from diffpeft.llm import renames, state
from diffpeft.llm.beams import encoder_inside
from diffpeft.llm.checkpointing import is_in_bits, plan_input_grads, require_input_grads
from diffpeft.llm.distributed import gathered, in_units, unwrapped
from diffpeft.llm.injection import targeting
from diffpeft.llm.mismatched import Mismatch, fitting
from diffpeft.llm.prompt import EMBEDDINGS
from diffpeft.llm.prompt_tuner import PromptTuner
from diffpeft.llm.prompts import POSITIONAL, Arguments, Prepare
from diffpeft.llm.state import Incompatible
from diffpeft.llm.status import Counted
from diffpeft.llm.status import get_layer_status as get_layer_status
from diffpeft.llm.status import get_model_status as get_model_status
from diffpeft.llm.tasks import TASKS, heads_of, tags_of
from diffpeft.llm.tuner import LoadOptions, Tuner, found_configs, inject, known, named
from diffpeft.llm.tuners import TUNERS, MixedModel
from diffpeft.methods.peft_config import Config, Passing, PeftConfig, TaskType
from diffpeft.model.activation import plan_trained
from diffpeft.model.attach import mixes_of, plan_removed
from diffpeft.model.mix import check_name
from diffpeft.model.plan import Plan, planned
from diffpeft.model.precision import Precision
from diffpeft.model.target import check_single
from diffpeft.pipeline.adapters import plan_mix
from diffpeft.train.cards import CardFacts, completed
from diffpeft.train.hub import pushed
from diffpeft.train.outputs import README

if TYPE_CHECKING:
    from transformers import Cache, EncoderDecoderCache


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
        check_single(model, type(self).__name__)
        check_name(adapter_name)
        self._adopt(model, peft_config)
        precision = Precision(autocast_adapter_dtype, low_cpu_mem_usage, low_cpu_mem_usage)
        with planned({"": self.get_base_model()}) as plan:
            with self._alone(plan, adapter_name):
                self._plan_injected(plan, adapter_name, peft_config, active=True, precision=precision)
            plan_input_grads(plan, self.get_base_model())

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

    @property
    def tuner(self) -> Tuner | PromptTuner:
        """What has the adapters: a Tuner, or a PromptTuner."""
        return self.__dict__["_prompts"] or self.base_model

    @contextmanager
    def _alone(self, plan: Plan, name: str) -> Iterator[None]:
        """For planning on: a model that has adapters without any of this name, and without an active one."""
        base = self.get_base_model()
        others = [other for mix in mixes_of({"": base}).values() for other in mix.adapters]
        if not others:
            yield
            return
        if name in others:
            plan_removed(plan, {"": base}, {name})
        if isinstance(self.tuner, Tuner):
            for other, config in found_configs(base).items():
                plan.entry(self.tuner.peft_config, other, config)
        plan_mix(plan, base, {"": base}, {})
        plan_trained(plan, base, dict.fromkeys(others, False))
        with plan.tentative():
            yield

    def _plan_injected(self, plan: Plan, name: str, config: PeftConfig, *, active: bool, precision: Precision) -> None:
        """Plan to add a fresh adapter. Its config stays the object that it is: what the model settles is put into it."""
        settled = config if config.is_prompt_learning else copy.copy(config)
        self.tuner.plan_injected(plan, name, self._with_heads(settled), active=active, precision=precision)
        self._plan_kept(plan, name, config)

    def _plan_kept(self, plan: Plan, name: str, config: PeftConfig) -> None:
        """Plan that the config of an adapter which has been planned is this object."""
        configs = self.tuner.peft_config
        settled = plan.entries[id(configs), name]
        plan.set(config, **{f: value for f, value in vars(settled).items() if vars(config).get(f) is not value})
        plan.entry(configs, name, config)

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
    def has_active_enabled_adapter(self) -> bool:
        """False inside `disable_adapter`, in this thread, and after the adapters were switched off; True also where there is none to switch off."""
        return self.tuner.enabled or not (self.__dict__["_prompts"] or self.active_adapters)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The user's model's dtype, if it says one."""
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that adapters train whole."""
        return {n for c in self.peft_config.values() for n in c.modules_to_save or ()} or None

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters on it."""
        return self.tuner.inner

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let what the frozen embedding of a model gives ask for gradients, unless its weights are quantised; the model."""
        if not is_in_bits(model):
            require_input_grads(model)
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes an adapter (of another name than `adapter_name` if there is none of that): one that adds to linear layers."""
        return self.tuner.supports_lora_conversion(adapter_name)

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
        self._check_kind(config)
        precision = Precision(autocast_adapter_dtype, low_cpu_mem_usage)
        if peft_config is None:
            config = copy.deepcopy(config)
        with planned({"": self.get_base_model()}) as plan:
            self._plan_injected(plan, adapter_name, config, active=False, precision=precision)

    def _check_kind(self, config: PeftConfig) -> None:
        """Raise ConfigError for a config of prompts where adapters are on layers, and the other way round."""
        if config.is_prompt_learning != (self.__dict__["_prompts"] is not None):
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}.",
                remedy="Prompts and adapters on layers need a PeftModel each.",
            )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active (or several, in this order) and the only one that is trained."""
        self.tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained, active or not."""
        self.tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several. If none is active then, the first that is left becomes so, with a warning."""
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
        args, kwargs = self._named(args, kwargs)
        with nullcontext() if adapter_names is None else self._mixed_batch(adapter_names, args, kwargs):
            return self.tuner.call(args, kwargs)

    def _named(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """A call's arguments with PEFT's names of a task's third and further ones, which are not the models'."""
        names = POSITIONAL.get(self.task, ()) if self.task else ()
        if len(args) <= 2 or not names:
            return args, kwargs
        return args[:2], {**kwargs, **{name: value for name, value in zip(names[2:], args[2:], strict=False)}}

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
        copies = max(beams, several)
        with (
            self._mixed_batch(adapter_names, args, kwargs, copies),
            encoder_inside(base, lambda: self._mixed_batch(adapter_names, args, kwargs)),
        ):
            return self.tuner.generated(args, kwargs)

    def _mixed_batch(
        self, names: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object], copies: int = 1
    ) -> AbstractContextManager[None]:
        """A block in which row i of the batch has the adapter `names[i // copies]`. Raises what `Tuner.rows` raises."""
        batch = next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), len(names))
        return self.tuner.rows(names, copies, batch)

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _with_prompts(self) -> PromptTuner:
        """What has the prompts. Raises AdapterStateError for adapters on layers."""
        prompts: PromptTuner | None = self.__dict__["_prompts"]
        if prompts is None:
            raise AdapterStateError(
                f"{self.peft_type} has no prompts", remedy="Use a prompt method, such as PromptTuningConfig."
            )
        return prompts

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """{adapter: the numbers of its virtual tokens}. Raises AttributeError for adapters on layers, which have none."""
        prompts: PromptTuner | None = self.__dict__["_prompts"]
        if prompts is None:
            raise AttributeError("prompt_tokens")
        return prompts.prompt_tokens

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Tensor | Cache | EncoderDecoderCache:
        """The active prompt for a batch: vectors [b, tokens, dim], or a cache that holds a prefix. `max_cache_len` changes nothing: the cache grows."""
        prompts = self._with_prompts()
        return prompts.given(self.active_adapters[0], self.active_peft_config, batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The vectors [tokens, dim] that a prompt's file holds, on the CPU."""
        config = self.peft_config[adapter_name]
        return self._with_prompts().state(adapter_name, config)[EMBEDDINGS].detach().cpu()

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
            if name in (WEIGHTS, FILE, README) or name.startswith(".diffpeft-"):
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
            self._write_card(staged, self._card(folder))

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the README.md of a folder: what it says stays; base model, tags, library and version are completed."""
        self._write_card(Path(output_dir), self._card(Path(output_dir)))

    @staticmethod
    def _write_card(folder: Path, text: str | None) -> None:
        if text is not None:
            with io.replacing(folder / README) as f:
                f.write(text.encode())

    def _card(self, folder: Path) -> str | None:
        """The text of the README.md for a folder; None if the one that is there has to stay as it is."""
        config = self.active_peft_config
        base = self._name() or config.base_model_name_or_path
        tags = tags_of(self.get_base_model(), str(config.peft_type), base)
        pipeline = TASKS[self.task].pipeline if self.task else None
        return completed(folder, CardFacts(base, tags, pipeline, f"- PEFT {config.peft_version}"))

    def _config_to_save(self, name: str) -> PeftConfig:
        """An adapter's config as its file has it: for inference, with the names of the base model and of its class."""
        config = state.saved(self.tuner.with_ranks(name, self.peft_config[name]))
        config.base_model_name_or_path = config.base_model_name_or_path or self._name()
        config.inference_mode = True
        if config.task_type is None and config.auto_mapping is None:
            base = _plain_class(self.get_base_model())
            config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return config

    def _name(self) -> str | None:
        return self.get_base_model().__dict__.get("name_or_path") or None

    def push_to_hub(self, repo_id: str, **options: Any) -> object:
        """Save into a repository on the Hub, which is made. Its own model card is kept and completed.

        Args:
            options: the Hub's (`commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`), `tags` for the model card, and
                those of `save_pretrained`.
        """
        names = inspect.signature(pushed).parameters
        hub = {name: options.pop(name) for name in names if name in options}
        return pushed(lambda folder: self.save_pretrained(folder, **options), repo_id, **hub)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """A model with the adapter in a folder or a repository on the Hub, of the class that its task type says.

        The adapter is the only active one; another one of its name on the model is replaced.

        Args:
            autocast_adapter_dtype: keep the adapter in float32 where the base has fewer bits; else it has the base's dtype.
            ephemeral_gpu_offload, low_cpu_mem_usage: change nothing: tensors go straight from the file to their place.
            key_mapping: {expression: replacement} for the file's keys beyond `base_model.model.`, the first that is found in a key; by default the
                model's `_checkpoint_conversion_mapping`, if it has one.
            ignore_mismatched_sizes: what the file has in other sizes stays as a fresh adapter has it.

        Raises CheckpointError and its kin, ConfigError or AdapterStateError, in which case the model has not changed.
        """
        check_single(model, f"{cls.__name__}.from_pretrained")
        check_name(adapter_name)
        config = None if config is None else PeftConfig.of(config)
        config, folder = (
            state.adapter_at(model_id, **kwargs) if config is None else (config, state.located(model_id, **kwargs))
        )
        _warn_foreign(config, model, folder.where)
        config.inference_mode = not is_trainable
        config.base_model_name_or_path = config.base_model_name_or_path or model.__dict__.get("name_or_path") or None
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        how = LoadOptions(is_trainable, True, Precision(autocast_adapter_dtype), key_mapping, ignore_mismatched_sizes)
        wrapper = cls._around(model, config)
        with inside(folder.where), planned({"": model}) as plan:
            settled = config if config.is_prompt_learning else copy.copy(config)
            with wrapper._alone(plan, adapter_name):
                wrapper.tuner.plan_loaded(plan, adapter_name, wrapper._with_heads(settled), folder, how)
            wrapper._plan_kept(plan, adapter_name, config)
            plan_input_grads(plan, model)
            if not is_trainable:
                plan.evaluate(wrapper)
        return wrapper

    @classmethod
    def _around(cls, model: nn.Module, config: PeftConfig) -> PeftModel:
        """A PeftModel without adapters, of the class that the config's task says, or of this one if it is of that kind."""
        made = cls._class_for(config)
        wrapper = made.__new__(made)
        nn.Module.__init__(wrapper)
        wrapper._adopt(model, config)
        return wrapper

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        """The class for a config's task, or this one if it is of that kind."""
        task_class = MODELS.get(config.task_type, cls)
        return cls if issubclass(cls, task_class) else task_class

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
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Incompatible:
        """Add an adapter from a folder or the Hub, inactive; or put its tensors into the one that has this name already. Options as in `from_pretrained`."""
        how = LoadOptions(is_trainable, False, Precision(autocast_adapter_dtype), key_mapping, ignore_mismatched_sizes)
        if adapter_name in self.peft_config:
            tensors = load_peft_weights(model_id, key_mapping=key_mapping, **kwargs)
            with planned({"": self.get_base_model()}) as plan:
                result = _plan_overwritten(plan, self, adapter_name, tensors, ignore_mismatched_sizes)
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


class GeneratingPeftModel(PeftModel):
    """A PeftModel whose steps of generation can be prepared by itself."""

    @property
    def base_model_prepare_inputs_for_generation(self) -> Prepare:
        """The user's model's `prepare_inputs_for_generation`, unless another was set here."""
        chosen: Prepare | None = self.__dict__.get("_prepare_inputs")
        return chosen or self.base_model.prepare_inputs_for_generation

    @base_model_prepare_inputs_for_generation.setter
    def base_model_prepare_inputs_for_generation(self, prepare: Prepare) -> None:
        self.__dict__["_prepare_inputs"] = prepare

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> Arguments:
        """The arguments of a step of generation: the model's, with the active prompt where it goes."""
        return self.tuner.prepared(self.base_model_prepare_inputs_for_generation, args, kwargs)


class PeftModelForCausalLM(GeneratingPeftModel, task=TaskType.CAUSAL_LM): ...


class PeftModelForSeq2SeqLM(GeneratingPeftModel, task=TaskType.SEQ_2_SEQ_LM):
    def generate(self, *, adapter_names: Sequence[str] | None = None, **kwargs: object) -> object:  # type: ignore[override]
        """The model's, for arguments by name. `adapter_names` as in forward, one a prompt."""
        return super().generate(adapter_names=adapter_names, **kwargs)


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS): ...


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS): ...


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS): ...


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION): ...


class PeftMixedModel(PeftModel):
    """A model with adapters of several methods, as every PeftModel may have them; with PEFT's words and checks for it.

    `set_adapter` and `delete_adapter` take lists.

    Raises ConfigError for a prompt method; no head is trained by itself, whatever the task. It can be saved, which PEFT's cannot.
    """

    def _adopt(self, model: nn.Module, config: PeftConfig) -> None:
        self.__dict__["_prompts"] = None
        self._check_kind(config)
        self.base_model = MixedModel(model, {})

    def _check_kind(self, config: PeftConfig) -> None:
        """Raise ConfigError for a method that is not for layers."""
        if config.is_prompt_learning:
            raise ConfigError(
                f"The provided `peft_type` '{config.peft_type}' is not compatible with the `PeftMixedModel`.",
                remedy=f"Compatible types are: {', '.join(TUNERS)}",
            )

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, in this order, and the only ones that are trained."""
        self._check_known(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove adapters, all or none. If none is active then, the first that is left becomes so, with a warning."""
        self._check_known(adapter_name)
        super().delete_adapter(adapter_name)

    def _check_known(self, names: str | Sequence[str]) -> None:
        if unknown := sorted({*named(names)} - {*self.peft_config}):
            raise UnknownNameError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")

    def get_layer_status(self) -> NoReturn:
        """Raises a TypeError, as PEFT's: `diffpeft.get_layer_status(model.get_base_model())` knows."""
        raise WrongKindError(
            f"get_layer_status is not supported for {type(self).__name__}",
            remedy="Ask diffpeft.get_layer_status(model.get_base_model()).",
        )

    def get_model_status(self) -> NoReturn:
        """Raises a TypeError, as PEFT's: `diffpeft.get_model_status(model.get_base_model())` knows."""
        raise WrongKindError(
            f"get_model_status is not supported for {type(self).__name__}",
            remedy="Ask diffpeft.get_model_status(model.get_base_model()).",
        )


LIBRARIES = ("transformers", "diffusers")  # a config names a class; only of these will one be imported


def mapping_of(config: PeftConfig) -> tuple[str, str]:
    """The library and the class that a config's `auto_mapping` names; empty where it names none."""
    mapping = config.auto_mapping or {}
    return str(mapping.get("parent_library") or ""), str(mapping.get("base_model_class") or "")


def foreign(library: str, allowed: Sequence[str] = LIBRARIES) -> bool:
    """Whether a library that a config names is not to be imported: none of those that are allowed, nor inside one."""
    return not any(library == name or library.startswith(f"{name}.") for name in allowed)


def _warn_foreign(config: PeftConfig, model: nn.Module, where: str) -> None:
    """Say which library a config names that is neither known nor the model's own. It is not imported."""
    library, _ = mapping_of(config)
    if library and foreign(library) and library != _plain_class(model).__module__:
        warnings.warn(
            f"{where}: auto_mapping names {shown(library)}, which is unknown here and is not imported",
            ConfigWarning,
            stacklevel=4,
        )


MODELS: dict[str | None, type[PeftModel]] = {
    cls.task: cls
    for cls in (
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
}


def _plain_class(model: nn.Module) -> type:
    """The class that a model had before anything of ours."""
    return next(c for c in type(model).__mro__ if not any(k.startswith("_diffpeft") for k in vars(c)))


def users_model(model: nn.Module) -> nn.Module:
    """The user's model: that in a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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

    The adapter is the only active one. Another one of its name on the model is replaced, with a warning, and a PeftModel's base is what is adapted further.

    Args:
        mixed: wrap it as a PeftMixedModel.
        revision: of the base model, for who loads the adapter.
        autocast_adapter_dtype: keep the adapter in float32 where the base has fewer bits; else it has the base's dtype.
        low_cpu_mem_usage: make its tensors on the meta device, until they are loaded.

    Raises ConfigError, UnknownNameError or AdapterStateError (ValueErrors where PEFT's are), in which case nothing has changed.
    """
    check_single(model, "get_peft_model")
    config = PeftConfig.of(peft_config)
    _say_base(config, model, revision)
    if isinstance(model, PeftModel) or mixes_of({"": model}):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a different config, "
            "make sure to call `.unload()` before.",
            AdapterStateWarning,
            stacklevel=2,
        )
    if isinstance(model, PeftModel):
        model, config = model.get_base_model(), _from_inside(config)
    made = PeftMixedModel if mixed else MODELS.get(config.task_type, PeftModel)
    return made(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _say_base(config: PeftConfig, model: nn.Module, revision: str | None) -> None:
    """Put a base model's name, and its revision if that is said, into a config. What was another is warned of."""
    old, new = config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    if old is not None and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            ConfigWarning,
            stacklevel=3,
        )
    config.base_model_name_or_path = new
    if revision is not None and config.revision not in (None, revision):
        warnings.warn(
            f"peft config has already set base model revision to {config.revision}, overwriting with revision {revision}",
            ConfigWarning,
            stacklevel=3,
        )
    config.revision = revision or config.revision


def _from_inside(config: Config) -> Config:
    """A config for a PeftModel's own base, where its layers go without `base_model.model.`."""
    config = copy.copy(config)
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        entries = getattr(config, name)
        if isinstance(entries, str):
            setattr(config, name, entries.removeprefix(PREFIX).removeprefix(PREFIX.replace(".", r"\.")))
        elif entries:
            setattr(config, name, type(entries)(entry.removeprefix(PREFIX) for entry in entries))
    return config


Model = TypeVar("Model", bound=nn.Module)


def inject_adapter_in_model(
    peft_config: object,
    model: Model,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Model:
    """Put a fresh, trainable adapter on a model, without a wrapper, and freeze the base; the model. With `state_dict`, on the layers that its keys name.

    It is the active one, which the others are no more; `model.peft_config` has its config. The adapter has the base's dtype.
    `low_cpu_mem_usage`: its tensors are on the meta device until `set_peft_model_state_dict` brings them.
    """
    check_single(model, "inject_adapter_in_model")
    config = PeftConfig.of(peft_config)
    if state_dict is not None:
        config = targeting(model, config, state_dict)
    inject(model, config, adapter_name, Precision(False, low_cpu_mem_usage))
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """{key: tensor} of one adapter as its file has it: of a PeftModel with `base_model.model.`, of a bare module without.

    The model may be inside DDP, FSDP 1 or torch.compile. Of FSDP 1 all processes have to ask; `state_dict`, if it is given, has the tensors that were gathered.
    """
    check_single(model, "get_peft_model_state_dict")
    known_tensors = None if state_dict is None else {k.removeprefix(PREFIX): t for k, t in state_dict.items()}
    with gathered(model) if state_dict is None else nullcontext() as passing:
        tensors = _tensors(unwrapped(model), known_tensors, adapter_name, save_embedding_layers)
        return {key: tensor.clone() for key, tensor in tensors.items()} if passing else tensors


def _tensors(
    model: nn.Module, known_tensors: Mapping[str, Tensor] | None, name: str, embeddings: bool | str
) -> dict[str, Tensor]:
    """{key: tensor} of one adapter of a model that nothing is around."""
    if isinstance(model, PeftModel):
        known([name], model.peft_config)
        return model.tuner.tensors(name, known_tensors, embeddings)
    config = state.config_of(model, name)
    return state.spelt(model, name, config, gathered=known_tensors, embeddings=embeddings)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Incompatible:
    """Put tensors with PEFT's keys into an adapter that is there: all or nothing. -> missing_keys, unexpected_keys, mismatched_keys."""
    check_single(model, "set_peft_model_state_dict")
    if in_units(model):
        raise AdapterStateError("the model is in units of FSDP 1", remedy="Load the adapter before it is wrapped.")
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        known([adapter_name], model.peft_config)
    with planned({"": users_model(model)}) as plan:
        return _plan_overwritten(plan, model, adapter_name, peft_model_state_dict, ignore_mismatched_sizes)


def _plan_overwritten(
    plan: Plan, model: nn.Module, name: str, tensors: Mapping[str, Tensor], ignore_mismatched: bool
) -> Incompatible:
    """Plan to put tensors into an adapter that is there, on a wrapped or a bare model; with `ignore_mismatched` those that fit."""
    mismatched: list[Mismatch] = []
    if ignore_mismatched:
        present = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)
        tensors, mismatched = fitting(tensors, present, type(model).__name__)
    if isinstance(model, PeftModel):
        result = model.tuner.plan_overwritten(plan, name, tensors)
    else:
        result = state.plan_overwritten(plan, model, name, state.config_of(model, name), tensors)
    return result._replace(mismatched_keys=mismatched)


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

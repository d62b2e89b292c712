"""Prompts: a model together with the prompt adapters on it, and the model's call and generation with one of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, CheckpointWarning, ConfigError, ConfigWarning, UnknownNameError
from diffpeft.llm.multitask_prompt_tuning import MultitaskPromptEmbedding
from diffpeft.llm.p_tuning import PromptEncoder
from diffpeft.llm.prefix_tuning import PrefixEncoder, PrefixTuningConfig, cache, call
from diffpeft.llm.prompt import PromptConfig, PromptLearningConfig, VirtualTokens, complete
from diffpeft.llm.prompt_tuning import PromptEmbedding
from diffpeft.methods.peft_config import PeftConfig, PeftType, TaskType
from diffpeft.model.plan import Plan, planned

if TYPE_CHECKING:
    from transformers import Cache, EncoderDecoderCache
    from transformers.utils import ModelOutput

PROMPTS: dict[PeftType, type[VirtualTokens]] = {
    PeftType.PROMPT_TUNING: PromptEmbedding,
    PeftType.P_TUNING: PromptEncoder,
    PeftType.PREFIX_TUNING: PrefixEncoder,
    PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptEmbedding,
}

Arguments = dict[str, Any]  # of a model's call, by name
Prepare = Callable[..., Arguments]  # a model's prepare_inputs_for_generation
_START, _END = ("input_ids", "attention_mask"), ("output_attentions", "output_hidden_states", "return_dict", "task_ids")
_LABELLED = (*_START, "inputs_embeds", "labels", *_END)
POSITIONAL: dict[TaskType, tuple[str, ...]] = {  # the order of a call's arguments
    TaskType.CAUSAL_LM: _LABELLED,
    TaskType.SEQ_CLS: _LABELLED,
    TaskType.TOKEN_CLS: _LABELLED,
    TaskType.FEATURE_EXTRACTION: (*_START, "inputs_embeds", *_END),
    TaskType.QUESTION_ANS: (
        *_START,
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_END,
    ),
    TaskType.SEQ_2_SEQ_LM: (
        *_START,
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
        *_END,
    ),
}
TYPED = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)  # tasks that keep token_type_ids
LABELLED = (
    TaskType.CAUSAL_LM,
    TaskType.TOKEN_CLS,
)  # tasks with a label for each token; PEFT forgets those of the prompt in the second and fails


def _word_embeddings(model: Any) -> Any:
    """A model's; of one that does not tell, the first module with as many rows as the vocabulary has words, which is PEFT's guess, or None."""
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings()
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    table = next((name for name, p in model.named_parameters() if p.dim() and len(p) == words), None)
    return None if table is None else model.get_submodule(table.rpartition(".")[0])


def _device_of(model: nn.Module) -> torch.device:
    """Where a model is, by what it says or by its first parameter."""
    devices = {parameter.device: None for parameter in model.parameters()}
    return getattr(model, "device", next(iter(devices), torch.device("cpu")))


class Prompts(nn.Module):
    """The model, frozen by the first adapter, and its prompt adapters by name. Its state dict is that of PEFT's model with the same adapters.

    Args:
        base_model: the user's model, from transformers.
        task_type: what the adapters are for.
    """

    def __init__(self, base_model: Any, task_type: str | None) -> None:
        super().__init__()
        if task_type not in POSITIONAL:
            raise ConfigError(
                f"task_type is {task_type}", remedy=f"A prompt method needs one of {', '.join(POSITIONAL)}."
            )
        self.task_type = TaskType(task_type)
        self.base_model = base_model
        self.prompt_encoder = nn.ModuleDict()
        self.prompt_tokens: dict[str, Tensor] = {}
        self.word_embeddings = _word_embeddings(base_model)

    def add(self, name: str, config: PromptLearningConfig) -> VirtualTokens:
        """Complete `config` from the model and make its encoder, on the model's device and in fp32. Anything wrong: nothing is added."""
        with planned({"": self.base_model}) as plan:
            return self.plan_added(plan, name, config)

    def plan_added(self, plan: Plan, name: str, config: PromptLearningConfig) -> VirtualTokens:
        """Plan what `add` does; the encoder that there will be. The first one freezes the model."""
        if name in self.prompt_encoder:
            raise ConfigError(f"Adapter with name '{name}' already exists.", remedy="Choose another name.")
        kind = encoder_of(config)
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.base_model.modules())
        if config.peft_type == PeftType.PREFIX_TUNING and checkpointing:
            raise ConfigError(
                "PREFIX_TUNING does not work with gradient checkpointing.",
                remedy="Call gradient_checkpointing_disable() on the model first.",
            )
        config.validate()
        self.completed(config)
        if self.word_embeddings is None and config.peft_type != PeftType.PREFIX_TUNING:
            raise ConfigError(
                f"{type(self.base_model).__name__} has no get_input_embeddings", remedy="Use a model of transformers."
            )
        encoder = kind(config, self.word_embeddings).to(_device_of(self.base_model))
        if not self.prompt_encoder:
            plan.require_grad(self.base_model.parameters(), False)
        nn.ModuleDict({name: encoder})  # which says what name it cannot hold
        plan.entry(self.prompt_encoder._modules, name, encoder)
        tokens = torch.arange(config.vectors)
        plan.entry(self.prompt_tokens, name, tokens)
        return encoder

    def completed(self, config: PromptConfig) -> PromptConfig:
        """`config`, with what it leaves to the model and the task filled in."""
        complete(config, getattr(self.base_model, "config", {}))
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1
        return config

    def delete(self, name: str) -> None:
        """Take an adapter away."""
        with planned({"": self.base_model}) as plan:
            self.plan_deleted(plan, name)

    def plan_deleted(self, plan: Plan, name: str) -> None:
        """Plan to take an adapter away."""
        self.encoder(name)
        plan.entry(self.prompt_encoder._modules, name)
        plan.entry(self.prompt_tokens, name)

    def encoder(self, name: str) -> VirtualTokens:
        """An adapter's encoder. Raises UnknownNameError."""
        if name not in self.prompt_encoder:
            raise UnknownNameError.of("adapter", name, self.prompt_encoder)
        return self.prompt_encoder[name]  # type: ignore[return-value]

    def state(self, name: str, config: PromptLearningConfig) -> dict[str, Tensor]:
        """What a file of this adapter holds."""
        return self.encoder(name).state(config.inference_mode)

    def load_state(self, name: str, config: PromptLearningConfig, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy a file's tensors into an adapter; the names of those used."""
        with planned({"": self.base_model}) as plan:
            return self.plan_state(plan, name, self.encoder(name), config, tensors)

    def plan_state(
        self, plan: Plan, name: str, encoder: VirtualTokens, config: PromptLearningConfig, tensors: Mapping[str, Tensor]
    ) -> list[str]:
        """Plan to copy a file's tensors into an adapter's encoder; the names of those used."""
        if config.peft_type == PeftType.P_TUNING and not config.inference_mode:
            warnings.warn(
                f"The file holds the finished vectors of {name!r}, and its network would be applied to them again: "
                "load with inference_mode=True",
                CheckpointWarning,
                stacklevel=3,
            )
        places = encoder.checked(tensors)
        for key, place in places.items():
            plan.fill(place, tensors[key])
        return list(places)

    def prompt(self, active: str, config: PromptLearningConfig, batch: int, task_ids: Tensor | None = None) -> Tensor:
        """An adapter's vectors for a batch, [batch, tokens, dim]; of a prefix [batch, tokens, 2 layers dim]."""
        return self.encoder(active).prompt(batch, config.inference_mode, task_ids)

    def given(
        self, active: str, config: PromptLearningConfig, batch: int, task_ids: Tensor | None = None
    ) -> Tensor | Cache | EncoderDecoderCache:
        """What an adapter puts before a batch: vectors [b, tokens, dim], or a fresh cache that holds a prefix."""
        if isinstance(config, PrefixTuningConfig):
            return self._prefix(active, config, batch)
        return self.prompt(active, config, batch, task_ids)

    def _prefix(self, active: str, config: PrefixTuningConfig, batch: int) -> Cache | EncoderDecoderCache:
        """A fresh cache that holds an adapter's keys and values."""
        vectors = self.prompt(active, config, batch)
        return cache(vectors.to(getattr(self.base_model, "dtype", None) or vectors.dtype), config, self.base_model)

    def forward(
        self,
        active: str,
        config: PromptLearningConfig,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """The model's output for its own arguments, with a prompt before what it reads."""
        arguments: Arguments = {**dict(zip(POSITIONAL[self.task_type], args, strict=False)), **(kwargs or {})}
        task_ids, n = arguments.pop("task_ids", None), config.length
        ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        if ids is None and embeds is None:
            raise ConfigError("You have to provide either input_ids or inputs_embeds", remedy="Give one of them.")
        _drop(arguments, config, typed=self.task_type in TYPED)
        batch = len(embeds if ids is None else ids)
        if isinstance(config, PrefixTuningConfig):
            return self._prefixed(active, config, batch, {"input_ids": ids, "inputs_embeds": embeds} | arguments)
        prompt = self.prompt(active, config, batch, task_ids)
        _extend(arguments, "attention_mask", n, 1)
        if self.task_type == TaskType.SEQ_2_SEQ_LM:
            return self._translate(config, prompt, ids, embeds, arguments)
        _extend(arguments, "token_type_ids", n, 0)
        if self.task_type in LABELLED:
            _extend(arguments, "labels", n, -100)
        return self.base_model(inputs_embeds=self._joined(prompt, ids, embeds), **arguments)

    def _prefixed(
        self, active: str, config: PrefixTuningConfig, batch: int, arguments: Arguments
    ) -> ModelOutput | tuple[Tensor, ...]:
        """The output with a prefix, which goes before the layers of the decoder, or of the only transformer."""
        past = self._prefix(active, config, batch)
        if self.task_type == TaskType.SEQ_2_SEQ_LM:
            _extend(arguments, "decoder_attention_mask", config.length, 1, cached=True)
            return self.base_model(past_key_values=past, **arguments)
        _extend(arguments, "attention_mask", config.length, 1, cached=True)
        return call(self.base_model, self.task_type, config, past, arguments)

    def _joined(self, prompt: Tensor, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """[b, n, dim] and [b, t] or [b, t, dim] -> [b, n + t, dim]."""
        embeds = self.word_embeddings(ids) if embeds is None else embeds
        return torch.cat((prompt.to(embeds.dtype), embeds), dim=1)

    def _translate(
        self,
        config: PromptLearningConfig,
        prompt: Tensor,
        ids: Tensor | None,
        embeds: Tensor | None,
        arguments: Arguments,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """The output of an encoder and a decoder: a prompt [b, tokens, dim] goes before the encoder's input, that of several tasks before the decoder's too."""
        n = config.length
        arguments["inputs_embeds"] = self._joined(prompt[:, :n], ids, embeds)
        if config.peft_type == PeftType.MULTITASK_PROMPT_TUNING and config.num_transformer_submodules == 2:
            ids, embeds = arguments.pop("decoder_input_ids", None), arguments.get("decoder_inputs_embeds")
            if ids is None and embeds is None:
                ids = _shifted(arguments.get("labels"), self.base_model.config)
            arguments["decoder_inputs_embeds"] = self._joined(prompt[:, n:], ids, embeds)
            _extend(arguments, "decoder_attention_mask", n, 1)
            _extend(arguments, "labels", n, -100)
        return self.base_model(**arguments)

    def generate(
        self,
        active: str,
        config: PromptLearningConfig,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor | ModelOutput:
        """The model's `generate` with a prompt. It runs on a passing view of the model, so that the model itself is never changed
        and threads may generate with different adapters."""
        arguments: Arguments = dict(kwargs or {})
        model = _view(self.base_model)
        if self.task_type == TaskType.CAUSAL_LM:
            model.prepare_inputs_for_generation = self._steps(active, config, model.prepare_inputs_for_generation)
            return model.generate(*args, **arguments)
        if self.task_type != TaskType.SEQ_2_SEQ_LM:
            raise AdapterStateError(f"{self.task_type} does not generate", remedy="Use CAUSAL_LM or SEQ_2_SEQ_LM.")
        arguments |= dict(zip(("input_ids",), args, strict=False))
        if arguments.get("input_ids") is None:
            raise ConfigError("input_ids must be provided for generation", remedy="Give input_ids=.")
        _drop(arguments, config)
        if config.peft_type == PeftType.PREFIX_TUNING:
            model.prepare_inputs_for_generation = self._steps(active, config, model.prepare_inputs_for_generation)
            return model.generate(**arguments)
        if arguments.pop("encoder_outputs", None) is not None:
            warnings.warn(
                "`encoder_outputs` are of a text without the prompt, and are ignored", ConfigWarning, stacklevel=2
            )
        ids, n = arguments.pop("input_ids"), config.length
        prompt = self.prompt(active, config, len(ids), arguments.pop("task_ids", None))
        _extend(arguments, "attention_mask", n, 1)
        return model.generate(inputs_embeds=self._joined(prompt[:, :n], ids, None), **arguments)

    def _steps(self, active: str, config: PromptLearningConfig, prepare: Prepare) -> Prepare:
        """`prepare_inputs_for_generation` that puts the prompt before the first step, and before all where nothing is kept between steps."""
        n, decodes = config.length, self.task_type == TaskType.SEQ_2_SEQ_LM

        def prepared(
            input_ids: Tensor,
            next_sequence_length: int | None = None,
            past_key_values: Cache | EncoderDecoderCache | None = None,
            attention_mask: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            is_first_iteration: bool | None = False,
            task_ids: Tensor | None = None,
            **kwargs: object,
        ) -> Arguments:
            """The arguments of a step. `input_ids` [b, t] or `inputs_embeds` [b, t, dim], `attention_mask` [b, t]."""
            batch, keeps = len(input_ids), kwargs.get("use_cache") is not False  # a model may hand a prefix on even so
            fresh = not keeps or _is_empty(past_key_values)
            if fresh and isinstance(config, PrefixTuningConfig):
                past_key_values = self._prefix(active, config, batch)
            elif fresh:
                embeds = inputs_embeds if is_first_iteration else None
                inputs_embeds = self._joined(self.prompt(active, config, batch, task_ids), input_ids, embeds)
                is_first_iteration, next_sequence_length = True, None
                past_key_values = _longer(past_key_values, n, self.base_model.config)
            elif is_first_iteration and next_sequence_length is not None:
                next_sequence_length += n  # generation goes on from a cache, which holds the prompt too
            arguments = kwargs | {"attention_mask": attention_mask}
            if not decodes:
                _move(arguments, config)
            cached = not fresh or isinstance(config, PrefixTuningConfig)
            _extend(arguments, "decoder_attention_mask" if decodes else "attention_mask", n, 1, cached)
            arguments |= {"next_sequence_length": next_sequence_length, "past_key_values": past_key_values}
            step = prepare(input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **arguments)
            if fresh and not isinstance(config, PrefixTuningConfig) and step.get("inputs_embeds") is None:
                # the model has prepared a step of the text alone
                step |= {
                    "input_ids": None,
                    "inputs_embeds": inputs_embeds,
                    "attention_mask": arguments["attention_mask"],
                }
                step.pop("cache_position", None)
            return step

        return prepared


def encoder_of(config: PeftConfig) -> type[VirtualTokens]:
    """What makes the vectors of a config's method. Raises UnknownNameError for methods without any."""
    kind = PROMPTS.get(config.peft_type)  # type: ignore[call-overload]
    if kind is None:
        raise UnknownNameError.of("prompt method", config.peft_type, PROMPTS)
    return kind


def _is_empty(past: Cache | EncoderDecoderCache | None) -> bool:
    """Whether nothing is kept of earlier steps."""
    return past is None or not past.get_seq_length()


def _move(arguments: Arguments, config: PromptLearningConfig) -> None:
    """Positions of a step move behind a prefix; a prompt has the model count them anew. Token types there are none."""
    arguments.pop("token_type_ids", None)
    places = arguments.pop("position_ids", None)
    if places is not None and config.peft_type == PeftType.PREFIX_TUNING:
        arguments["position_ids"] = places + config.length


def _view(model: nn.Module) -> Any:
    """The same model as another object: what is set on one is not seen on the other, modules and tensors are shared."""
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__)
    return view


def _longer(past: Cache | EncoderDecoderCache | None, n: int, config: Any) -> Cache | EncoderDecoderCache | None:
    """An empty cache with room for n more tokens: `generate` made one of a fixed size for the text alone."""
    from transformers import StaticCache

    if not isinstance(past, StaticCache):
        return past
    layers: Any = past.layers
    size = max(layer.max_cache_len for layer in layers) + n
    return StaticCache(config=config, max_cache_len=size, offloading=past.offloading)


def _extend(arguments: Arguments, name: str, n: int, value: int, cached: bool = False) -> None:
    """Put n times `value` before each row of an argument [b, t], if it is there.

    A mask [b, heads, q, k] gets n columns, and n rows for tokens that are not `cached`.
    """
    if (t := arguments.get(name)) is None:
        return
    arguments[name] = torch.cat((t.new_full((len(t), n), value), t), dim=1) if t.dim() == 2 else _widened(t, n, cached)


def _widened(mask: Tensor, n: int, cached: bool) -> Tensor:
    """A mask [b, heads, q, k], of truths or added to the scores, with n tokens before those that it has: all see them, and they see each other in order."""
    sees, not_sees = (0.0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (1, 0)
    b, heads, q, k = mask.shape
    wide = torch.cat((mask.new_full((b, heads, q, n), sees), mask), dim=3)
    if cached:
        return wide
    above = mask.new_full((n, n + k), not_sees)
    above[:, :n] = torch.where(torch.ones(n, n, device=mask.device).tril() > 0, sees, not_sees).to(mask.dtype)
    return torch.cat((above.expand(b, heads, n, n + k), wide), dim=2)


def _drop(arguments: Arguments, config: PromptLearningConfig, typed: bool = False) -> None:
    """Positions move behind a prefix; before a prompt there is no place for those of the user, nor for token types in most tasks."""
    if config.peft_type == PeftType.PREFIX_TUNING and arguments.get("position_ids") is not None:
        arguments["position_ids"] = arguments["position_ids"] + config.length
    elif arguments.pop("position_ids", None) is not None:
        warnings.warn(
            "Position ids are not supported for parameter efficient tuning. Ignoring position ids.",
            ConfigWarning,
            stacklevel=3,
        )
    if not typed and arguments.pop("token_type_ids", None) is not None:
        warnings.warn(
            "Token type ids are not supported for parameter efficient tuning. Ignoring token type ids",
            ConfigWarning,
            stacklevel=3,
        )


def _shifted(labels: Tensor | None, config: Any) -> Tensor:
    """What a decoder reads for these labels [b, t]: the labels one place later, the start token first."""
    if labels is None or config.pad_token_id is None:
        raise ConfigError(
            "the decoder has nothing to read" if labels is None else "pad_token_id of the model's config is None",
            remedy="Give labels, decoder_input_ids or decoder_inputs_embeds, and set pad_token_id.",
        )
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    ids = torch.cat((start, labels[:, :-1]), dim=1)
    return ids.masked_fill(ids == -100, config.pad_token_id)

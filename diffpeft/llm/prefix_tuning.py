"""Prefix tuning: trained keys and values in front of those of every layer, softmax(q [Pk; k]^T) [Pv; v].  Li & Liang 2021, arXiv:2101.00190.

With a projection they are made by an MLP, P = W2 tanh(W1 E).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffpeft.errors import ConfigError, ConfigWarning
from diffpeft.llm.prompt import PromptLearningConfig, VirtualTokens, check_name
from diffpeft.llm.tasks import heads_of
from diffpeft.methods.peft_config import PeftType, TaskType

if TYPE_CHECKING:
    from transformers import Cache, EncoderDecoderCache
    from transformers.utils import ModelOutput

UNEQUAL = ("gemma2", "gemma3_text", "gemma4")  # models whose layers may differ in what they keep


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """How to make a prefix. Names, meanings and defaults are PEFT's.

    Args:
        init_weights: "zero": the prefix starts as zeros. None: random.
        encoder_hidden_size: width of the projection; None: token_dim.
        prefix_projection: whether an MLP makes the prefix.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    TYPE: ClassVar[PeftType | None] = PeftType.PREFIX_TUNING

    def validate(self) -> None:
        super().validate()
        if self.init_weights is not None:
            check_name("init_weights", self.init_weights, ("zero",))


class PrefixEncoder(VirtualTokens):
    """`embedding` [n, 2 layers dim], the keys and values; or [n, dim] and `transform`, an MLP to that."""

    transform: nn.Sequential | None

    def __init__(self, config: PrefixTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        n, dim, hidden = config.num_virtual_tokens, config.token_dim, config.encoder_hidden_size
        assert n and dim and config.num_layers  # they have been completed from the model
        all_ = 2 * config.num_layers * dim
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(n, dim)
            self.transform = nn.Sequential(nn.Linear(dim, hidden or dim), nn.Tanh(), nn.Linear(hidden or dim, all_))
            last: nn.Module = self.transform[-1]
        else:
            self.embedding = last = nn.Embedding(n, all_)
            self.transform = None
        if config.init_weights == "zero":
            for p in last.parameters():
                nn.init.zeros_(p)

    def forward(self, indices: Tensor) -> Tensor:
        """Indices [b, t] -> keys and values [b, t, 2 layers dim]."""
        vectors = self.embedding(indices)
        return vectors if self.transform is None else self.transform(vectors)


def cache(prefix: Tensor, config: PrefixTuningConfig, model: nn.Module) -> Cache | EncoderDecoderCache:
    """A prefix [b, n, 2 layers dim] as transformers' cache: keys and values [b, heads, n, dim / heads] a layer.

    For an encoder and a decoder it is the decoder's; as in PEFT the table is then read twice with a stride of 4: of L layers, the i-th has the
    keys and values at 4 i mod 2 L, so that half of the prefix is not used.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    layers, heads, parts = config.num_layers, config.num_attention_heads, config.num_transformer_submodules
    assert layers and heads and parts  # they have been completed from the model
    table = prefix.unflatten(-1, (2 * layers, heads, -1)).permute(2, 0, 3, 1, 4)
    table = torch.cat([table] * parts)
    devices = _devices(model, layers)
    pairs = [
        (k.to(device), v.to(device))
        for k, v, device in zip(table[:: 2 * parts], table[1 :: 2 * parts], devices, strict=True)
    ]
    model_config: Any = getattr(model, "config", None)
    if any(name in getattr(model_config, "model_type", "") for name in UNEQUAL):
        return _fitted(pairs, model_config)
    decoder = DynamicCache(pairs)
    return decoder if parts == 1 else EncoderDecoderCache(decoder, DynamicCache())


def _fitted(pairs: Sequence[tuple[Tensor, Tensor]], model_config: Any) -> Cache:
    """A cache for layers of several kinds: keys and values [b, heads, n, width] cut to what a layer holds; none where that is wider, or where a layer
    uses another's keys.
    """
    from transformers import DynamicCache

    text = model_config.get_text_config()
    made, skipped = DynamicCache(config=text), []
    first_shared = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    for i, (k, v) in enumerate(pairs):
        heads, width = _shape(text, i) or (k.shape[1], k.shape[3])
        if i >= first_shared or heads > k.shape[1] or width > k.shape[3]:
            skipped.append(i)
            continue
        made.update(k[:, :heads, :, :width], v[:, :heads, :, :width], i)
    if len(skipped) == len(pairs):
        k, _ = pairs[0]
        raise ConfigError(
            f"Prefix tuning skipped every layer: no layer's keys fit {k.shape[1]} heads of {k.shape[3]}",
            remedy="Set token_dim and num_attention_heads of the config to those of a layer.",
        )
    if skipped:
        warnings.warn(
            f"Prefix tuning leaves out the layers {skipped}: they are wider than the prefix, or use another layer's keys",
            ConfigWarning,
            stacklevel=2,
        )
    return made


def _shape(text: Any, layer: int) -> tuple[int, int] | None:
    """Heads of the keys and their width in a layer, if layers differ. transformers < 5.15 names the wide layers' globally."""
    kinds = getattr(text, "layer_types", None)
    if kinds and (layers := getattr(text, "per_layer_config", None)) is not None:
        return layers[layer].num_key_value_heads, layers[layer].head_dim
    if not kinds or getattr(text, "global_head_dim", None) is None:
        return None
    if kinds[layer] == "sliding_attention":
        return text.num_key_value_heads, text.head_dim
    return getattr(text, "num_global_key_value_heads", None) or text.num_key_value_heads, text.global_head_dim


def _devices(model: nn.Module, layers: int) -> list[int | str | torch.device | None]:
    """Where each layer runs if accelerate spread the model over devices, otherwise None: where the prefix is."""
    spread = getattr(model, "hf_device_map", None) or {}
    main = next((device for device in spread.values() if device not in ("cpu", "disk")), None)
    runs = {name: main if device in ("cpu", "disk") else device for name, device in spread.items()}
    by_layer = {int(m[1]): device for name, device in runs.items() if (m := re.search(r"\.(\d+)(?:\.|$)", name))}
    return [by_layer.get(i, runs.get("")) for i in range(layers)]


def call(
    model: nn.Module, task: TaskType, config: PrefixTuningConfig, past: object, arguments: dict[str, Any]
) -> ModelOutput | tuple[Tensor, ...]:
    """The model's output with a prefix. A model that takes none itself is run as its backbone and its head."""
    if task == TaskType.CAUSAL_LM or _takes_past(model):
        return model(past_key_values=past, **arguments)
    backbone, head = _halves(model, task, config)
    labels = {name: arguments.pop(name, None) for name in ("labels", "start_positions", "end_positions")}
    as_dict = arguments.pop("return_dict", None)
    out = backbone(past_key_values=past, return_dict=True, **arguments)
    pooled = getattr(out, "pooler_output", None) if task == TaskType.SEQ_CLS else None
    hidden = out.last_hidden_state if pooled is None else pooled
    dropout = dict(model.named_children()).get("dropout", nn.Identity())
    result = _result(task, model.config, head(dropout(hidden)), labels, out)
    as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    return result if as_dict else result.to_tuple()


def _halves(model: nn.Module, task: TaskType, config: PrefixTuningConfig) -> tuple[nn.Module, nn.Module]:
    """The backbone of a model, which takes a prefix, and its head. Raises ConfigError if it has not both."""
    from transformers import PreTrainedModel

    children, names = dict(model.named_children()), (*(config.modules_to_save or ()), *heads_of(task))
    backbone = next((child for child in children.values() if isinstance(child, PreTrainedModel)), None)
    head = next((child for name, child in children.items() if any(part in name for part in names)), None)
    if backbone is None or head is None or not _takes_past(backbone):
        raise ConfigError(
            "Model does not support past key values which are required for prefix tuning",
            where=type(model).__name__,
            remedy="Use another method, such as prompt tuning.",
        )
    return backbone, head


def _takes_past(model: nn.Module) -> bool:
    """Whether a model's forward has a place for keys and values that come before."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def _result(
    task: TaskType, config: object, logits: Tensor, labels: Mapping[str, Tensor | None], out: Any
) -> ModelOutput:
    """The output of a head: logits [b, classes] or [b, t, classes], and the loss where there are labels [b] or [b, t]."""
    from transformers import modeling_outputs as outputs
    from transformers.loss import loss_utils as losses

    inner = {"hidden_states": out.hidden_states, "attentions": out.attentions}
    if task == TaskType.QUESTION_ANS:
        start, end = (side.contiguous() for side in logits.unbind(-1))
        places = labels["start_positions"], labels["end_positions"]
        return outputs.QuestionAnsweringModelOutput(
            loss=losses.ForQuestionAnsweringLoss(start, end, *places), start_logits=start, end_logits=end, **inner
        )
    wanted = labels["labels"]
    if task == TaskType.SEQ_CLS:
        loss = None if wanted is None else losses.ForSequenceClassificationLoss(wanted, logits, config)
        return outputs.SequenceClassifierOutput(loss=loss, logits=logits, **inner)
    loss = None if wanted is None else losses.ForTokenClassification(logits, wanted, config)
    return outputs.TokenClassifierOutput(loss=loss, logits=logits, **inner)

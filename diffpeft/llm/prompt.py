"""What all prompt methods have in common: virtual tokens, whose vectors are trained while the model stays as it is.

A config says how many tokens and how wide; an encoder makes their vectors; `Prompts` (prompts.py) puts them in front of what the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpeft.errors import ConfigError, MissingKeysError, NonFiniteError, ShapeMismatchError, listed, near, shown
from diffpeft.io import finite
from diffpeft.methods.peft_config import PeftConfig, PeftType

EMBEDDINGS = "prompt_embeddings"  # PEFT's name in files for the vectors of the tokens

# Under which names a model's config holds each of these.
SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields of all prompt methods. Names, meanings and defaults are PEFT's.

    Args:
        num_virtual_tokens: how many tokens.
        token_dim, num_attention_heads, num_layers: of the model; None: read from its config. For a prefix the first two are of its keys and values.
        num_transformer_submodules: 2 for an encoder and a decoder, otherwise 1; None: by the task.
        modules_to_save: layers of the model, mostly its head, that are trained and saved as a whole.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def length(self) -> int:
        """How many virtual tokens there are, once the config has been completed."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens

    @property
    def vectors(self) -> int:
        """How many vectors are trained: the tokens, counted once for each transformer."""
        return self.length * (self.num_transformer_submodules or 1)


PromptConfig = TypeVar("PromptConfig", bound=PromptLearningConfig)


class VirtualTokens(nn.Module):
    """Makes the vectors of the virtual tokens from `embedding` [tokens, dim] and what stands on it.

    A subclass takes (config, word_embeddings) and maps indices [b, t] to vectors [b, t, dim].
    """

    embedding: nn.Embedding

    @property
    def tokens(self) -> Tensor:
        """The indices of all tokens, [1, tokens]."""
        return torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)[None]

    def prompt(self, batch: int, collapsed: bool = False, task_ids: Tensor | None = None) -> Tensor:
        """The vectors for a batch, [batch, tokens, dim]. `collapsed`: they are what `embedding` holds."""
        vectors = self.embedding.weight[None] if collapsed else self(self.tokens)
        return vectors.expand(batch, -1, -1)

    def state(self, collapsed: bool = False) -> dict[str, Tensor]:
        """What a file holds: the vectors themselves, not what makes them; without dropout."""
        was, _ = self.training, self.eval()
        try:
            with torch.no_grad():
                return {EMBEDDINGS: self.prompt(1, collapsed)[0].cpu().clone()}
        finally:
            self.train(was)

    def places(self) -> dict[str, Tensor]:
        """Where each tensor of a file goes."""
        return {EMBEDDINGS: self.embedding.weight}

    def load(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy a file's tensors in, all or none; the names of those that were used."""
        places = self.checked(tensors)
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(tensors[name])
        return list(places)

    def checked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where a file's tensors go, by their names. Raises MissingKeysError, ShapeMismatchError or NonFiniteError."""
        places = self.places()
        if missing := sorted(set(places) - set(tensors)):
            raise MissingKeysError(f"no {listed(missing)}", remedy="It is not a file of this method.")
        for name, place in places.items():
            if tensors[name].shape != place.shape:
                raise ShapeMismatchError(
                    f"{name} is {tuple(tensors[name].shape)}, expected {tuple(place.shape)}",
                    remedy="Files hold the vectors and not what makes them: load with inference_mode=True, for the same model and tokens.",
                )
            if not finite(tensors[name]):
                raise NonFiniteError(f"{name} has NaN or infinite values", remedy="The training diverged.")
        return places


def complete(config: PromptConfig, model_config: Any) -> PromptConfig:
    """Fill in what `config` leaves to the model; `model_config` is its config, an object or a mapping. Returns `config`.

    Raises ConfigError for what it does not tell.
    """
    if not config.num_virtual_tokens or config.num_virtual_tokens < 1:
        raise ConfigError(
            f"num_virtual_tokens is {shown(config.num_virtual_tokens)}", remedy="Say how many tokens, 1 or more."
        )
    table = dict(model_config.to_dict() if hasattr(model_config, "to_dict") else model_config)
    table = table.get("text_config", table)
    for field, names in SIZES.items():
        if getattr(config, field) is None:
            setattr(config, field, _size(field, names, table, model_config))
    if config.peft_type == PeftType.PREFIX_TUNING and "num_key_value_heads" in table:
        assert config.token_dim is not None and config.num_attention_heads is not None
        heads, width = _keys(table, config.token_dim // config.num_attention_heads)
        config.token_dim, config.num_attention_heads = heads * width, heads
    if getattr(config, "encoder_hidden_size", config) is None:
        config.encoder_hidden_size = config.token_dim  # type: ignore[attr-defined]
    return config


def _size(field: str, names: Sequence[str], table: Mapping[str, object], model_config: object) -> Any:
    """A size of a model under one of its names; some models have it as a property only."""
    size = next((table[name] for name in names if name in table), None)
    size = getattr(model_config, names[0], None) if size is None else size
    if size is None:
        raise ConfigError(f"the model's config has no {' or '.join(names)}", remedy=f"Please specify `{field}`.")
    return size


def _keys(table: Mapping[str, Any], width: int) -> tuple[int, int]:
    """Heads and their width in a layer's keys and values; where layers differ, of the widest."""
    heads = table["num_key_value_heads"]
    width = table.get("head_dim") or width
    if table.get("global_head_dim") is not None:
        return table.get("num_global_key_value_heads") or heads, table["global_head_dim"]
    layers = (table.get("per_layer_config") or {}).values()
    shapes = [(heads, width), *((by.get("num_key_value_heads", heads), by.get("head_dim", width)) for by in layers)]
    return max(shapes, key=lambda shape: shape[1])


def check_name(field: str, value: object, known: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of the names."""
    if value not in known:
        raise ConfigError(
            f"{field} is {shown(value)}", remedy=near(str(value), known) or f"It is one of {', '.join(known)}."
        )

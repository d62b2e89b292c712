"""Prompt tuning: trained vectors in front of the embedded text, [P; E(x)].  Lester et al. 2021, arXiv:2104.08691."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpeft.errors import ConfigError
from diffpeft.llm.prompt import PromptLearningConfig, VirtualTokens, check_name
from diffpeft.methods.peft_config import PeftType


class PromptTuningInit(StrEnum):
    """What the vectors start from: a text's, random words', or random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """How to make a prompt. Names, meanings and defaults are PEFT's.

    Args:
        prompt_tuning_init: a PromptTuningInit. Random numbers may lie far from all words.
        prompt_tuning_init_text: for TEXT, the text; it is cut or repeated to the number of tokens.
        tokenizer_name_or_path, tokenizer_kwargs: for TEXT, the tokenizer and options of AutoTokenizer.from_pretrained; trust_remote_code is left out,
            so that no file can run code.
    """

    prompt_tuning_init: str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, object] | None = None

    TYPE: ClassVar[PeftType | None] = PeftType.PROMPT_TUNING
    INITS: ClassVar[tuple[str, ...]] = tuple(PromptTuningInit)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if is_text and not self.tokenizer_name_or_path:
            raise ConfigError(
                f"When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be {self.tokenizer_name_or_path}",
                remedy="It names the tokenizer.",
            )
        if is_text and self.prompt_tuning_init_text is None:
            raise ConfigError(
                "When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None", remedy="It is the text."
            )
        if self.tokenizer_kwargs and not is_text:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'", remedy="Remove them.")

    def validate(self) -> None:
        super().validate()
        check_name("prompt_tuning_init", self.prompt_tuning_init, self.INITS)


class PromptEmbedding(VirtualTokens):
    """The vectors themselves: `embedding.weight` [tokens, dim], tokens counted once for each transformer."""

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        assert config.token_dim  # it has been completed from the model
        self.embedding = nn.Embedding(config.vectors, config.token_dim)
        ids = None if config.inference_mode else _start(config, config.vectors, word_embeddings)
        if ids is not None:
            with torch.no_grad():
                words = word_embeddings(ids.to(next(word_embeddings.parameters()).device))
            self.embedding.weight = nn.Parameter(words.float().clone())

    def forward(self, indices: Tensor) -> Tensor:
        """Indices [b, t] -> vectors [b, t, dim]."""
        return self.embedding(indices)


def _start(config: PromptTuningConfig, total: int, words: Any) -> Tensor | None:
    """The words that the vectors start from, [total], or None for random numbers."""
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return torch.randint(0, words.num_embeddings, (total,))
    if config.prompt_tuning_init != PromptTuningInit.TEXT:
        return None
    from transformers import AutoTokenizer

    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    ids = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)(config.prompt_tuning_init_text)[
        "input_ids"
    ]
    if not ids:
        raise ConfigError("prompt_tuning_init_text has no tokens", remedy="Give a text of a word or more.")
    return torch.tensor([ids[i % len(ids)] for i in range(total)])

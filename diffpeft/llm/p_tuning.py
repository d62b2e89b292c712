"""P-tuning: a prompt whose vectors a small network makes, P = MLP(E) or MLP(LSTM(E)).  Liu et al. 2021, arXiv:2103.10385."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from diffpeft.errors import ConfigWarning
from diffpeft.llm.prompt import PromptLearningConfig, VirtualTokens, check_name
from diffpeft.methods.peft_config import PeftType

MLP_LAYERS = 2


class PromptEncoderReparameterizationType(StrEnum):
    """Which network."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """How to make a prompt encoder. Names, meanings and defaults are PEFT's.

    Args:
        encoder_reparameterization_type: a PromptEncoderReparameterizationType.
        encoder_hidden_size: width of the network; None: token_dim.
        encoder_num_layers, encoder_dropout: of the LSTM; the MLP always has 2 hidden layers and no dropout.
    """

    encoder_reparameterization_type: str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = MLP_LAYERS
    encoder_dropout: float = 0.0

    TYPE: ClassVar[PeftType | None] = PeftType.P_TUNING

    def validate(self) -> None:
        super().validate()
        kinds = tuple(PromptEncoderReparameterizationType)
        check_name("encoder_reparameterization_type", self.encoder_reparameterization_type, kinds)


class PromptEncoder(VirtualTokens):
    """`embedding` [tokens, dim], then `lstm_head` (both directions) if there is one, then `mlp_head`; in inference mode the embedding alone."""

    lstm_head: nn.LSTM | None

    def __init__(self, config: PromptEncoderConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        dim, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        assert dim and hidden  # they have been completed from the model
        self.embedding = nn.Embedding(config.vectors, dim)
        self.lstm_head = None
        if config.inference_mode:
            return
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                dim,
                hidden,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            widths = [2 * hidden, 2 * hidden, dim]
        else:
            if config.encoder_num_layers != MLP_LAYERS:
                warnings.warn(
                    f"for {PromptEncoderReparameterizationType.MLP}, the argument `encoder_num_layers` is ignored. "
                    f"Exactly {MLP_LAYERS} MLP layers are used.",
                    ConfigWarning,
                    stacklevel=2,
                )
            widths = [dim, hidden, hidden, dim]
        layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self, indices: Tensor) -> Tensor:
        """Indices [b, t] -> vectors [b, t, dim]."""
        vectors = self.embedding(indices)
        if self.lstm_head is not None:
            vectors = self.lstm_head(vectors)[0]
        return self.mlp_head(vectors)

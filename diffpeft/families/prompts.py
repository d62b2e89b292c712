"""Prompts as tokens, and what a family's encoders make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.base import Conditions, Family
    from diffpeft.families.parts import Component


def tokens(tokenizer: Component, prompts: Sequence[str], length: int, device: torch.device) -> Tensor:
    """Token ids [b, length] of prompts, filled up or cut off."""
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.to(device)


def embedded(family: Family, prompts: Sequence[str]) -> Conditions:
    """What the denoiser reads of prompts, through all text encoders."""
    return {name: t for encoder in family.text_encoders for name, t in family.embed(encoder, prompts).items()}

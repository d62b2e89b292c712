"""PEFT's class for several methods on one model. Here every PeftModel may have them."""

from __future__ import annotations

from diffpeft.llm.peft_model import PeftModel


class PeftMixedModel(PeftModel):
    """A model with adapters of several methods."""

"""PEFT's name for the module of PeftMixedModel."""

from __future__ import annotations

from diffpeft.llm.peft_model import PeftMixedModel as PeftMixedModel

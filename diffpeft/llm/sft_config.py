"""The options of supervised fine-tuning. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffpeft.train.config import Options, option


@dataclass(repr=False)
class SftConfig(Options):
    """A supervised fine-tuning run. Defaults are QLoRA's (Dettmers et al. 2023, arXiv:2305.14314) where it has one."""

    PRESETS: ClassVar[tuple[str, ...]] = ("all-linear", "default")
    LR: ClassVar[float] = 2e-4

    model: str | None = option(None, "A folder with a language model, a .gguf file, or a Hub id.", required=True)
    data: str | None = option(
        None, "A .jsonl file of rows {messages}, {prompt, completion} or {text}, or a plain text.", required=True
    )
    heldout: str | None = option(None, "Such a file that is not trained on: its loss is measured before and after.")
    targets: str | Sequence[str] = option(
        "all-linear",
        "Which layers: all-linear, default (PEFT's for the model), names with commas, or a regular expression for whole names.",
    )
    batch_size: int = option(4, "Sequences a pass.", at_least=1)
    max_length: int = option(512, "Tokens of a sequence; what is longer is cut.", at_least=2)
    packing: bool = option(False, "Put several rows into a sequence instead of padding.")
    loss: str = option("completion", "What is learnt: answers only, or prompts too.", choices=("completion", "all"))
    samples: int = option(3, "How many answers to show before and after in the report.", at_least=0)

"""Which captions a model's tokenizers would cut. They are loaded without the model, and without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpeft.families.parts import Component

INDEX = "model_index.json"


def tokenizers_of(model: str) -> list[Component]:
    """The tokenizers of a diffusers folder, or of a Hub id that is on this machine; none where they cannot be had."""
    folder = Path(model)
    if not (folder / INDEX).is_file():
        return []
    try:
        import transformers

        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        classes = {name: entry[1] for name, entry in index.items() if name.startswith("tokenizer") and entry[1]}
        loaded = [getattr(transformers, kind).from_pretrained(folder / name) for name, kind in classes.items()]
        return [getattr(tokenizer, "tokenizer", tokenizer) for tokenizer in loaded]  # some are processors around one
    except Exception:  # libraries raise what they like: loading the model will say what is wrong
        return []


def too_long(captions: Sequence[str], tokenizers: Sequence[Component], most: int | None) -> tuple[list[bool], int]:
    """Which captions every tokenizer would cut, and of how many tokens the longest that is not cut may be.

    `most` is how many are read at most, where that is said. A tokenizer with a beginning of its own (CLIP's) reads in chunks that have room for that
    many words beside beginning and end; others count the end.
    """
    limits = [_limit(tokenizer, most) for tokenizer in tokenizers]
    counts = [
        [len(ids) for ids in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]
        for tokenizer in tokenizers
    ]
    cut = [all(n > limit for n, limit in zip(row, limits, strict=True)) for row in zip(*counts, strict=True)]
    return cut, max(limits, default=0)


def _limit(tokenizer: Component, most: int | None) -> int:
    added = tokenizer.num_special_tokens_to_add()
    if most is None:
        return int(tokenizer.model_max_length) - added
    return most if tokenizer.bos_token_id is not None else most - added

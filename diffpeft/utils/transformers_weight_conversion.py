"""What transformers asks of `peft.utils.transformers_weight_conversion`: how the keys of an adapter's file become the names of tensors in a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from diffpeft.converters.formats.base import suffix
from diffpeft.converters.formats.peft import PREFIX
from diffpeft.layers.carried import ADAPTERS, escaped
from diffpeft.methods.layout import LAYOUTS, Layout
from diffpeft.methods.peft_config import PeftConfig

__all__ = ["build_peft_weight_mapping"]


def build_peft_weight_mapping(
    weight_conversions: Sequence[object] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[object]:
    """Renamings of transformers that put the tensors of an adapter's file into the adapter of this name, before those of the model itself.

    What changes tensors, as where experts are stacked, is left out: a PeftModel reads such files.
    """
    from transformers.core_model_loading import WeightRenaming

    names = [("^" + re.escape(PREFIX), "")]
    held = f".{ADAPTERS}.{escaped(adapter_name)}."
    for method, layout in LAYOUTS.items():
        if layout.peft and (peft_config is None or layout.peft == peft_config.peft_type):
            names += [(re.escape(f".{key}") + "$", held + role) for key, role in _keys(method, layout)]
    of_model = [renaming for renaming in weight_conversions or () if isinstance(renaming, WeightRenaming)]
    return [*(WeightRenaming(*pair) for pair in dict.fromkeys(names)), *of_model]


def _keys(method: str, layout: Layout) -> Iterator[tuple[str, str]]:
    """(what follows a layer in PEFT's key, role) of a method's tensors."""
    for role in layout.roles:
        yield suffix(role, method), role

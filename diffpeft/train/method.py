"""The methods that can be trained, and a method's config from the options of a run. No torch is imported before a config is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffpeft.train.config import Options

# The methods that images can be trained with, with keywords of attach: rotations turn the output, as in the files that image programs read.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "loha": {},
    "lokr": {},
    "oft": {"side": "output"},
    "boft": {"side": "output"},
}


def _methods() -> Any:
    import diffpeft.methods

    return diffpeft.methods


def _lora(c: Options) -> dict[str, Any]:
    return {"r": c.rank, "lora_alpha": c.rank if c.alpha is None else c.alpha, "lora_dropout": c.dropout}


def _product(c: Options) -> dict[str, Any]:
    return {"r": c.rank, "alpha": c.rank if c.alpha is None else c.alpha, "rank_dropout": c.dropout}


# A rotation's rank is the size of a block; (IA)^3 has none.
CONFIGS: dict[str, Callable[[Options], Any]] = {
    "lora": lambda c: _methods().LoraConfig(**_lora(c)),
    "dora": lambda c: _methods().LoraConfig(**_lora(c), use_dora=True),
    "loha": lambda c: _methods().LoHaConfig(**_product(c)),
    "lokr": lambda c: _methods().LoKrConfig(**_product(c)),
    "oft": lambda c: _methods().OFTConfig(oft_block_size=c.rank, module_dropout=c.dropout),
    "boft": lambda c: _methods().BOFTConfig(boft_block_size=c.rank, boft_dropout=c.dropout),
    "ia3": lambda c: _methods().IA3Config(),
}
# Methods whose rank is that of a matrix: one above both its sides adds parameters and nothing else. (A LoKr of high rank has a full factor.)
RANKED = ("lora", "dora", "loha")

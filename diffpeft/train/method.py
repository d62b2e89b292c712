"""A method's config from the options of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffpeft.methods import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from diffpeft.train.config import Options


def _lora(c: Options) -> dict[str, Any]:
    return {"r": c.rank, "lora_alpha": c.rank if c.alpha is None else c.alpha, "lora_dropout": c.dropout}


def _product(c: Options) -> dict[str, Any]:
    return {"r": c.rank, "alpha": c.rank if c.alpha is None else c.alpha, "rank_dropout": c.dropout}


# A rotation's rank is the size of a block; (IA)^3 has none.
CONFIGS: dict[str, Callable[[Options], Any]] = {
    "lora": lambda c: LoraConfig(**_lora(c)),
    "dora": lambda c: LoraConfig(**_lora(c), use_dora=True),
    "loha": lambda c: LoHaConfig(**_product(c)),
    "lokr": lambda c: LoKrConfig(**_product(c)),
    "oft": lambda c: OFTConfig(oft_block_size=c.rank, module_dropout=c.dropout),
    "boft": lambda c: BOFTConfig(boft_block_size=c.rank, boft_dropout=c.dropout),
    "ia3": lambda c: IA3Config(),
}

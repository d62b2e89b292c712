"""What the fields of an `adapter_config.json` may hold: for each field what is allowed. Whoever reads a config asks here before a field is used.

Fields that are not listed pass: files of other versions have more. That a value is allowed says nothing about the tensors beside it.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffpeft.errors import CheckpointError, NonFiniteError, joined
from diffpeft.methods.layout import LAYOUTS

MAX_RANK, MAX_SIZE, MAX_NAMES, MAX_TEXT = 1 << 16, 1 << 20, 1 << 16, 20_000
MAX_TERMS = 100  # of a rotation's series, which is work for every step
MAX_RANGES, MAX_LAYERS = 256, 512  # of layer_replication, and of the model that it makes
_SURROGATE = re.compile("[\ud800-\udfff]")
_GREATEST = 3.4028234663852886e38  # of float32, in which alphas act

Config = Mapping[str, Any]  # fields of an adapter_config.json, once `check_fields` has looked at them


@dataclass(frozen=True)
class Kind:
    """What a field may hold: in words, and as a test."""

    what: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        """Either of two kinds."""
        return Kind(f"{self.what} or {other.what}", lambda value: self.holds(value) or other.holds(value))


def whole(least: int, most: int) -> Kind:
    """A whole number in a range; true and false are none."""
    return Kind(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def number(least: float = -_GREATEST, most: float = _GREATEST) -> Kind:
    """A finite number in a range."""
    what = "a finite number" if least == -_GREATEST else f"a number from {least:g} to {most:g}"
    return Kind(what, lambda v: type(v) in (int, float) and least <= v <= most)


def text(most: int) -> Kind:
    """Characters that can be written: half of a pair of surrogates cannot."""
    return Kind(
        f"a text of at most {most} characters",
        lambda v: isinstance(v, str) and len(v) <= most and (v.isascii() or not _SURROGATE.search(v)),
    )


def several(kind: Kind, most: int = MAX_NAMES) -> Kind:
    """A list of what is of a kind."""
    is_list = lambda v: isinstance(v, (list, tuple, set, frozenset)) and len(v) <= most  # noqa: E731
    return Kind(f"a list of at most {most}, each {kind.what}", lambda v: is_list(v) and all(map(kind.holds, v)))


def by_name(kind: Kind) -> Kind:
    """A table of what is of a kind."""
    is_table = lambda v: isinstance(v, Mapping) and len(v) <= MAX_NAMES  # noqa: E731
    return Kind(
        f"a table from names to {kind.what}",
        lambda v: is_table(v) and all(map(TEXT.holds, v)) and all(map(kind.holds, v.values())),
    )


def _is_replication(value: Sequence[Sequence[int]]) -> bool:
    """Whether it is a list of (first, end), and these are not endless."""
    if not PAIRS.holds(value) or any(len(pair) != 2 for pair in value):
        return False
    return sum(max(end - start, 0) for start, end in value) <= MAX_LAYERS


NOTHING = Kind("null", lambda v: v is None)
FLAG = Kind("true or false", lambda v: v is None or type(v) is bool)
TEXT = text(MAX_TEXT)
WORD = text(200)
TABLE = Kind("a table", lambda v: isinstance(v, Mapping))
RANK, SIZE, COUNT = whole(1, MAX_RANK), whole(1, MAX_SIZE), whole(0, MAX_SIZE)
SHARE, ALPHA = number(0, 1), number()
NAMES = several(TEXT) | NOTHING
PATTERN = TEXT | NAMES  # one expression, or names
NUMBERS = several(COUNT)
PAIRS = several(several(whole(0, MAX_SIZE), 2), MAX_RANGES)
REPLICATION = Kind(
    f"a list of at most {MAX_RANGES} pairs (first layer, end), for at most {MAX_LAYERS} layers", _is_replication
)

_WORDS = {
    "flag": FLAG,
    "count": COUNT,
    "number": ALPHA,
    "word": WORD,
    "numbers": by_name(ALPHA) | NOTHING,
}  # of methods.layout.Field.kind
_COMMON = {
    "peft_type": WORD | NOTHING,
    "task_type": WORD | NOTHING,
    "peft_version": WORD | NOTHING,
    "auto_mapping": TABLE | NOTHING,
    "base_model_name_or_path": TEXT | NOTHING,
    "revision": TEXT | NOTHING,
    "inference_mode": FLAG,
}
_LAYERS = {
    "target_modules": PATTERN,
    "exclude_modules": PATTERN,
    "modules_to_save": NAMES,
    "layers_to_transform": COUNT | NUMBERS | NOTHING,
    "layers_pattern": PATTERN,
    "fan_in_fan_out": FLAG,
    "bias": WORD,
    "r": RANK,
    "rank_pattern": by_name(RANK) | NOTHING,
    "alpha_pattern": by_name(ALPHA) | NOTHING,
    "init_weights": FLAG | WORD,
}
_LORA = {
    "lora_alpha": ALPHA,
    "lora_bias": FLAG,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "use_qalora": FLAG,
    "qalora_group_size": SIZE,
    "init_lora_weights": FLAG | WORD,
    "trainable_token_indices": NUMBERS | by_name(NUMBERS) | NOTHING,
    "target_parameters": NAMES,
    "layer_replication": REPLICATION | NOTHING,
    "loftq_config": TABLE | NOTHING,
    "megatron_config": TABLE | NOTHING,
    "megatron_core": TEXT | NOTHING,
    "alora_invocation_tokens": NUMBERS | NOTHING,
    "ensure_weight_tying": FLAG,
}
_ADALORA = {
    "init_r": RANK,
    "target_r": RANK,
    "tinit": COUNT,
    "tfinal": COUNT,
    "deltaT": COUNT,
    "beta1": SHARE,
    "beta2": SHARE,
    "orth_reg_weight": ALPHA,
    "total_step": whole(1, 1 << 53) | NOTHING,
}
_PRODUCTS = {
    "alpha": ALPHA,
    "use_effective_conv2d": FLAG,
    "rank_dropout_scale": FLAG,
    "decompose_both": FLAG,
    "decompose_factor": whole(-1, -1) | SIZE,
}
_ROTATIONS = {
    "oft_block_size": whole(0, MAX_RANK),
    "coft": FLAG,
    "eps": number(0, 1),
    "block_share": FLAG,
    "use_cayley_neumann": FLAG,
    "num_cayley_neumann_terms": whole(0, MAX_TERMS),
    "boft_block_size": whole(0, MAX_RANK),
    "boft_block_num": COUNT,
    "boft_n_butterfly_factor": whole(0, 64),
}
_IA3 = {"feedforward_modules": PATTERN, "init_ia3_weights": FLAG}
_SIZED = [layout for layout in LAYOUTS.values() if layout.patterns not in ("", "rank_pattern")]
_METHODS = {
    **{layout.rank_field: SIZE for layout in _SIZED},
    **{layout.patterns: by_name(SIZE) | NOTHING for layout in _SIZED},
    **{name: SHARE for layout in LAYOUTS.values() for name in layout.dropouts if name.endswith("_dropout")},
    **{row.name: _WORDS[row.kind] for layout in LAYOUTS.values() for row in layout.fields},
}
_PROMPTS = {
    "num_virtual_tokens": SIZE | NOTHING,
    "token_dim": SIZE | NOTHING,
    "num_transformer_submodules": whole(1, 64) | NOTHING,
    "num_attention_heads": whole(1, MAX_RANK) | NOTHING,
    "num_layers": whole(1, MAX_LAYERS) | NOTHING,
    "prompt_tuning_init": WORD | NOTHING,
    "prompt_tuning_init_text": TEXT | NOTHING,
    "prompt_tuning_init_state_dict_path": TEXT | NOTHING,
    "prompt_tuning_init_task": COUNT | NOTHING,
    "tokenizer_name_or_path": TEXT | NOTHING,
    "tokenizer_kwargs": TABLE | NOTHING,
    "num_ranks": RANK | NOTHING,
    "num_tasks": SIZE | NOTHING,
    "encoder_reparameterization_type": WORD,
    "encoder_hidden_size": SIZE | NOTHING,
    "encoder_num_layers": whole(1, MAX_LAYERS),
    "encoder_dropout": SHARE,
    "prefix_projection": FLAG,
}
FIELDS: dict[str, Kind] = {
    **_COMMON,
    **_LAYERS,
    **_LORA,
    **_ADALORA,
    **_PRODUCTS,
    **_ROTATIONS,
    **_IA3,
    **_METHODS,
    **_PROMPTS,
}
# what a method has under a name of another's
OF_METHOD: dict[str, dict[str, Kind]] = {
    "OFT": {"r": COUNT},  # the number of blocks, or 0
    "ADALORA": {"rank_pattern": by_name(several(FLAG)) | NOTHING, "r": COUNT},  # masks; r means nothing there
}


def check_fields(config: Config, where: object) -> None:
    """Raise CheckpointError if a field of a config holds what it may not: it names the fields, their values and what is allowed.

    Args:
        config: the fields as JSON has them.
        where: whose they are, for the message: the file.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"the config is {told(config)}", where=where, remedy="It is a table of fields.")
    method = config.get("peft_type")
    kinds = {**FIELDS, **OF_METHOD.get(method if isinstance(method, str) else "", {})}
    wrong = [name for name, kind in kinds.items() if name in config and not kind.holds(config[name])]
    if wrong:
        endless = all(isinstance(config[name], float) and not math.isfinite(config[name]) for name in wrong)
        raise (NonFiniteError if endless else CheckpointError)(
            joined((f"{name} is {told(config[name])}" for name in wrong), 5),
            where=where,
            remedy=f"{_allowed(wrong[:5], kinds)}.",
        )


def _allowed(names: Collection[str], kinds: Mapping[str, Kind]) -> str:
    return "; ".join(f"{name} is {kinds[name].what}" for name in names)


def told(value: object) -> str:
    """A value of any size as it may stand in a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of so many digits that Python does not print it
        return "a number of thousands of digits"

"""convert_to_lora, save_as_lora: an adapter of another method as a LoRA and its config. PEFT's names, results and errors."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import io
from diffpeft.converters.formats.peft import PREFIX
from diffpeft.errors import AdapterStateWarning, ConfigError, UnknownNameError, WrongKindError
from diffpeft.layers.carried import base_class, op_of
from diffpeft.layers.slot import Slot
from diffpeft.llm import state
from diffpeft.llm.distributed import unwrapped
from diffpeft.llm.status import Counted
from diffpeft.methods import LoraConfig
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.attach import mixes_of
from diffpeft.model.combine import Update, update_of
from diffpeft.model.state import slots_in, whole_tensors
from diffpeft.model.target import adapted

_OTHERS = "diffpeft.to_lora(model, adapter, name=...) makes a LoRA of any method on any layer."
_BESIDE = {
    "dora": True,
    "adalora": False,
}  # {method: whether PEFT converts it}, where it is not whether it adds to the weight
Factors = tuple[Tensor, Tensor]
CompileOptions = Mapping[str, Any]


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: CompileOptions | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA that is closest to an adapter of another method: its config and {PEFT's key: tensor}. The model stays as it is.

    Args:
        rank: the rank, or the share, above 0 and at most 1, of each layer's squared singular values that is kept.
        progressbar: show one on stderr.
        compile_kwargs: compile the decomposition with these options of `torch.compile`.

    For methods that add to the weights of linear layers (LoRA, LoHa, LoKr, VeRA, C3A ...), and DoRA, which is taken as it acts on the base. The scale is 1.
    Raises ConfigError for a rank that cannot be and for trained biases, WrongKindError (a TypeError) for other methods and layers, UnknownNameError.
    """
    _check_rank(rank)
    wrapper = unwrapped(model)
    base, prefix = (wrapper.get_base_model(), PREFIX) if isinstance(wrapper, Counted) else (wrapper, "")
    old = _config_of(base, adapter_name)
    slots = _convertible(base, adapter_name)
    if old is not None and old.peft_type == PeftType.LORA:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            AdapterStateWarning,
            stacklevel=2,
        )
    decomposed = torch.compile(_decomposed, **compile_kwargs) if compile_kwargs is not None else _decomposed
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, slot in _shown(slots.items(), progressbar):
        A, B = _factors(base, layer, slot, rank, decomposed)
        ranks[layer] = len(A)
        tensors |= {f"{prefix}{layer}.lora_A.weight": A, f"{prefix}{layer}.lora_B.weight": B}
    return _config(old, rank, ranks), tensors | whole_tensors(base, adapter_name, prefix)


def _convertible(base: nn.Module, name: str) -> dict[str, Slot]:
    """{layer: slot} of an adapter that can be converted. Raises WrongKindError."""
    if odd := unconvertible(base, name):
        raise WrongKindError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(odd)}", remedy=_OTHERS
        )
    slots = slots_in(base, name)
    if not slots:
        raise WrongKindError("Could not detect any layer that supports LoRA conversion", remedy=_OTHERS)
    return slots


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: CompileOptions | None = None,
) -> None:
    """`convert_to_lora` into a folder, which is made, as an adapter that PEFT loads."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    with io.folder(Path(path)) as staged:
        state.write(staged, tensors, config)


def unconvertible(model: nn.Module, name: str) -> list[str]:
    """The classes of the modules on which an adapter is of a kind that `convert_to_lora` does not take."""
    odd = []
    for _, module, record in adapted(model):
        slot = record.slots.get(name)
        if name in record.patches or (slot is not None and not _is_sum(module, slot)):
            odd.append(base_class(module).__name__)
    return list(dict.fromkeys(odd))


def _is_sum(module: nn.Module, slot: Slot) -> bool:
    """Whether an adapter adds something to the weight of a linear layer."""
    geometry = op_of(module).geometry
    linear = not geometry.kernel and not geometry.lookup
    return linear and bool(slot.parts) and all(_BESIDE.get(p.method.name, p.additive) for p in slot.parts)


def _check_rank(rank: object) -> None:
    """Raise ConfigError for what is no rank and no share."""
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ConfigError(
                f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}"
            )
    elif isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"Passing a rank of {rank!r} doesn't make sense", remedy="Please pass a valid value.")


def _config_of(base: nn.Module, name: str) -> PeftConfig | None:
    """The config of an adapter; None where it was made from none, or there is no adapter at all. Raises ConfigError for one that trains biases."""
    known = {n: adapter for mix in mixes_of({"": base}).values() for n, adapter in mix.adapters.items()}
    if known and name not in known:
        raise UnknownNameError.of("adapter", name, known)
    config = state.config_of(base, name) if known and state.CONFIG in known[name].metadata else None
    bias = "none" if config is None else config.bias if config.bias != "none" else getattr(config, "lora_bias", False)
    if bias not in ("none", False):
        raise ConfigError(
            f"The adapter's config sets bias={bias}, this is not supported right now",
            remedy="diffpeft.to_lora keeps biases.",
        )
    return config


def _shown(items: Iterable[tuple[str, Slot]], bar: bool) -> Iterable[tuple[str, Slot]]:
    from tqdm import tqdm

    shown_items: Iterable[tuple[str, Slot]] = tqdm(list(items), disable=not bar, desc="Converting to LoRA")
    return shown_items


@torch.no_grad()
def _factors(
    model: nn.Module, layer: str, slot: Slot, rank: int | float, decomposed: Callable[[Tensor], tuple[Tensor, ...]]
) -> Factors:
    """A [r, in] and B [out, r] that are closest to what an adapter adds to a layer, in the adapter's dtype. Raises ConfigError for too high a rank."""
    update: Update = update_of(model.get_submodule(layer), slot)
    U, S, Vh = decomposed(update.delta.float())
    r = rank if isinstance(rank, int) else _rank_of(S, rank)
    if r > len(S):
        raise ConfigError(
            f"The chosen rank {r} is larger than the weight shape ({len(S)}), please choose a lower rank", where=layer
        )
    dtype = slot.weight.dtype
    return Vh[:r].to(dtype).contiguous(), (U[:, :r] * S[:r]).to(dtype).contiguous()


def _decomposed(delta: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.svd(delta, full_matrices=False))


def _rank_of(S: Tensor, share: float) -> int:
    """The least rank whose singular values have this share of the sum of all squares."""
    energy = S.square().cumsum(0)
    return int(torch.searchsorted(energy, share * energy[-1])) + 1


def _config(old: PeftConfig | None, rank: int | float, ranks: Mapping[str, int]) -> LoraConfig:
    """The config of a LoRA with these ranks on layers; what it may take from the adapter's, it takes. Scales are 1."""
    targets = None if old is None else copy.copy(old.target_modules)
    r = rank if isinstance(rank, int) else 1
    other = ranks if isinstance(targets, str) else {layer: n for layer, n in ranks.items() if n != rank}
    if not isinstance(targets, str):
        targets = [*dict.fromkeys((*(targets or ()), *(layer for layer in ranks if old is None or layer not in other)))]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=targets, rank_pattern=dict(other), alpha_pattern=dict(other))
    if old is not None:
        config.task_type, config.base_model_name_or_path = old.task_type, old.base_model_name_or_path
        config.layers_pattern, config.layers_to_transform = old.layers_pattern, old.layers_to_transform
        config.modules_to_save = copy.copy(old.modules_to_save)
        config.trainable_token_indices = copy.copy(old.trainable_token_indices)
    return config

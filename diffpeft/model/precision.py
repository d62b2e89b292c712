"""In which dtype an adapter's tensors are, and where: PEFT's rules for `autocast_adapter_dtype` and `low_cpu_mem_usage`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpeft.layers.carried import op_of
from diffpeft.layers.patches import Patch
from diffpeft.layers.tokens import Tokens
from diffpeft.model.patches import numbers_of
from diffpeft.model.plan import Plan


@dataclass(frozen=True)
class Precision:
    """How adapters are kept.

    Args:
        autocast: in float32 where the weight that they are for has fewer bits; else in that weight's dtype.
        empty: on the meta device, until they are loaded.
        empty_rows: rows of embeddings too, which else start as the table's.
    """

    autocast: bool = True
    empty: bool = False
    empty_rows: bool = False

    def settle(self, layers: Mapping[str, nn.Module], adapters: Mapping[str, nn.Module]) -> None:
        """Put fresh adapters on layers, {name: layer} and {name: its adapter}, into their dtype."""
        for name, adapter in adapters.items():
            self._settle(adapter, op_of(layers[name]).parameter)

    def settle_patches(self, patches: Mapping[str, tuple[nn.Module, Patch]]) -> None:
        """Put patches into the dtype of the first parameter that they change."""
        for module, patch in patches.values():
            weight = numbers_of(module, patch.names[0])
            if isinstance(patch, Tokens):
                patch.to("meta" if self.empty_rows else None, self.dtype_for(weight))
            else:
                self._settle(patch, weight)

    def _settle(self, adapter: nn.Module, weight: torch.Tensor) -> None:
        adapter.to("meta") if self.empty else adapter.to(self.dtype_for(weight))

    def dtype_for(self, weight: torch.Tensor) -> torch.dtype:
        """The dtype of an adapter on a weight; on quantised ones float32."""
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        return torch.float32 if self.autocast and dtype.itemsize < 4 else dtype


AUTOCAST, PLAIN = Precision(), Precision(autocast=False)  # in PeftModels, and on bare modules


def plan_into(plan: Plan, adapter: nn.Module, name: str, new: torch.Tensor, weight: Any) -> None:
    """Plan to put numbers into a tensor of an adapter for a weight; one that is on the meta device is replaced."""
    path, _, last = name.rpartition(".")
    owner = adapter.get_submodule(path)
    table: Any = owner._parameters if last in owner._parameters else owner._buffers
    before = table[last]
    if not before.is_meta:
        plan.fill(before, new)
        return
    fresh = new.detach().to(weight.device, PLAIN.dtype_for(weight) if new.is_floating_point() else None, copy=True)
    is_parameter = table is owner._parameters
    plan.entry(table, last, nn.Parameter(fresh, requires_grad=before.requires_grad) if is_parameter else fresh)

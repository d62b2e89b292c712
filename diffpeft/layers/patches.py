"""Modules whose parameters adapters change: rows of a table (tokens.py), or a whole parameter that no layer kind knows (parameters.py).

A patch is what one adapter does to one module. It takes the way of modules that are trained in copies (whole.py): the class is swapped, strengths
come from the mix, and a batch may have a mix for each row. The module's forward runs on a stand-in that differs from it in a few parameters, so
that threads never see each other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, NonFiniteError, shown
from diffpeft.layers.whole import Copies

Steps = Sequence[tuple["Patch", float]]


class Patch(nn.Module):
    """One adapter on one module; it owns its tensors, and its state dict has PEFT's keys."""

    commutes: ClassVar[bool] = False  # whether patches of this kind give the same in any order
    names: tuple[str, ...]  # of the parameters that it changes

    def changed(self, name: str, W: Tensor, s: float) -> Tensor:
        """A parameter at strength s, in the dtype of W: W + s (f(W) - W)."""
        raise NotImplementedError

    @classmethod
    def run(cls, module: Any, base: Any, steps: Steps, args: Any, kwargs: Any) -> Any:
        """The module's forward (of its class `base`) with these patches in order."""
        names = dict.fromkeys(name for patch, _ in steps for name in patch.names)
        return base.forward(stand_in(module, base, {n: patched(module, n, steps) for n in names}), *args, **kwargs)


@dataclass(frozen=True)
class Patches(Copies):
    """The patches of one module by adapter name, all of a kind; `index` is the module's column in the mix.

    A module whose parameter is another's (a tied head) has the same patches as that one; there they are hidden, so that they count once.
    """

    index: int = 0
    base: Mapping[str, Tensor] = field(default_factory=dict)  # with adapters fused: the parameters as they were

    def acting(self, choice: Any) -> list[tuple[Patch, float]]:
        return [step for name, step in self._steps(choice) if name not in self.fused and step[1] != 0]

    def run(self, module: Any, base: Any, acting: Any, args: Any, kwargs: Any) -> Any:
        if not acting:
            return base.forward(module, *args, **kwargs)
        return type(acting[0][0]).run(module, base, acting, args, kwargs)

    def merged(self, module: nn.Module, order: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        strengths = {name: s for name, (_, s) in self._steps(self.mix.choice)}
        steps = [(self._patch(name), strengths.get(name, 1.0)) for name in order if name in self.modules]
        return self.unfused(module)[1] + self._filled(module, steps)

    def with_fused(self, module: Any, names: Sequence[str], keep: bool) -> tuple[Patches, list[Any]]:
        """These patches with exactly `names` of them in the parameters, and [(parameter, its new numbers)]. Raises AdapterStateError or NonFiniteError."""
        order = [name for name, _ in self._steps(self.mix.choice)]
        own = [name for name in names if name in self.modules]
        first: Any = self._patch(own[0])
        if order[: len(own)] != own and not first.commutes:
            raise AdapterStateError(
                f"on {self._where} the adapters {', '.join(order)} act in this order, and {shown(own[0])} does not commute",
                remedy="Fuse them from the first on, or all of them.",
            )
        self.unfused(module)  # there is a base to start from
        steps = [step for name, step in self._steps(self.mix.choice) if name in own]
        pairs = self._filled(module, steps)
        touched = dict.fromkeys(n for name in self.modules for n in self._patch(name).names)
        held = {n: self.base.get(n, module._parameters[n].data) for n in touched}
        kept = {n: t.to("cpu") for n, t in held.items()} if keep else {}
        return replace(self, fused=frozenset(own), base=kept), pairs

    def unfused(self, module: Any) -> tuple[Patches, list[Any]]:
        """These patches with nothing in the parameters, and [(parameter, its old numbers)]."""
        if not self.fused:
            return self, []
        if not self.base:
            raise AdapterStateError(
                f"{self._where} was fused with keep_base='none'", remedy="Load the model again to get its own weights."
            )
        pairs = [(module._parameters[n], old.to(module._parameters[n])) for n, old in self.base.items()]
        return replace(self, fused=frozenset(), base={}), pairs

    def _steps(self, choice: Any) -> list[tuple[str, tuple[Patch, float]]]:
        return [
            (name, (self._patch(name), choice.strengths[name][self.index]))
            for name in choice.order
            if name in self.modules
        ]

    def _patch(self, name: str) -> Any:
        return self.modules[name]

    @property
    def _where(self) -> str:
        return f"module {shown(self.mix.layers[self.index])}"

    def _filled(self, module: Any, steps: Steps) -> list[tuple[Tensor, Tensor]]:
        """[(parameter, its numbers with the steps in them)], computed in fp32 or better from the base and rounded once."""
        pairs = []
        for name in dict.fromkeys(n for patch, _ in steps for n in patch.names):
            parameter = module._parameters[name]
            if type(parameter.data) is not Tensor or parameter.is_meta or hasattr(module, "_hf_hook"):
                raise AdapterStateError(
                    f"{self._where} cannot be fused: its {name} is offloaded or sharded",
                    remedy="Leave the adapter unfused; it acts all the same.",
                )
            before = self.base.get(name, parameter.data).to(parameter.device)
            with torch.no_grad():
                W = before.to(torch.promote_types(parameter.dtype, torch.float32))
                for patch, s in steps:
                    W = patch.changed(name, W, s) if name in patch.names and s else W
                W = W.to(parameter.dtype)
            if not bool(W.isfinite().all()):
                raise NonFiniteError(
                    f"NaNs detected in the merged weights: {self._where} would get a {name} that is not finite",
                    remedy="An adapter seems to be broken, or too strong for the dtype.",
                )
            pairs.append((parameter, W.clone() if W.data_ptr() == before.data_ptr() else W))
        return pairs


def patched(module: Any, name: str, steps: Steps) -> Tensor:
    """A parameter with these patches in it, in its own dtype."""
    W = module._parameters[name]
    for patch, s in steps:
        if name in patch.names:
            W = patch.changed(name, W, s)
    return W


def stand_in(module: Any, base: Any, parameters: Mapping[str, Any], **attributes: Any) -> Any:
    """A module of the class `base` that shares everything with `module` but these parameters and attributes."""
    other = base.__new__(base)
    other.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters}, **attributes)
    return other

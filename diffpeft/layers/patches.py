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
from diffpeft.layers.whole import Copies, Put, bare

Steps = Sequence[tuple["Patch", float]]


class Patch(nn.Module):
    """One adapter on one module; it owns its tensors, and its state dict has PEFT's keys."""

    commutes: ClassVar[bool] = False  # whether patches of this kind give the same in any order
    shows: ClassVar[bool] = (
        False  # whether who reads a parameter of the module gets it changed (in PEFT only rows of tables do)
    )
    names: tuple[str, ...]  # of the parameters that it changes

    def changed(self, name: str, W: Tensor, s: float) -> Tensor:
        """A parameter at strength s, in the dtype of W: W + s (f(W) - W)."""
        raise NotImplementedError

    def overlaps(self, other: Any) -> bool:
        """Whether both set the same numbers, so that the later one would win."""
        return False

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
    parted: Mapping[str, Any] = field(
        default_factory=dict
    )  # and those that it shared with a module that they do not change

    def clashing(self, one: str, other: str) -> bool:
        return self._patch(one).overlaps(self._patch(other))

    def acting(self, choice: Any) -> list[tuple[Patch, float]]:
        return [step for name, step in self._steps(choice) if name not in self.fused and step[1] != 0]

    def run(self, module: Any, base: Any, acting: Any, args: Any, kwargs: Any) -> Any:
        plain = bare(module)
        if not acting:
            return base.forward(plain, *args, **kwargs)
        return type(acting[0][0]).run(plain, base, acting, args, kwargs)

    def attribute(self, module: nn.Module, acting: Any, name: str) -> Any:
        if any(patch.shows and name in patch.names for patch, _ in acting or ()):
            return module._parameters[name] if module._parameters[name].is_meta else patched(module, name, acting)  # type: ignore[union-attr]
        return super().attribute(module, None, name)

    def merged(self, module: Any, choice: Any) -> list[Put]:
        steps = [step for _, step in self._steps(choice) if step[1] != 0]
        return self.unfused(module)[1] + self._filled(module, steps)

    def with_fused(self, module: Any, names: Sequence[str], keep: bool, choice: Any) -> tuple[Patches, list[Put]]:
        """These patches with exactly `names` of them in the parameters, as strong as in a choice, and the new numbers.

        Raises AdapterStateError or NonFiniteError.
        """
        order = [name for name, _ in self._steps(choice)]
        own = [name for name in names if name in self.modules]
        first: Any = self._patch(own[0])
        if order[: len(own)] != own and not first.commutes:
            raise AdapterStateError(
                f"on {self.where} the adapters {', '.join(order)} act in this order, and {shown(own[0])} does not commute",
                remedy="Fuse them from the first on, or all of them.",
            )
        self.unfused(module)  # there is a base to start from
        steps = [step for name, step in self._steps(choice) if name in own]
        puts = self._filled(module, steps)
        touched = dict.fromkeys(n for name in self.modules for n in self._patch(name).names)
        held = {n: self.base.get(n, module._parameters[n].data) for n in touched}
        kept = {n: t.to("cpu") for n, t in held.items()} if keep else {}
        return replace(self, fused=frozenset(own), base=kept), puts

    def apart(self, module: nn.Module, parted: Mapping[tuple[int, str], Any]) -> Patches:
        """These patches, which know the parameters that the module shared until they were fused. `parted` as `spread` gives it."""
        table = module._parameters
        new = {name: parted[id(table), name] for name in table if (id(table), name) in parted}
        return replace(self, parted={**new, **self.parted})

    def unfused(self, module: Any) -> tuple[Patches, list[Put]]:
        """These patches with nothing in the parameters, and what these were: old numbers, or the shared parameter."""
        if not self.fused:
            return self, []
        if not self.base:
            raise AdapterStateError(
                f"{self.where} was fused with keep_base='none'", remedy="Load the model again to get its own weights."
            )
        self._refuse_changed(module)
        table = module._parameters
        puts = [(table, n, self.parted[n] if n in self.parted else old.to(table[n])) for n, old in self.base.items()]
        return replace(self, fused=frozenset(), base={}, parted={}), puts

    def _refuse_changed(self, module: Any) -> None:
        """Raise AdapterStateError if a parameter is no longer what fusing made of it, as far as that can be told: where it is, in the dtype that it had."""
        steps = [step for name, step in self._steps(self.mix.choice) if name in self.fused]
        held = {n: module._parameters[n] for n in self.base}
        if hasattr(module, "_hf_hook") or any(p.is_meta or p.dtype != self.base[n].dtype for n, p in held.items()):
            return
        for table, name, new in self._filled(module, steps):
            if not torch.equal(table[name].data, new):
                raise AdapterStateError(
                    f"the {name} of {self.where} was changed while adapters were fused into it",
                    remedy="Undo that change, or load the model again: unfusing would put back what was there before.",
                )

    def _steps(self, choice: Any) -> list[tuple[str, tuple[Patch, float]]]:
        return [
            (name, (self._patch(name), choice.strengths[name][self.index]))
            for name in choice.order
            if name in self.modules
        ]

    def _patch(self, name: str) -> Any:
        return self.modules[name]

    @property
    def where(self) -> str:
        return f"module {shown(self.mix.layers[self.index])}"

    def _filled(self, module: Any, steps: Steps) -> list[Put]:
        """The parameters' numbers with the steps in them, computed in fp32 or better from the base and rounded once."""
        puts: list[Put] = []
        for name in dict.fromkeys(n for patch, _ in steps for n in patch.names):
            parameter = module._parameters[name]
            if type(parameter.data) is not Tensor or parameter.is_meta or hasattr(module, "_hf_hook"):
                raise AdapterStateError(
                    f"{self.where} cannot be fused: its {name} is offloaded or sharded",
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
                    f"NaNs detected in the merged weights: {self.where} would get a {name} that is not finite",
                    remedy="An adapter seems to be broken, or too strong for the dtype.",
                )
            puts.append((module._parameters, name, W.clone() if W.data_ptr() == before.data_ptr() else W))
        return puts


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

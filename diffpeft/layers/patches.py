"""Other numbers for a module's parameters: rows of a table (tokens.py), or a whole parameter that no layer kind knows (parameters.py).

A patch is what one adapter does to parameters of one module. Where nothing but patches acts, the module's forward runs on a stand-in that differs from
it in a few parameters, so that threads never see each other's. Beside slots, on a layer, a patch is a link of the layer's chain (chain.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from diffpeft.layers.chain import Chained, Given, Later, Other
from diffpeft.layers.swap import Class

Steps = Sequence[tuple["Patch", float]]


class Patch(nn.Module, Other):
    """One adapter on one module; it owns its tensors, and its state dict has PEFT's keys."""

    commutes: ClassVar[bool] = False  # whether it gives the same before and after whatever is added to a weight
    shows: ClassVar[bool] = (
        False  # whether who reads a parameter of the module gets it changed (in PEFT only rows of tables do)
    )
    names: tuple[str, ...]  # of the parameters that it changes

    def changed(self, name: str, W: Tensor, s: float) -> Tensor:
        """A parameter at strength s, in the dtype of W: W + s (f(W) - W)."""
        raise NotImplementedError

    def after(self, before: Chained, x: Tensor, s: float, bias: bool) -> Tensor:
        """What a layer gives for x with this patch of its weight after what was `before`."""
        raise NotImplementedError

    def whole(self, W: Tensor) -> bool:
        """Whether a parameter that is read, and the tensors of the patch, are all there, and not shares of some."""
        return True

    def overlaps(self, other: Patch) -> bool:
        """Whether both set the same numbers, so that the later one would win."""
        return False

    @classmethod
    def run(
        cls,
        module: nn.Module,
        base: Class,
        steps: Sequence[tuple[Any, float]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> object:
        """The module's forward (of its class `base`) with these patches in order."""
        names = dict.fromkeys(name for patch, _ in steps for name in patch.names)
        module, base = unparametrised(module, base)
        numbers = {name: patched(cast(Tensor, module._parameters[name]), name, steps) for name in names}
        return base.forward(stand_in(module, base, numbers), *args, **kwargs)

    def link(self, before: Chained, s: Given) -> Patched:
        """The layer with this patch as the last of a chain, at a strength that is a number now (acting.py asks at each call)."""
        assert isinstance(s, float)
        return Patched(before, self, s)


class Patched(Later):
    """A layer with a patch of its weight."""

    def __init__(self, before: Chained, patch: Patch, s: float):
        super().__init__(before)
        self.patch, self.s = patch, s

    def weight(self) -> Tensor:
        W = self.op.stored(self.before.weight())
        return self.op.canonical(self.patch.changed("weight", W, self.s))

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        return self.patch.after(self.before, x, self.s, bias)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]:
    """The input, and the other arguments of a forward."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def patched(W: Tensor, name: str, steps: Steps) -> Tensor:
    """A parameter with these patches in it, in its own dtype."""
    for patch, s in steps:
        if name in patch.names:
            W = patch.changed(name, W, s)
    return W


def parametrised(module: nn.Module) -> list[str]:
    """The parameters of a module that torch's parametrisations work out when they are read."""
    held = module._modules.get("parametrizations")
    return [] if held is None else list(held._modules)


def unparametrised(module: nn.Module, base: Class) -> tuple[nn.Module, Class]:
    """A module of the class `base`, whose parametrised parameters are what is worked out now: as a stand-in of the class that it had before."""
    names = parametrised(module)
    if not names:
        return module, base
    plain = base.__bases__[0]
    return stand_in(module, plain, {name: getattr(module, name) for name in names}), plain


def stand_in(
    module: nn.Module, base: Class, parameters: Mapping[str, Tensor | None], **attributes: object
) -> nn.Module:
    """A module of the class `base` that shares everything with `module` but these parameters and attributes."""
    other = base.__new__(base)
    other.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters}, **attributes)
    for name in parameters:
        other.__dict__.pop(name, None)  # where FSDP 1 puts what it has gathered, and which is found first
    return other

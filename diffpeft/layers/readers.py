"""Modules of PyTorch that read the weights of layers inside them instead of calling these: attention, and the fused kernels of its transformer.

While adapters are inside, such a module's forward runs on a stand-in in which they are in the parameters. Who else reads a parameter gets the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import MixedBatchError
from diffpeft.layers.carried import (
    Copy,
    Parameters,
    Step,
    bare,
    base_class,
    is_adapted,
    put_class,
    record_of,
    with_acting,
)
from diffpeft.layers.mixed import different
from diffpeft.layers.patches import Patch, stand_in
from diffpeft.layers.sites import parameter_names
from diffpeft.layers.swap import Class, subclass
from diffpeft.methods.linalg import wide_dtype

_reading: dict[Class, Class] = {}


def is_reader(module: nn.Module) -> bool:
    """Whether a module is of a kind that reads weights inside it."""
    return isinstance(module, tuple(_GROUNDS))


def reading_class(base: Class) -> Class:
    """The subclass of a reader's class that reads weights with what acts on them."""
    if base not in _reading:
        _reading[base] = subclass(base, reading_class, "_diffpeft_base", forward=reading(base))
    return _reading[base]


def reading(base: Class) -> Callable[..., object] | None:
    """The forward of a reader of this class that reads weights with what acts on them; None for classes that read none."""
    ground = next((ground for kind, ground in _GROUNDS.items() if issubclass(base, kind)), None)
    if ground is None:
        return None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        return base.forward(ground(self, base), *args, **kwargs)

    return forward


def settle_reader(module: nn.Module) -> None:
    """Give a reader the class that it needs for what is inside it now. Plain assignments: it cannot fail."""
    if not is_adapted(module):
        base = getattr(base_class(module), "_diffpeft_called", base_class(module))
        holds = any(map(is_adapted, module.modules()))
        if holds != (base in _reading and issubclass(type(module), _reading[base])):
            put_class(module, reading_class(base) if holds else base)


# What a reader's forward runs on


def as_read(module: nn.Module, steps: Sequence[Step] | None = None) -> nn.Module:
    """A stand-in for a module in which what acts on it (or `steps`), and on modules inside, is in the parameters; itself where nothing does.

    Raises MixedBatchError where that differs from row to row.
    """
    acting = acting_on(module) if steps is None else [steps]
    if len(acting) > 1:
        kind = base_class(module).__name__
        methods = {name for steps in acting for thing, _ in steps for name in getattr(thing, "methods", ())}
        raise MixedBatchError(
            f"{min(methods, default='modules_to_save')}.{kind} does not support mixed adapter batches",
            remedy="Run a batch for each adapter.",
        )
    (steps,) = acting
    ground = bare(module)
    if steps and isinstance(steps[0][0], Copy):
        ground, steps = steps[0][0].module, steps[1:]
    inside = {name: child if child is None else as_read(child) for name, child in ground._modules.items()}
    if not steps and ground is module and all(inside[name] is child for name, child in module._modules.items()):
        return module
    return stand_in(ground, base_class(ground), _numbers(ground, steps), _modules=inside)


def acting_on(module: nn.Module) -> list[Sequence[Step]]:
    """What acts on a module: once, or each that differs of a batch with a mix for each row."""
    record = record_of(module)
    if record is None:
        return [[]]
    moment = record.mix.current()
    return different([record.acting(row) for row in moment.rows or (moment,)])


def _numbers(module: nn.Module, steps: Sequence[Step]) -> Parameters:
    """The parameters of a module that have something in them: computed in fp32 or better and rounded once, as when they are fused."""
    if not steps:
        return {}
    names = dict.fromkeys(
        n for thing, _ in steps for n in (thing.names if isinstance(thing, Patch) else parameter_names(module))
    )
    present: dict[str, Tensor] = {n: p for n in names if (p := module._parameters.get(n)) is not None}
    like = next(iter(present.values()))
    with torch.autocast(like.device.type, enabled=False):
        numbers = with_acting(module, steps, wide_dtype(like.dtype), present)
    return {name: t.to(present.get(name, like).dtype) for name, t in numbers.items()}


def _attention(module: nn.Module, base: Class) -> nn.Module:
    return as_read(module)


def _encoder_layer(module: nn.Module, base: Class) -> nn.Module:
    """In training, and where rows differ, its layers are called; the fused kernel reads them."""
    if module.training:
        return module
    if any(len(acting_on(inner)) > 1 for inner in module.modules()):
        return stand_in(module, base, {}, activation_relu_or_gelu=0)  # one that the kernel does not know
    return as_read(module)


def _encoder(module: nn.Module, base: Class) -> nn.Module:
    """It makes ragged tensors, which only the fused kernel takes, unless one of its parameters is trained: so also if an adapter inside is."""
    acting = [acting_on(inner) for inner in module.modules() if is_adapted(inner)]
    things = [thing for each in acting for steps in each for thing, _ in steps]
    modules = [thing.module if isinstance(thing, Copy) else thing for thing in things]
    trained = torch.is_grad_enabled() and any(p.requires_grad for inner in modules for p in inner.parameters())
    if trained or any(len(each) > 1 for each in acting):
        return stand_in(module, base, {}, use_nested_tensor=False)
    return module


_GROUNDS: dict[Class, Callable[[nn.Module, Class], nn.Module]] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
}

"""What an adapted layer is by definition: the weight that all adapters make of it, put into a plain layer."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.func import functional_call

import diffpeft
from diffpeft.layers.carried import base_class
from diffpeft.layers.sites import parameter_names, site_of
from diffpeft.model.state import slots_of


def effective(model: nn.Module, order) -> tuple[Tensor, Tensor | None]:
    """The definition: W_k = W_{k-1} + s_k (f_k(W_{k-1}) - W_{k-1}), for `order` [(adapter, s), ...]; and the bias."""
    op = site_of(base_class(model[0]))(model[0])
    W, b = op.weight(), op.bias
    for name, s in order:
        slot = slots_of(model, name)["0"]
        f, g = W, b
        for part in slot.parts:
            p = part.method.prepare(slot.tensors_of(part), part.spec, False)
            f = part.method.weight(f, p, part.spec)
            if b is not None and (shift := part.method.bias(g, p, part.spec)) is not None:
                g = g + shift
        if b is not None and "diff_b" in slot.tensors:
            g = g + slot.diff_b
        W = W + s * (f - W)
        b = b if b is None else b + s * (g - b)
    return op.stored(W), b


def defined(model: nn.Module, x: Tensor, order, plain: nn.Module | None = None) -> Tensor:
    """The output of the layer by the definition; `plain` is the model without adapters."""
    if plain is None:
        plain = copy.deepcopy(model)
        diffpeft.unload(plain)
    W, b = effective(model, order)
    weight, bias = (f"0.{name}" for name in parameter_names(plain[0]))
    return functional_call(plain, {weight: W} if b is None else {weight: W, bias: b}, x)

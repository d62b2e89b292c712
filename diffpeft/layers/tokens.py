"""Rows of a table of embeddings that an adapter trains (PEFT's `trainable_token_indices`): W'[index] = delta, all other rows stay.

A head that shares its weight with the table has a row for each token too, and follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffpeft.layers.chain import Base, Chained
from diffpeft.layers.patches import Patch, input_of, stand_in
from diffpeft.layers.swap import Class


class Tokens(Patch):
    """New values for some rows: delta [n, features], index [n]. As everywhere W(s) = W + s (W' - W).

    The module runs as it is, and once more on a table of n rows, whose results are put in (of a head: added). The large table is never copied.
    """

    names = ("weight",)
    shows = True

    def __init__(self, index: Sequence[int], delta: Tensor):
        super().__init__()
        self.token_adapter = nn.Module()
        self.token_adapter.register_parameter("trainable_tokens_delta", nn.Parameter(delta))
        self.register_buffer("index", torch.tensor(list(index), device=delta.device), persistent=False)

    @property
    def delta(self) -> Tensor:
        """The new rows."""
        return self.token_adapter.trainable_tokens_delta  # type: ignore[return-value]

    @property
    def rows(self) -> Tensor:
        """Which rows of the table they are."""
        return self.index  # type: ignore[return-value]

    def whole(self, W: Tensor) -> bool:
        """FSDP 1 has flat shares of tables and rows between forwards, and reads them."""
        return W.dim() == self.delta.dim() == 2 and W.shape[1] == self.delta.shape[1]

    def overlaps(self, other: Patch) -> bool:
        return isinstance(other, Tokens) and bool(torch.isin(self.rows, other.rows).any())

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens of x are among the rows, and (anything for others) where."""
        known, order = torch.sort(self.rows)
        at = torch.searchsorted(known, x.to(known)).clamp_max(len(known) - 1)
        return known[at] == x, order[at]

    def changed(self, name: str, W: Tensor, s: float) -> Tensor:
        return W.index_copy(0, self.rows, _between(W[self.rows], self.delta.to(W.dtype), s))

    def after(self, before: Chained, x: Tensor, s: float, bias: bool) -> Tensor:
        y, op = before(x, bias), before.op
        if op.geometry.lookup:
            return _looked_up(op.module, type(op.module), self, s, y, x, op.arguments, op.keywords)
        W = op.stored(op.weight() if isinstance(before, Base) else before.weight())
        change = self.delta.to(y.dtype) - W[self.rows].to(y.dtype)
        by = op.op(x, op.canonical(change), False)
        return y.index_add(-1, self.rows, by.to(y.dtype) * s)

    @classmethod
    def run(
        cls,
        module: nn.Module,
        base: Class,
        steps: Sequence[tuple[Any, float]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        x, others, named = input_of(args, kwargs)
        y: Tensor = base.forward(module, x, *others, **named)
        tokens = [(patch, s) for patch, s in steps if isinstance(patch, Tokens)]
        for k, (patch, s) in enumerate(tokens):
            if isinstance(module, nn.Embedding):
                y = _looked_up(module, base, patch, s, y, x, others, named)
            else:
                y = _multiplied(module, base, patch, s, y, x, others, named, tokens[:k])
        return y


def _between(old: Tensor, new: Tensor, s: float) -> Tensor:
    """old + s (new - old); at 1 `new` to the last bit."""
    return new if s == 1 else old + s * (new - old)


def _looked_up(
    module: nn.Module,
    base: Class,
    patch: Tokens,
    s: float,
    y: Tensor,
    x: Tensor,
    others: Sequence[Any],
    named: Mapping[str, Any],
) -> Tensor:
    """y [*n, features] of tokens x [*n], with new values where a token is among the rows."""
    hit, at = patch.place(x)
    table = patch.delta.to(cast(Tensor, module.weight).dtype)
    small = stand_in(module, base, {"weight": table}, num_embeddings=len(table), padding_idx=None)
    return torch.where(hit[..., None], _between(y, base.forward(small, at, *others, **named), s), y)


def _multiplied(
    module: nn.Module,
    base: Class,
    patch: Tokens,
    s: float,
    y: Tensor,
    x: Tensor,
    others: Sequence[Any],
    named: Mapping[str, Any],
    earlier: Sequence[tuple[Tokens, float]],
) -> Tensor:
    """y [*n, tokens] of a head, and the change of the rows (from what earlier patches made of them) times x [*n, features] added to it."""
    weight = cast(Tensor, module.weight)
    old = weight[patch.rows]
    for other, t in earlier:
        hit, at = other.place(patch.rows)
        old = torch.where(hit[:, None], _between(old, other.delta[at].to(old.dtype), t), old)
    change = (patch.delta - old).to(weight.dtype)
    by = base.forward(stand_in(module, base, {"weight": change, "bias": None}), x, *others, **named)
    return y.index_add(-1, patch.rows, by.to(y.dtype), alpha=s)

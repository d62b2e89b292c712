"""A layer whose rows have different mixes: row i of a batch has mix (i // images) % n of n mixes.

Each mix that differs on this layer runs on its own rows. Factors of low rank go through all rows at once, gated along the rank row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpeft.errors import ShapeMismatchError, shown
from diffpeft.layers.chain import Base, Dial, Given, Whole, drops_inputs, form_of, now
from diffpeft.layers.mixes import CarrierLike
from diffpeft.layers.slot import Part, Slot
from diffpeft.methods import Strength
from diffpeft.methods.forms import Factors

Steps = Sequence[tuple[Slot, Given]]
Mark = list[tuple[Slot, object]]  # adapters, and the strengths that were set


class Rows:
    """The layer with a mix for each prompt.

    Args:
        prompts: the active adapters and their strengths, for each prompt.
        record: the layer's; its mix says how many rows the batch has (0: as many as the input), and how many of them a prompt has in a row.
    """

    def __init__(self, base: Base, prompts: Sequence[Steps], record: CarrierLike[object]):
        self.base, self.op, self.record, self.n = base, base.op, record, len(prompts)
        self.groups: list[tuple[list[int], Whole | None]] = []
        self.terms: list[tuple[Slot, Part, list[Given]]] = []
        marks: list[Mark] = []
        for row, steps in enumerate(prompts):
            mark = [(slot, s.level if isinstance(s, Dial) else s) for slot, s in steps]
            known = next((i for i, other in enumerate(marks) if _same(mark, other)), None)
            if known is None:
                marks.append(mark)
                self.groups.append(([row], Whole(base, steps) if steps else None))
            else:
                self.groups[known][0].append(row)
            self._gather(row, steps)
        shifting = any(slot.shifts for steps in prompts for slot, _ in steps)  # also a slot that has only a bias
        self.thin = (
            base.op.targets and not shifting and bool(self.terms) and all(part.additive for _, part, _ in self.terms)
        )

    def _gather(self, row: int, steps: Steps) -> None:
        """Add a prompt's strengths to those of all prompts, adapter by adapter."""
        for slot, s in steps:
            if all(known is not slot for known, _, _ in self.terms):
                self.terms += [(slot, part, [0.0] * self.n) for part in slot.parts]
            for known, _, strengths in self.terms:
                if known is slot:
                    strengths[row] = s

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.groups) == 1:
            link = self.groups[0][1]
            return self.base(x) if link is None else link(x)
        x, each = self._spread(x)
        if self.thin and (pairs := self._pairs(x)) is not None:
            return self._gated(x, each, pairs)
        rows = x.unflatten(0, (-1, self.n, each))
        out: dict[int, Tensor] = {}
        for prompts, link in self.groups:
            part = rows[:, prompts].flatten(0, 2)
            y = (self.base(part) if link is None else link(part)).unflatten(0, (-1, len(prompts), each))
            for j, prompt in enumerate(prompts):
                out[prompt] = y[:, j]
        return torch.stack([out[prompt] for prompt in range(self.n)], 1).flatten(0, 2)

    def _spread(self, x: Tensor) -> tuple[Tensor, int]:
        """x with a row for each of the batch, and how many rows follow each other with the same mix.

        What all rows share (positions) has one row; what the model split further (frames) has several, those of a row together.
        """
        moment = self.record.mix.current()
        batch, images = moment.batch, moment.images
        period = self.n * images
        if self.op.has_batch(x) and len(x) == 1:
            x = x.expand(batch or period, *x.shape[1:])
        batch = batch or (len(x) if self.op.has_batch(x) else 0)
        if not batch or batch % period or len(x) % batch:
            raise ShapeMismatchError(
                f"an input {tuple(x.shape)} does not divide into {self.n} mixes with {images} rows a prompt",
                where=f"layer {shown(self.record.mix.layers[self.record.index])}",
                remedy="Give as many prompts as mixes, and images_per_prompt= as the pipeline has it.",
            )
        return x, len(x) // batch * images

    def _pairs(self, x: Tensor) -> list[tuple[Tensor, Tensor, float, list[Given]]] | None:
        """All terms as (A, B, scale, strengths) where that is the way to apply each, else None."""
        pairs, positions = [], self.op.positions(x)
        for slot, part, strengths in self.terms:
            if not slot.bare:
                return None
            p = slot.prepared(part, self.base.dtype)
            module_dropout = slot.training and part.spec.options.get("module_dropout")
            form = form_of(slot, part, p, positions)
            if module_dropout or drops_inputs(slot, part) or not isinstance(form, Factors):
                return None
            pairs.append((*form, part.method.scale(p, part.spec), strengths))
        return pairs

    def _gated(self, x: Tensor, each: int, pairs: Sequence[tuple[Tensor, Tensor, float, list[Given]]]) -> Tensor:
        A, B = torch.cat([A for A, _, _, _ in pairs]), torch.cat([B for _, B, _, _ in pairs], 1)
        h = self.op.down(x, A)
        gates = torch.cat([self._column(k, h, scale).expand(-1, len(A)) for k, (A, _, scale, _) in enumerate(pairs)], 1)
        by = gates.repeat_interleave(each, 0).repeat(len(x) // (self.n * each), 1)
        return self.op.add(self.base(x), self.op.gated(h, by), B, 1.0)

    def _column(self, term: int, like: Tensor, scale: float) -> Tensor:
        """scale * the strengths of one term.  -> [n, 1]."""
        values: list[Strength] = [now(s) for s in self.terms[term][2]]
        if not any(isinstance(v, Tensor) for v in values):
            return torch.tensor([v * scale for v in values], dtype=like.dtype, device=like.device)[:, None]
        return torch.stack([torch.as_tensor(v, device=like.device).to(like.dtype) for v in values])[:, None] * scale


def _same(a: Mark, b: Mark) -> bool:
    """Whether two prompts have the same here. Strengths in compiled code are tensors, whose values are not known."""
    return len(a) == len(b) and all(
        x is y and not isinstance(s, Tensor) and s == t for (x, s), (y, t) in zip(a, b, strict=True)
    )

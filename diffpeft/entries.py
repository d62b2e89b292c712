"""Entry: one method on one layer, as a file holds it or an adapted model does, and the names of layers.

A canonical layer name is diffusers' own: `component.dotted.path`, for example `unet.mid_block.attentions.0.proj_in`. A layer that the original
program has fused (or with other rows first) is an entry under the original's name, with the rule that tells its rows apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffpeft.handles import Handle
from diffpeft.methods.layout import named
from diffpeft.methods.shapes import rank
from diffpeft.readable import Readable

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "prior",
    "connectors",
    "text_conditioner",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
)


def dotted(component: str, layer: str) -> str:
    """`component.layer`, or the layer alone where the component has no name (a bare module)."""
    return f"{component}.{layer}" if component else layer


def parted(name: str) -> tuple[str, str]:
    """A layer's canonical name as (component, layer): the inverse of `dotted`. The component is empty for a bare module's layer."""
    component, _, layer = name.partition(".")
    return (component, layer) if component in COMPONENTS else ("", name)


def canonical(component: str, layer: str) -> str:
    """A layer's canonical name. Text encoders are spelt with `text_model.`, the level of CLIP's names that transformers 5 dropped."""
    if component.startswith("text_encoder") and layer.startswith("encoder.layers."):
        layer = f"text_model.{layer}"
    return dotted(component, layer)


@dataclass(frozen=True)
class Rule:
    """One layer of the original program, and the layers that diffusers makes of its rows (out features).

    `parts` are diffusers' layers, in order, with their shares of the rows. `chunks` are the numbers of the original's equal chunks of rows
    in the order in which diffusers has them. An `aspect` keeps the rule to layers with so many rows a column, where one name has two rules.
    """

    original: str
    parts: tuple[tuple[str, int], ...]
    chunks: tuple[int, ...] = (0,)
    aspect: int | None = None

    @property
    def renames(self) -> bool:
        """Whether the rule gives one layer another name and nothing more."""
        return len(self.parts) == 1 and len(self.chunks) == 1

    def ranges(self, part: int, total: int) -> list[tuple[int, int]]:
        """Which of the original layer's `total` rows a part has, in the part's order, as (first, end).

        Raises ValueError for a total that does not divide into the shares.
        """
        shares = [share for _, share in self.parts]
        unit, over = divmod(total, sum(shares))
        size, odd = divmod(total, len(self.chunks))
        if over or odd:
            raise ValueError(f"{total} rows of {self.original} do not divide into {shares}")
        start, end = unit * sum(shares[:part]), unit * sum(shares[: part + 1])  # in diffusers' order
        spans: list[tuple[int, int]] = []
        for place, chunk in enumerate(self.chunks):
            a, b = max(start, place * size), min(end, (place + 1) * size)
            if a < b:
                a, b = a + (chunk - place) * size, b + (chunk - place) * size
                if spans and spans[-1][1] == a:
                    a = spans.pop()[0]
                spans.append((a, b))
        return spans

    def rows(self, part: int, total: int) -> Sequence[int]:
        """As `ranges`, row by row; a range if they lie together."""
        spans = [range(a, b) for a, b in self.ranges(part, total)]
        return spans[0] if len(spans) == 1 else [row for rows in spans for row in rows]

    def filled(self, numbers: Sequence[str]) -> Rule:
        """The rule with numbers in its names."""
        parts = tuple((name.format(*numbers), share) for name, share in self.parts)
        return Rule(self.original.format(*numbers), parts, self.chunks, self.aspect)


@dataclass(frozen=True, repr=False)
class Entry(Readable):
    """One method on one layer: its tensors by role (PEFT's parameter names), and the alpha as the file gives it."""

    method: str
    layer: str
    tensors: Mapping[str, Handle]
    alpha: Handle | float | None = None  # a stored tensor, a number from a config, or absent: then the scale is 1
    keys: tuple[str, ...] = ()  # the keys in the file that this entry was read from
    options: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the method must know beside tensors and alpha: plain values
    shape: tuple[int, ...] | None = None  # of the layer's canonical weight, where a model told it
    rule: Rule | None = (
        None  # of a layer of the original program whose rows are not one of diffusers' layers' as they are
    )
    own: str | None = None  # the layer as its model calls it, within its component; None if no model told it
    shared: Mapping[str, Handle] = field(default_factory=dict)  # the tensors of the whole adapter, of `Bundle.shared`

    @property
    def targets(self) -> tuple[str, ...]:
        """The canonical layers that the entry is for."""
        component = parted(self.layer)[0]
        return tuple(dotted(component, name) for name, _ in self.rule.parts) if self.rule else (self.layer,)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by role."""
        return {role: h.shape for role, h in self.tensors.items()}

    @property
    def rank(self) -> int:
        """The rank that the tensors show; 0 if they show none."""
        return rank(self.shapes)

    @property
    def methods(self) -> frozenset[str]:
        """The method's name, and for a DoRA over something else than LoRA also that."""
        return named(self.method, self.tensors)

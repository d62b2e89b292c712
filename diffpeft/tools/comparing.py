"""diff: how alike two adapters are, by what they do to weights, whatever formats and methods they are in.

With a and b the updates of a layer, <a, b> is taken from factors where a method has them: <B A, D C> = sum of (B^T D) * (A C^T), so that no [out, in] is built.
The norm of the difference is not |a|^2 + |b|^2 - 2 <a, b>, whose digits cancel where both are alike, but that of triangular factors of [B, -D] and [A; C].
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffpeft import io
from diffpeft.bundle import Entry, Handle, parted
from diffpeft.converters.inspection import block_of
from diffpeft.definition import definition_of, deltas
from diffpeft.errors import CheckpointError, ConfigError, ShapeMismatchError, UnknownKeysError, listed
from diffpeft.readable import Readable
from diffpeft.tools.choosing import read

if TYPE_CHECKING:
    import torch

    from diffpeft.pipeline.bake import ComponentFiles

_BIASES = frozenset({"diff_b", "b_norm"})


@dataclass(frozen=True, repr=False)
class Likeness(Readable):
    """What two updates a and b have to do with each other, over one or many layers.

    Args:
        norm_a, norm_b: Frobenius norms.
        dot: the inner product.
        gap: the norm of a - b.
        layers: how many.
    """

    norm_a: float
    norm_b: float
    dot: float
    gap: float
    layers: int = 1

    @property
    def cosine(self) -> float:
        """1 for the same direction, 0 for nothing in common; nan where one of them is zero."""
        norms = self.norm_a * self.norm_b
        return min(max(self.dot / norms, -1.0), 1.0) if norms else math.nan

    @property
    def relative(self) -> float:
        """The norm of a - b by that of a: 0 for the same; inf where a is zero and b is not."""
        return self.gap / self.norm_a if self.norm_a else math.inf if self.gap else 0.0

    @classmethod
    def over(cls, parts: Iterable[Likeness]) -> Likeness:
        """That of several layers together."""
        parts = list(parts)
        return cls(
            math.hypot(*(part.norm_a for part in parts)),
            math.hypot(*(part.norm_b for part in parts)),
            math.fsum(part.dot for part in parts),
            math.hypot(*(part.gap for part in parts)),
            sum(part.layers for part in parts),
        )


@dataclass(frozen=True, repr=False)
class DiffReport(Readable):
    """How alike two adapters are. Layers by diffusers' names; those that one of them lacks count as zeros there in `blocks` and `total`.

    Args:
        layers: of each layer that could be compared.
        blocks: of each block.
        total: of all.
        only_a, only_b: layers that one of them has alone.
        left_out: {layer: why it could not be compared}; they count nowhere.
    """

    layers: Mapping[str, Likeness]
    blocks: Mapping[str, Likeness]
    total: Likeness
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


class UpDown(NamedTuple):
    """An update as up @ down.  up [o, r], down [r, n]."""

    up: torch.Tensor
    down: torch.Tensor


class _Update(NamedTuple):
    """A layer's update: products, the sum of which it is, or one matrix [o, n]."""

    product: UpDown | None
    matrix: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        if self.product:
            return len(self.product.up), self.product.down.shape[1]
        assert self.matrix is not None
        return len(self.matrix), self.matrix.shape[1]


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    family: str | None = None,
) -> DiffReport:
    """How alike two adapters are, layer by layer, by block and in total, across formats and methods. One layer is in memory at a time.

    Methods whose update depends on the base's weights (DoRA, rotations, (IA)^3, GLoRA) are left out, and named, unless `model`, a diffusers folder, has
    the weights: those of such layers are read.

    Raises UnknownKeysError if they have no layer in common, ShapeMismatchError if those that they have are of other sizes, CheckpointError.
    """
    bundles = [read(os.fspath(source), family) for source in (a, b)]
    by_layer = [_by_layer(bundle.entries) for bundle in bundles]
    if by_layer[0].keys().isdisjoint(by_layer[1]):
        raise UnknownKeysError(
            "the two have no layer in common",
            where=f"{a} ({bundles[0].family}), {b} ({bundles[1].family})",
            remedy="They are for different models, or of different parts of one.",
        )
    layers, left_out = _compared(by_layer[0], by_layer[1], _Base(model))
    if not layers:
        what, remedy = f"no layer can be compared: {next(iter(left_out.values()))}", "Give the base: -m (model=)."
        raise ConfigError(what, where=f"{a}, {b}", remedy=remedy)
    blocks: dict[str, list[Likeness]] = {}
    for layer, likeness in layers.items():
        blocks.setdefault(block_of(layer), []).append(likeness)
    return DiffReport(
        layers,
        {block: Likeness.over(parts) for block, parts in blocks.items()},
        Likeness.over(layers.values()),
        tuple(layer for layer in by_layer[0] if layer not in by_layer[1]),
        tuple(layer for layer in by_layer[1] if layer not in by_layer[0]),
        left_out,
    )


def _compared(
    a: Mapping[str, Sequence[Entry]], b: Mapping[str, Sequence[Entry]], base: _Base
) -> tuple[dict[str, Likeness], dict[str, str]]:
    """{layer: how alike the two are on it}, and {layer: why that is not known}."""
    layers: dict[str, Likeness] = {}
    left_out: dict[str, str] = {}
    for layer in dict.fromkeys([*a, *b]):
        entries = (a.get(layer, []), b.get(layer, []))
        why = next(filter(None, map(_unfit, [*entries[0], *entries[1]])), "")
        if why and base.lacks(target for entry in (*entries[0], *entries[1]) for target in entry.targets):
            left_out[layer] = why
        else:
            layers[layer] = _likeness(layer, *(_update(of_one, layer, base) for of_one in entries))
    return layers, left_out


def _by_layer(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """{layer: what is on it}, without what changes a bias alone."""
    by_layer: dict[str, list[Entry]] = {}
    for entry in entries:
        if {*entry.tensors} - _BIASES:
            for layer in entry.targets:
                by_layer.setdefault(layer, []).append(entry)
    return by_layer


def _unfit(entry: Entry) -> str:
    """Why an entry's update is not known from the file; empty if it is."""
    from diffpeft.methods import METHODS, Additive

    method = METHODS[entry.method]
    if not (
        issubclass(method, Additive) and method.additive({role: len(shape) for role, shape in entry.shapes.items()})
    ):
        return f"what {entry.method} does depends on the base's weights"
    if method.shared and (entry.shape is None or not entry.shared):
        return f"what {entry.method} does depends on the base's sizes"
    return ""


class _Base:
    """The weights of a model in a diffusers folder, read when they are asked for; none without a folder."""

    def __init__(self, model: str | os.PathLike[str] | None):
        self.folder = None if model is None else Path(model)
        self.files: dict[str, ComponentFiles] = {}
        if self.folder and not (self.folder / "model_index.json").is_file():
            raise CheckpointError(
                "this is no folder of a diffusers pipeline",
                where=self.folder,
                remedy="Pass one, or leave the model out.",
            )

    def weight(self, layer: str) -> Handle | None:
        """A layer's weight, if the files have it in numbers."""
        from diffpeft.pipeline.bake import component_files

        component, name = parted(layer)
        if self.folder is None or not (self.folder / component).is_dir():
            return None
        if component not in self.files:
            self.files[component] = component_files(self.folder / component, None)
        handle = self.files[component].tensor(f"{name}.weight")
        return handle if handle is not None and handle.dtype[0] in "FB" else None

    def lacks(self, layers: Iterable[str]) -> bool:
        """Whether a weight of these layers is not there."""
        return any(self.weight(layer) is None for layer in layers)

    def weights(self, layers: Iterable[str]) -> dict[str, torch.Tensor]:
        """{layer: its weight}."""
        handles = {layer: handle for layer in layers if (handle := self.weight(layer)) is not None}
        return dict(zip(handles, io.load(handles.values()), strict=True))


def _update(entries: Sequence[Entry], layer: str, base: _Base) -> _Update | None:
    """What entries do to one layer, in float64; None for no entry."""
    import torch

    if any(map(_unfit, entries)):
        change = deltas(entries, base.weights(dict.fromkeys(t for entry in entries for t in entry.targets)))[layer]
        return _Update(None, change.flatten(1) if change.ndim > 1 else change[:, None])
    updates = [_of_entry(entry, layer) for entry in entries]
    if not updates:
        return None
    products = [update.product for update in updates if update.product]
    product = (
        UpDown(torch.cat([p.up for p in products], 1), torch.cat([p.down for p in products])) if products else None
    )
    if len(products) == len(updates):
        return _Update(product, None)
    return _Update(None, torch.stack([_built(update) for update in updates]).sum(0))


def _of_entry(entry: Entry, layer: str) -> _Update:
    """As a product where the method has factors of a rank below half the layer's, else built; of a joint layer the rows of this one."""
    definition = definition_of(entry)
    method, (_, p, spec) = definition.additive, definition
    assert method is not None
    scale, rows = method.scale(p, spec), _rows(entry, layer)
    factors = method.factors(p, spec)
    if factors is not None and 2 * len(factors.A) <= min(len(factors.B), factors.A.flatten(1).shape[1]):
        up = factors.B.flatten(1)
        return _Update(UpDown(scale * (up if rows is None else up[list(rows(len(up)))]), factors.A.flatten(1)), None)
    matrix = method.delta(p, spec)
    matrix = scale * (matrix.flatten(1) if matrix.ndim > 1 else matrix[:, None])
    return _Update(None, matrix if rows is None else matrix[list(rows(len(matrix)))])


def _rows(entry: Entry, layer: str) -> Callable[[int], Sequence[int]] | None:
    """Which of a joint layer's rows are a layer's; None where the layer is alone."""
    if entry.rule is None:
        return None
    rule, part = entry.rule, entry.targets.index(layer)
    return lambda total: rule.rows(part, total)


def _built(update: _Update) -> torch.Tensor:
    """The whole matrix [o, n]."""
    if update.matrix is not None:
        return update.matrix
    assert update.product is not None
    return update.product.up @ update.product.down


def _likeness(layer: str, a: _Update | None, b: _Update | None) -> Likeness:
    """Of one layer; None counts as zeros."""
    if a is None or b is None:
        norm = _norm(a or b)
        return Likeness(norm if a else 0.0, norm if b else 0.0, 0.0, norm)
    if a.shape != b.shape:
        raise ShapeMismatchError(
            f"one has a layer of {a.shape}, the other of {b.shape}",
            where=listed([layer]),
            remedy="They are for models of other sizes.",
        )
    return Likeness(_norm(a), _norm(b), _dot(a, b), _gap(a, b))


def _norm(update: _Update | None) -> float:
    assert update is not None
    return math.sqrt(max(_dot(update, update), 0.0))


def _dot(a: _Update, b: _Update) -> float:
    """The inner product of two updates; nothing of [o, n] is built but what is there already."""
    if a.product and b.product:
        return ((a.product.up.T @ b.product.up) * (a.product.down @ b.product.down.T)).sum().item()
    if a.matrix is not None and b.matrix is not None:
        return (a.matrix * b.matrix).sum().item()
    product, matrix = a.product or b.product, a.matrix if b.matrix is None else b.matrix
    assert product is not None and matrix is not None
    return ((product.up.T @ matrix) * product.down).sum().item()


def _gap(a: _Update, b: _Update) -> float:
    """The norm of a - b, to the last digits also where they are alike."""
    import torch

    if not (a.product and b.product):
        return torch.linalg.norm(_built(a) - _built(b)).item()
    up = torch.cat([a.product.up, -b.product.up], 1)
    down = torch.cat([a.product.down, b.product.down])
    tall, wide = (torch.linalg.qr(t, mode="r").R for t in (up, down.T))
    return torch.linalg.norm(tall @ wide.T).item()

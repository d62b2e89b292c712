"""Bundle: an adapter between file and model. Every file becomes one, every adapted model becomes one.

It holds tensors as stored (dtype, shape and where the bytes are), under canonical names, and never does arithmetic.
A canonical layer name is diffusers' own: `component.dotted.path`, for example `unet.mid_block.attentions.0.proj_in`. A layer that the original
program has fused (or with other rows first) is an entry under the original's name, with the rule that tells its rows apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpeft.errors import ConfigError, shown
from diffpeft.methods.layout import BIAS, named
from diffpeft.methods.shapes import weight_shape

if TYPE_CHECKING:
    import torch

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
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
class Handle:
    """One stored tensor, not yet read: safetensors dtype name, shape, and where the bytes are.

    They are bytes [start, end) of `path`, a tensor, bytes in memory, or made of other handles' (`parts`): their bytes one after the other, or as
    `how` says: ("diagonal",) matrices along the diagonal of one that is zero elsewhere, ("columns", a, b) of a matrix, ("cast", where),
    ("scaled", factor). Without any: zeros.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    start: int = 0
    end: int = 0
    tensor: Any = None
    data: bytes | None = None
    parts: tuple[Handle, ...] = ()
    how: tuple[Any, ...] = ()
    file: Any = (
        None  # the open file at `path`, of which the bytes are; without it the path is opened when they are read
    )


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
        unit, rest = divmod(total, sum(shares))
        size, odd = divmod(total, len(self.chunks))
        if rest or odd:
            raise ValueError(f"{total} rows of {self.original} do not divide into {shares}")
        start, end = unit * sum(shares[:part]), unit * sum(shares[: part + 1])  # in diffusers' order
        found: list[tuple[int, int]] = []
        for place, chunk in enumerate(self.chunks):
            a, b = max(start, place * size), min(end, (place + 1) * size)
            if a < b:
                a, b = a + (chunk - place) * size, b + (chunk - place) * size
                if found and found[-1][1] == a:
                    a = found.pop()[0]
                found.append((a, b))
        return found

    def rows(self, part: int, total: int) -> Sequence[int]:
        """As `ranges`, row by row; a range if they lie together."""
        found = [range(a, b) for a, b in self.ranges(part, total)]
        return found[0] if len(found) == 1 else [row for rows in found for row in rows]

    def filled(self, numbers: Sequence[str]) -> Rule:
        """The rule with numbers in its names."""
        parts = tuple((name.format(*numbers), share) for name, share in self.parts)
        return Rule(self.original.format(*numbers), parts, self.chunks, self.aspect)


@dataclass(frozen=True)
class Entry:
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
    shared: Mapping[str, Handle] = field(default_factory=dict)  # the tensors of the whole adapter, of `Bundle.shared`
    own: str | None = None  # the layer as its model calls it, within its component; None if no model told it

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
    def methods(self) -> frozenset[str]:
        """The method's name, and for a DoRA over something else than LoRA also that."""
        return named(self.method, self.tensors)


@dataclass
class Bundle:
    """A whole adapter: entries in file order, tensors that are no adapter's under their original keys, and the file's metadata."""

    format: str
    family: str
    entries: list[Entry]
    carried: dict[str, Handle] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "a dict of tensors"
    families: tuple[str, ...] = ()  # every family the names fit, the likeliest first
    order: tuple[str, ...] = ()  # the file's keys

    @property
    def shared(self) -> dict[str, Mapping[str, Handle]]:
        """{component: the tensors by role that all its entries share}, where a method has such."""
        return {parted(entry.layer)[0]: entry.shared for entry in self.entries if entry.shared}

    @property
    def methods(self) -> set[str]:
        """Names of the methods in use."""
        return {method for entry in self.entries for method in entry.methods}

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """What the file says must stand in a prompt, from `modelspec.trigger_phrase` or `trained_words`."""
        return trigger_words(self.metadata)

    def deltas(self, base: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """{canonical layer: f(W) - W in float64}, by each method's definition. `base` {layer: W} is for methods that need W, such as DoRA and OFT.

        Entries that change nothing but a bias are left out. Raises ConfigError if W is needed and not there.
        """
        out: dict[str, torch.Tensor] = {}
        for entry in self.entries:
            if not {*entry.tensors} - {BIAS, "b_norm"}:
                continue
            Ws = [(base or {}).get(layer) for layer in entry.targets]
            now = [
                W if W is None or layer not in out else W.double() + out[layer]
                for W, layer in zip(Ws, entry.targets, strict=True)
            ]
            for layer, delta in zip(entry.targets, _deltas(entry, now), strict=True):
                out[layer] = out[layer] + delta if layer in out else delta
        return out


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What a file says must stand in a prompt."""
    text = metadata.get("modelspec.trigger_phrase") or metadata.get("trained_words") or ""
    return tuple(word for word in (part.strip(" []\"'") for part in text.split(",")) if word)


def _deltas(entry: Entry, Ws: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The changes of an entry's targets. A fused layer's weight is put together and its change taken apart."""
    import torch

    if (rule := entry.rule) is None:
        return [_delta(entry, Ws[0])]
    fused = None
    known = [W for W in Ws if W is not None]
    if len(known) == len(Ws):
        own = torch.cat(known)
        order = [row for part in range(len(Ws)) for row in rule.rows(part, len(own))]
        fused = torch.empty_like(own)
        fused[order] = own
    delta = _delta(entry, fused)
    return [delta[list(rule.rows(part, len(delta)))] for part in range(len(Ws))]


def _delta(entry: Entry, W: torch.Tensor | None) -> torch.Tensor:
    """f(W) - W in float64; where f is additive W is not needed."""
    method, p, spec = definition_of(entry, W)
    if method.additive(p):
        delta = method.scale(p, spec) * method.delta(p, spec)
        column = W is None and any(len(entry.tensors[role].shape) == 1 for role in ("diff", "w_norm") if role in p)
        return delta.flatten() if column else delta if W is None else delta.reshape(W.shape)
    assert W is not None
    before = W.double().reshape(spec.geometry.shape)
    return (method.weight(before, p, spec) - before).reshape(W.shape)


def definition_of(entry: Entry, W: torch.Tensor | None = None) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """An entry's method, its prepared tensors in float64, and its spec: what the method's functions take.

    Without W the layer's shape is what the tensors show. Raises ConfigError if the method needs W.
    """
    from diffpeft import io
    from diffpeft.methods import METHODS, Geometry, Spec

    method: Any = METHODS[entry.method]
    roles = [role for role in entry.tensors if role in method.roles]
    if missing := {*method.shared} - {*entry.shared}:
        raise ConfigError(
            f"{entry.method} on {shown(entry.layer)} needs {' and '.join(sorted(missing))}, which its file leaves out",
            remedy="Load it onto its model.",
        )
    if method.shared and W is None and entry.shape is None:
        raise ConfigError(f"nothing tells the columns of {shown(entry.layer)}", remedy="Pass base={layer: W}.")
    handles = {**{role: entry.tensors[role] for role in roles}, **{role: entry.shared[role] for role in method.shared}}
    p = {role: t.double() for role, t in zip(handles, io.load(handles.values()), strict=True)}
    if W is None and not method.additive(p):
        raise ConfigError(
            f"{entry.method} on {shown(entry.layer)} changes what is there", remedy="Pass base={layer: W}."
        )
    o, *rest = (entry.shape or weight_shape(entry.method, entry.shapes)) if W is None else W.shape
    i, *kernel = rest or [1]  # a norm's factors are a column
    geometry = Geometry(o, i, tuple(kernel), lookup=any("_embedding_" in role for role in roles))
    spec = Spec(geometry, io.number(entry.alpha), entry.options)
    return method, method.prepare(method.adopt(p, spec), spec, False), spec

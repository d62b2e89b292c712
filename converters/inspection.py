"""inspect: what an adapter file is, from its header; norms and values on request. Without norms no torch is imported."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Unpack

from diffpeft import io
from diffpeft.bundle import Handle, dotted, trigger_words
from diffpeft.converters.detection import Fit, bare, fit, methods_of
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.base import table_of
from diffpeft.converters.locating import Where, located
from diffpeft.converters.opening import Opened, Source, opened
from diffpeft.converters.readers import readers
from diffpeft.errors import inside, joined
from diffpeft.files import parsed
from diffpeft.methods.shapes import rank
from diffpeft.readable import Readable, family_in_words, keys_in_words, size_in_words, words

BAR = 30  # characters
TAGS = 12  # shown
_BIASES = frozenset({"diff_b", "lora_B_bias"})  # that are zero does not make a layer dead


@dataclass(frozen=True, repr=False)
class Inspection(Readable):
    """What `inspect` found. `norms` are of the tensors of each layer together; None unless they were asked for, as are `dead` and `nonfinite`.

    `ranks` and `alphas` are {value: number of layers}; an alpha of None is missing. `blocks` is {block: number of adapted layers}.
    """

    path: str
    format: str
    family: str
    alternatives: tuple[str, ...]
    confidence: float
    methods: tuple[str, ...]
    components: tuple[str, ...]
    layers: int
    tensors: int
    bytes: int
    dtypes: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float | None, int]
    blocks: Mapping[str, int]
    carried: tuple[str, ...]
    trigger_words: tuple[str, ...]
    metadata: Mapping[str, str]
    readable_by: tuple[str, ...]
    norms: Mapping[str, float] | None = None
    dead: tuple[str, ...] | None = None
    nonfinite: tuple[str, ...] | None = None

    def __str__(self) -> str:
        """The rows, and the norms by block as bars, if there are any."""
        blocks = by_block(self.norms or {})
        largest = max(filter(math.isfinite, blocks.values()), default=0) or 1
        bars = {
            block: "?" if math.isnan(norm) else "█" * round(BAR * min(norm / largest, 1))
            for block, norm in blocks.items()
        }
        return "\n".join(
            [super().__str__(), *(f"  {block:40} {bars[block]:{BAR}} {blocks[block]:.3g}" for block in blocks)]
        )

    def _title(self) -> str:
        return self.path

    def _rows(self) -> dict[str, str]:
        rows = {
            "format": self.format,
            "family": family_in_words(self.family, self.alternatives),
            "methods": ", ".join(self.methods),
            "layers": f"{self.layers} in {', '.join(self.components)}",
            "ranks": listed_values(self.ranks),
            "alphas": listed_values(self.alphas),
            "size": size_in_words(self.tensors, self.bytes, self.dtypes),
            "trigger words": ", ".join(self.trigger_words),
            "tags": _tags(self.metadata.get("ss_tag_frequency", "{}")),
            "read by": ", ".join(self.readable_by),
            "not an adapter's": keys_in_words(self.carried),
        }
        if self.dead is not None and self.nonfinite is not None:
            rows |= {"dead layers": joined(self.dead, 5), "not finite": joined(self.nonfinite, 5)}
        return rows


def inspect(source: Source, *, norms: bool = False, **where: Unpack[Where]) -> Inspection:
    """What a file, a PEFT folder or a dict of tensors is. Reads the header and the alphas; with `norms` every tensor, one at a time.

    `norms` {layer: sqrt of the sum of squares of all its tensors}; `dead` layers have an alpha of 0 or a factor that is all zeros, so that they
    change nothing; `nonfinite` ones hold NaN or Inf. `where`: which file, as for `located`. Raises UnreadableFileError, UnknownKeysError or UnsafeFileError.
    """
    file = opened(located(source, **where))
    with inside(file.where):
        return _inspected(file, norms)


class FileOutline(NamedTuple):
    """What names and shapes tell of a file; see Inspection. `shapes` {component.layer as the file spells it: {role: shape}}."""

    fits: Fit
    families: tuple[str, ...]
    methods: frozenset[str]
    ranks: Mapping[int, int]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]


def outline(source: Opened) -> FileOutline:
    """What names and shapes tell of a file. Files of one `signature` have the same."""
    fits = fit(*source)
    return _outlined(fits, _grouped(source, fits))


def _outlined(fits: Fit, layers: Mapping[str, Mapping[str, Handle]]) -> FileOutline:
    shapes = {name: {role: h.shape for role, h in roles.items() if role != "alpha"} for name, roles in layers.items()}
    ranks = dict(sorted(Counter(filter(None, map(rank, shapes.values()))).items()))
    return FileOutline(fits, fits.families or ("",), methods_of(shapes.values()), ranks, shapes)


def _inspected(source: Opened, norms: bool) -> Inspection:
    tensors, metadata, where = source
    fits = fit(tensors, metadata, where)
    layers = _with_numbers(_grouped(source, fits))
    _, families, methods, ranks, shapes = _outlined(fits, layers)
    alphas = {name: _number(roles.get("alpha")) for name, roles in layers.items()}
    seen = measured(layers, {name for name, alpha in alphas.items() if alpha == 0}) if norms else TensorFacts()
    return Inspection(
        path=where,
        format=fits.format,
        family=families[0],
        alternatives=families[1:],
        confidence=fits.confidence(len(tensors)),
        methods=tuple(sorted(methods)),
        components=tuple(dict.fromkeys(name.partition(".")[0] for name in layers)),
        layers=len(layers),
        tensors=len(tensors),
        bytes=sum(map(io.nbytes, tensors.values())),
        dtypes=dict(Counter(handle.dtype for handle in tensors.values()).most_common()),
        ranks=ranks,
        alphas=dict(Counter(alphas.values()).most_common()),
        blocks=dict(Counter(map(block_of, layers))),
        carried=tuple(key for key in tensors if key not in fits.parts),
        trigger_words=trigger_words(metadata),
        metadata=metadata,
        readable_by=readers(fits.format, methods, families[0], shapes, metadata),
        norms=seen.norms,
        dead=seen.dead,
        nonfinite=seen.nonfinite,
    )


def _grouped(source: Opened, fits: Fit) -> dict[str, dict[str, Handle]]:
    """{component.layer as the file spells it: {role: handle}}."""
    layers: dict[str, dict[str, Handle]] = {}
    fmt = FORMATS[fits.format]
    table = table_of(fmt, fits.families[0] if fits.families else "")
    unsaid = bare(table, {part.layer for part in fits.parts.values() if not part.word}, fmt, source.metadata)
    for key, part in fits.parts.items():
        component = fmt.component(part.word, table) if part.word else unsaid
        layers.setdefault(dotted(component, part.layer), {})[part.role] = source.tensors[key]
    return layers


def _with_numbers(layers: dict[str, dict[str, Handle]]) -> dict[str, dict[str, Handle]]:
    """The same with the alphas read."""
    scaled = [roles for roles in layers.values() if "alpha" in roles]
    for roles, alpha in zip(scaled, io.held(roles["alpha"] for roles in scaled), strict=True):
        roles["alpha"] = alpha
    return layers


def _number(alpha: Handle | None) -> float | None:
    """An alpha as a number; None if it is missing or several."""
    return None if alpha is None or math.prod(alpha.shape) != 1 else io.number(alpha)


def block_of(name: str) -> str:
    """The block that a layer is in: everything up to its first number (in a UNet's halves, and the text encoder's layers)."""
    match = re.match(r".*?(?:\d+(?=[._])|mid_block|middle_block)", name)
    return match[0] if match else name


class TensorFacts(NamedTuple):
    """What only the numbers tell; see Inspection."""

    norms: Mapping[str, float] | None = None
    dead: tuple[str, ...] | None = None
    nonfinite: tuple[str, ...] | None = None


def measured(layers: Mapping[str, Mapping[str, Handle]], off: Collection[str]) -> TensorFacts:
    """Norms by layer, the layers that are `off` or have a factor that is zero, and those with values that are not finite."""
    squares = {name: _squares(roles) for name, roles in layers.items()}
    totals = {name: sum(roles.values()) for name, roles in squares.items()}
    norms = {name: math.sqrt(total) if math.isfinite(total) else total for name, total in totals.items()}
    zero = {name for name, roles in squares.items() if any(roles[role] == 0 for role in roles.keys() - _BIASES)}
    dead = tuple(name for name in layers if name in zero or name in off)
    return TensorFacts(norms, dead, tuple(name for name, total in totals.items() if not math.isfinite(total)))


def _squares(roles: Mapping[str, Handle]) -> dict[str, float]:
    """The sum of squares of each tensor."""
    return {
        role: io.load([handle])[0].double().square().sum().item() for role, handle in roles.items() if role != "alpha"
    }


def by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms of blocks from norms of layers."""
    blocks: dict[str, float] = {}
    for name, norm in norms.items():
        blocks[block_of(name)] = math.hypot(blocks.get(block_of(name), 0.0), norm)
    return blocks


def listed_values(values: Iterable[float | str | None]) -> str:
    """Values for people."""
    return ", ".join("none" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _tags(text: str) -> str:
    """The most frequent parts of the captions that an adapter was trained on, of all folders together; empty where the file tells none."""
    try:
        folders = parsed(text)
    except ValueError:
        return ""
    counts: Counter[str] = Counter()
    for tags in folders.values():
        for tag, n in tags.items() if isinstance(tags, dict) else ():
            counts[tag] += n if type(n) is int else 0
    most = [f"{words(tag)[:100]} {n}" for tag, n in counts.most_common(TAGS) if n > 0]
    return ", ".join(most) + (f" and {len(counts) - TAGS} more" if len(counts) > TAGS else "")

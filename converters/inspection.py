"""inspect: what an adapter file is, from its header; norms and values on request. Without norms no torch is imported."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.detection import Fit, bare, fit
from converters.families import Table
from converters.formats import FORMATS
from converters.opening import Opened, Source, opened
from converters.roles import split
from diffpeft import io
from diffpeft.bundle import Handle, dotted, trigger_words
from diffpeft.errors import inside
from diffpeft.methods.layout import named
from diffpeft.methods.shapes import rank

# which programs read a format as it is: {format: (of LoRA and DoRA, of the other methods)}
READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kohya": (("sd-scripts", "A1111", "ComfyUI", "diffusers"), ("A1111", "ComfyUI", "LyCORIS")),
    "diffusers": (("diffusers", "ComfyUI"), ()),
    "peft": (("PEFT", "transformers"), ("PEFT",)),
    "kohya-diffusers": (("sd-scripts", "A1111", "ComfyUI", "diffusers"), ("A1111", "ComfyUI", "LyCORIS")),
    "comfyui": (("ComfyUI",), ("ComfyUI",)),
    "lycoris": (("LyCORIS", "ComfyUI"), ("LyCORIS", "ComfyUI")),
    "diffusers-old": (("diffusers", "ComfyUI"), ()),
    "xlabs": (("x-flux", "ComfyUI", "diffusers"), ()),
    "bfl": (("diffusers", "ComfyUI"), ("diffusers", "ComfyUI")),
    "safeloras": (("cloneofsimo/lora",), ()),
    "onetrainer": (("OneTrainer", "ComfyUI", "diffusers"), ("OneTrainer", "ComfyUI")),
}


@dataclass(frozen=True)
class Inspection:
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


def inspect(source: Source, *, norms: bool = False) -> Inspection:
    """What a file, a PEFT folder or a dict of tensors is. Reads the header and the alphas; with `norms` every tensor, one at a time.

    `norms` {layer: sqrt of the sum of squares of all its tensors}; `dead` layers have an alpha of 0 or a factor that is all zeros, so that they
    change nothing; `nonfinite` ones hold NaN or Inf. Raises UnreadableFileError, UnknownKeysError or UnsafeFileError.
    """
    own = opened(source)
    with inside(own.where):
        return _inspected(own, norms)


def _inspected(source: Opened, norms: bool) -> Inspection:
    tensors, metadata, where = source
    found = fit(tensors, metadata, where)
    format, families = found.format, found.families or ("",)
    groups, carried = _grouped(tensors, found, FORMATS[format].tables.get(families[0], Table({})), metadata)
    shapes = {n: {role: h.shape for role, h in own.items() if role != "alpha"} for n, own in groups.items()}
    methods = {m for own in shapes.values() for method, roles in split(own).items() for m in named(method, roles)}
    numbers = {n: _number(own.get("alpha")) for n, own in groups.items()}
    alphas = Counter(numbers.values())
    rows: dict[str, Any] = {}
    if norms:
        sizes, zero, broken = _measured(groups)
        off = {name for name, alpha in numbers.items() if alpha == 0}
        rows = {"norms": sizes, "dead": tuple(n for n in groups if n in zero | off), "nonfinite": tuple(broken)}
    return Inspection(
        path=where,
        format=format,
        family=families[0],
        alternatives=families[1:],
        confidence=found.confidence(len(tensors)),
        methods=tuple(sorted(methods)),
        components=tuple(dict.fromkeys(name.partition(".")[0] for name in groups)),
        layers=len(groups),
        tensors=len(tensors),
        bytes=sum(math.prod(h.shape) * io.SIZES[h.dtype] for h in tensors.values()),
        dtypes=dict(Counter(h.dtype for h in tensors.values()).most_common()),
        ranks=dict(sorted(Counter(r for own in shapes.values() if (r := rank(own))).items())),
        alphas=dict(alphas.most_common()),
        blocks=dict(Counter(block_of(name) for name in groups)),
        carried=tuple(carried),
        trigger_words=trigger_words(metadata),
        metadata=metadata,
        readable_by=readers(format, methods, families[0]),
        **rows,
    )


def readers(format: str, methods: Collection[str], family: str = "any") -> tuple[str, ...]:
    """The programs that read these methods in a format. diffusers drops the magnitudes of a DoRA that is not in its own. What they make of a model of
    an unknown family nobody knows, but that PEFT asks the model itself.
    """
    low_rank, others = READERS[format]
    if not family and not FORMATS[format].folder:
        return ()
    if not {*methods} <= {"lora", "dora"}:
        return others
    return tuple(name for name in low_rank if name != "diffusers" or format == name or "dora" not in methods)


def _grouped(
    tensors: Mapping[str, Handle], found: Fit, table: Table, metadata: Mapping[str, str]
) -> tuple[dict[str, dict[str, Handle]], list[str]]:
    """{component.layer as the file spells it: {role: handle}}, and the keys that are no adapter's."""
    groups: dict[str, dict[str, Handle]] = {}
    fmt = FORMATS[found.format]
    component = bare(table, {part.layer for part in found.parts.values() if not part.word}, fmt, metadata)
    for key, part in found.parts.items():
        word = fmt.component(part.word, table) if part.word else component
        groups.setdefault(dotted(word, part.layer), {})[part.role] = tensors[key]
    alphas = [own for own in groups.values() if "alpha" in own]
    for own, alpha in zip(alphas, io.held(own["alpha"] for own in alphas), strict=True):
        own["alpha"] = alpha
    return groups, [key for key in tensors if key not in found.parts]


def _number(alpha: Handle | None) -> float | None:
    """An alpha as a number; None if it is missing or several."""
    return None if alpha is None or math.prod(alpha.shape) != 1 else io.number(alpha)


def block_of(name: str) -> str:
    """The block that a layer is in: everything up to its first number (in a UNet's halves, and the text encoder's layers)."""
    match = re.match(r".*?(?:\d+(?=[._])|mid_block|middle_block)", name)
    return match[0] if match else name


def _measured(groups: Mapping[str, Mapping[str, Handle]]) -> tuple[dict[str, float], set[str], list[str]]:
    """Norms by layer, the layers with a factor that is zero, and those with values that are not finite."""
    sizes: dict[str, float] = {}
    zero: set[str] = set()
    broken = []
    for name, found in groups.items():
        total = 0.0
        for role, handle in found.items():
            if role == "alpha":
                continue
            square = io.load([handle])[0].double().square().sum().item()
            total += square
            if square == 0 and role not in ("diff_b", "lora_B_bias"):
                zero.add(name)
        sizes[name] = math.sqrt(total) if math.isfinite(total) else total
        if not math.isfinite(total):
            broken.append(name)
    return sizes, zero, broken


def by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms of blocks from norms of layers."""
    found: dict[str, float] = {}
    for name, norm in norms.items():
        found[block_of(name)] = math.hypot(found.get(block_of(name), 0.0), norm)
    return found


def listed_values(values: Iterable[Any]) -> str:
    """Values for people."""
    return ", ".join("none" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values)

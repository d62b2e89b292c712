"""verify: whether an adapter fits a model, by the model's configs alone: what load_lora would say of it, all at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffpeft import converters, io
from diffpeft.bundle import Bundle, Entry, parted
from diffpeft.converters.inspection import measured
from diffpeft.errors import CheckpointError, UnreadableFileError, UnsafeFileError, near
from diffpeft.methods.layout import LAYOUTS
from diffpeft.readable import Readable

if TYPE_CHECKING:
    from diffpeft.pipeline.match import LayersByComponent

MISSING, SIZES, UNFIT, INFINITE = "no such layer", "other sizes", "cannot be adapted", "not finite"
IDLE, ABSENT, CARRIED = "change nothing", "of components that the model lacks", "keys that are no adapter's"
Findings = dict[str, list[str]]  # {kind: what was found, a line each}


@dataclass(frozen=True, repr=False)
class Verification(Readable):
    """Whether an adapter fits a model.

    Args:
        family: of the file; `model_family`: of the model. Empty if unknown.
        layers: how many of the file's layers fit; `of`: how many it has.
        problems: {kind: details}, for which load_lora refuses the file: layers that the model lacks, other sizes, layers that cannot be adapted, NaN or Inf;
            or what the file as a whole is refused for.
        notes: {kind: names}: layers that change nothing, of components that the model lacks, keys that are no adapter's.
    """

    path: str
    model: str
    format: str
    family: str
    model_family: str
    layers: int
    of: int
    problems: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def _title(self) -> str:
        return f"{self.path} {'fits' if self.fits else 'does not fit'} {self.model}"

    @property
    def fits(self) -> bool:
        """Whether load_lora would take it."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    model: str | None = None,
    *,
    base: str | None = None,
    family: str | None = None,
    values: bool = True,
) -> Verification:
    """Say whether an adapter fits a model, without loading the model: names, sizes and kinds of layers by its configs; and whether all numbers are finite.

    Args:
        model: a diffusers folder, a single file (with `base`: whose configs) or a Hub id; default: the embedded base.
        family: of the adapter, if that is not what the file looks like.
        values: whether tensors are read, one at a time, for NaN, Inf and zeros; else only the header is.

    Raises UnreadableFileError or UnsafeFileError for a file that is none, CheckpointError for a model that is none.
    """
    from diffpeft.converters import located
    from diffpeft.families import family_of
    from diffpeft.model.target import components, walked
    from diffpeft.pipeline.load import Hints, read_for
    from diffpeft.pipeline.open import weightless

    file, target = located(path), weightless(model, base)
    layers: LayersByComponent = {name: walked(part)[0] for name, part in components(target).items()}
    where, theirs = (str(path), str(model or "the embedded base")), family_of(target) or ""
    try:
        bundle = read_for(target, file, layers, Hints(family=family))
        problems, notes = _judged(bundle, target, layers)
    except (UnreadableFileError, UnsafeFileError):
        raise
    except CheckpointError as error:
        fits = converters.fitting(file)
        told = {error.what: [error.remedy]}
        return Verification(*where, fits.format, next(iter(fits.families), ""), theirs, 0, fits.layers, told)
    if values:
        _read_through(bundle, problems, notes)
    names = {layer for entry in bundle.entries for layer in entry.targets}
    bad = {line.partition(":")[0] for lines in problems.values() for line in lines} | {*notes.get(ABSENT, ())}
    return Verification(*where, bundle.format, bundle.family, theirs, len(names - bad), len(names), problems, notes)


def _judged(bundle: Bundle, target: object, layers: LayersByComponent) -> tuple[Findings, Findings]:
    """What is wrong with each layer, and what is worth knowing. Raises CheckpointError for a file that is refused as a whole."""
    from diffpeft.model.target import components
    from diffpeft.pipeline.match import owners_of, refuse_base_keys

    refuse_base_keys(bundle, components(target))
    owners = owners_of(layers)
    seen: Findings = {}
    for entry in itertools.chain.from_iterable(map(_parts, bundle.entries)):
        for kind, line in _wrong(bundle, entry, layers, owners) or [("", "")]:
            seen.setdefault(kind, []).append(line)
    problems = {kind: lines for kind, lines in seen.items() if kind not in ("", ABSENT)}
    notes = {ABSENT: seen[ABSENT]} if ABSENT in seen else {}
    if MISSING in problems:
        problems[MISSING][0] = ": ".join(filter(None, (problems[MISSING][0], near(problems[MISSING][0], owners))))
    if "" not in seen and not problems:
        problems["no tensor of this adapter fits the model"] = notes.get(ABSENT, [])[:1]
    return problems, notes | ({CARRIED: list(bundle.carried)} if bundle.carried else {})


def _parts(entry: Entry) -> list[Entry]:
    """An entry for each of the model's layers, where the rows of a joint one come apart."""
    from diffpeft.converters.rows import Unfit, split

    try:
        return split(entry)
    except Unfit:
        return [entry]


def _wrong(
    bundle: Bundle, entry: Entry, layers: LayersByComponent, owners: Mapping[str, tuple[str, str]]
) -> list[tuple[str, str]]:
    """(kind, what is wrong), of an entry that does not fit, or whose layers are not there."""
    if lacking := [layer for layer in entry.targets if layer not in owners]:
        known = [layer for layer in lacking if parted(layer)[0] in layers]
        return [(MISSING, layer) for layer in known] or [(ABSENT, layer) for layer in lacking]
    return list(_misfits(bundle, entry, layers, [owners[layer] for layer in entry.targets]))


def _misfits(
    bundle: Bundle, entry: Entry, layers: LayersByComponent, places: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong) of an entry whose layers are there."""
    from diffpeft.layers.hooks import refusal
    from diffpeft.pipeline.joint import check_joint
    from diffpeft.pipeline.match import misfits, spec_of

    modules = [layers[component][layer] for component, layer in places]
    try:
        if len(modules) > 1:
            check_joint(entry, [module for module, _ in modules], bundle.source)
        else:
            yield from ((SIZES, line) for line in misfits(bundle, entry, spec_of(entry, modules[0][0])))
    except CheckpointError as error:
        yield SIZES, f"{entry.layer}: {error.what}"
    for (module, parent), (_, layer) in zip(modules, places, strict=True):
        if why := refusal(module, parent, layer):
            yield UNFIT, f"{entry.layer}: {why}"


def _read_through(bundle: Bundle, problems: Findings, notes: Findings) -> None:
    """Add what only the numbers tell. One tensor is in memory at a time."""
    tensors = {entry.layer: entry.tensors for entry in bundle.entries}
    off = {e.layer for e in bundle.entries if LAYOUTS[e.method].alpha == "scale" and io.number(e.alpha) == 0}
    seen = measured(tensors, off)
    if seen.nonfinite:
        problems[INFINITE] = list(seen.nonfinite)
    if seen.dead:
        notes[IDLE] = list(seen.dead)

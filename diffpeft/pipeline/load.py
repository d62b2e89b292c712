"""load_lora and save_lora: from a file onto a pipeline and back. All checks first, then a commit that cannot fail."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpeft import converters, io
from diffpeft.bundle import Bundle, Entry, dotted, parted
from diffpeft.converters.locating import Where, located, name_in
from diffpeft.converters.sizes import grouped
from diffpeft.errors import (
    CheckpointWarning,
    ConfigError,
    WrongBaseError,
    inside,
    listed,
    one_of,
    shown,
)
from diffpeft.families import family_of, is_unnamed
from diffpeft.layers.carried import base_class
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods.layout import LAYOUTS
from diffpeft.model.attach import OVERSIZED, install, mixes_of, oversized, refuse_duplicate
from diffpeft.model.mix import Adapter, Mix, check_mix, check_name, check_strength
from diffpeft.model.plan import Plan, planned
from diffpeft.model.state import bundle_of
from diffpeft.model.target import components, walked
from diffpeft.pipeline.joint import separated
from diffpeft.pipeline.match import LayersByComponent, in_memory, matched
from diffpeft.readable import Readable, family_in_words, keys_in_words

log = logging.getLogger(__name__)

_FILES = ("diffusers", "kohya", "kohya-diffusers", "lycoris")  # formats of one file, the preferred one first


Source = str | os.PathLike[str] | Mapping[str, Tensor] | Bundle
Shapes = Mapping[str, Mapping[str, tuple[int, ...] | None]]  # {component: {layer: the shape of its canonical weight}}


class Hints(NamedTuple):
    """What the user says of a source beside itself: see `load_lora`."""

    family: str | None = None
    where: Where = {}  # noqa: RUF012
    alpha: float | None = None


@dataclass(frozen=True, repr=False)
class LoadReport(Readable):
    """What a load did. `matched` are the layers adapted, `carried` the keys that were kept but not applied."""

    name: str
    format: str
    family: str
    methods: frozenset[str]
    matched: tuple[str, ...]
    carried: tuple[str, ...]
    trigger_words: tuple[str, ...]

    def _title(self) -> str:
        return self.name

    def _rows(self) -> dict[str, str]:
        components = dict.fromkeys(parted(layer)[0] or "the model" for layer in self.matched)
        return {
            "format": self.format,
            "family": family_in_words(self.family),
            "methods": ", ".join(sorted(self.methods)),
            "layers": f"{len(self.matched)} in {', '.join(components)}",
            "trigger words": ", ".join(self.trigger_words),
            "without effect": keys_in_words(self.carried),
        }


def load_lora(
    target: object,
    source: Source,
    *,
    name: str | None = None,
    weight: float = 1.0,
    strict: bool = True,
    trainable: bool = False,
    max_rank: int | None = None,
    family: str | None = None,
    revision: str | None = None,
    filename: str | None = None,
    alpha: float | None = None,
    active: bool = True,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LoadReport:
    """Load an adapter onto a pipeline (or one of its models) and activate it at strength `weight`, after those already active.

    Args:
        source: a .safetensors file, a folder with one, a PEFT folder, a dict of tensors, a Bundle, a Hub id, or a link to the Hub.
        name: default: the file's name without its ending. `adapter_name` is the same, as diffusers calls it.
        strict: False carries an adapter's tensors for layers that the model lacks, with a warning, instead of refusing the file.
        trainable: the tensors get gradients, and are float32.
        max_rank: room for LoRAs of up to this rank, that `replace` may put in the place of this one.
        family: overrides the detected family.
        alpha: of layers for which the file tells none (PEFT's names without a config): the update is alpha / rank * B A. Default: the rank.
        active: False leaves the adapter off until `set_adapters` names it.
        filename, subfolder: which file of a folder or a repository, where several may be meant; `weight_name` is the same as `filename`.
        revision, token, cache_dir: of a repository on the Hub.

    Raises CheckpointError and its kin, UnknownNameError, ConfigError or AdapterStateError, in which case nothing has changed.
    """
    file = one_of(filename=filename, weight_name=weight_name)
    name = one_of(name=name, adapter_name=adapter_name)
    name = _default_name(source, file) if name is None else name
    check_name(name)
    check_strength(name, weight)
    check_max_rank(max_rank, trainable)
    where: Where = {
        "filename": file,
        "subfolder": subfolder,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
    }
    parts, hints, strength = components(target), Hints(family, where, alpha), weight if active else None
    with _uncollected(), planned(parts) as plan:
        report = _plan_loaded(
            plan, target, parts, source, hints, name, strength, strict=strict, trainable=trainable, max_rank=max_rank
        )
    log.info("loaded %r", report)
    return report


def _plan_loaded(
    plan: Plan,
    target: object,
    parts: Mapping[str, nn.Module],
    source: Source,
    hints: Hints,
    name: str,
    strength: float | None,
    *,
    strict: bool,
    trainable: bool,
    max_rank: int | None,
) -> LoadReport:
    """Plan a load, under the locks of its components: open, match, plan, report."""
    walks = {component: walked(model) for component, model in parts.items()}
    layers = {component: by_layer for component, (by_layer, _) in walks.items()}
    mixes = mixes_of(parts, {component: adapted for component, (_, adapted) in walks.items()})
    refuse_duplicate(name, mixes.values())
    bundle = opened(target, source, layers, hints)
    with inside(bundle.source):
        slots, absent = matched(bundle, parts, layers, strict=strict, trainable=trainable, max_rank=max_rank)
        _plan_slots(plan, name, strength, bundle, slots, absent, parts, layers, mixes)
    report = report_of(name, bundle, slots, absent)
    _warn(report, bundle, slots)  # before the commit: a warning may be an error
    return report


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: a load makes tens of thousands of objects that all stay, and each full collection walks the whole program's."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def check_max_rank(max_rank: int | None, trainable: bool) -> None:
    """Raise ConfigError for what is no rank, or for an adapter that is to be trained."""
    if max_rank is not None and (not isinstance(max_rank, int) or max_rank < 1):
        raise ConfigError(f"max_rank is {shown(max_rank)}", remedy="It is a whole number of at least 1.")
    if max_rank is not None and trainable:
        raise ConfigError("max_rank is for adapters that are not trained", remedy="Leave out trainable=True.")


def opened(target: object, source: Source, layers: LayersByComponent, hints: Hints) -> Bundle:
    """What is to be loaded, in the model's own layers. Raises CheckpointError and its kin."""
    return separated(read_for(target, source, layers, hints), layers)


def read_for(target: object, source: Source, layers: LayersByComponent, hints: Hints) -> Bundle:
    """What is to be loaded, joint layers as the file has them. Raises CheckpointError and its kin."""
    expected = hints.family or family_of(target)
    if isinstance(source, Bundle):
        bundle = source
        if expected is not None and bundle.family and expected not in (bundle.families or (bundle.family,)):
            raise _wrong_base(bundle.families or (bundle.family,), expected, bundle.source)
    else:
        shapes = {c: {n: _shape(m) for n, (m, _) in by.items() if _has_weights(m)} for c, by in layers.items()}
        bundle = _read(located(source, **hints.where), expected, hints.family, shapes, hints.alpha)
    if expected is None and is_unnamed(target):
        bundle = replace(bundle, family="", families=())
    return bundle


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of a layer's canonical weight."""
    site = site_of(base_class(module))
    return site.geometry_of(module).shape if site is not None else None


def _has_weights(module: nn.Module) -> bool:
    """Whether a layer has parameters: a norm without any can be named, but has nothing to adapt."""
    parameters = module._parameters
    return parameters.get("weight") is not None or any(p is not None for p in parameters.values())


def save_lora(
    target: object,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, object] | None = None,
    overwrite: bool = True,
) -> None:
    """Write an adapter to `path`, whole or not at all: a .safetensors file, or under any other name a PEFT folder.

    Args:
        name: may be left out if there is only one.
        format: one of converters.FORMATS; default: for a file the first of diffusers, kohya, kohya-diffusers and lycoris that can hold the adapter,
            for a folder peft. A model without a table has those formats that use its own names: diffusers, peft, kohya-diffusers, lycoris.
        dtype: of the factors; default: as they are stored.
        metadata: added to what the adapter's own file held.
        overwrite: False refuses an output that is there already, with a ConfigError; else it is replaced, as a whole or not at all.
    """
    if name is None:
        known = {n for mix in mixes_of(components(target)).values() for n in mix.adapters}
        if len(known) != 1:
            raise ConfigError(
                f"there are {len(known)} adapters",
                remedy=f"Say name=, one of {', '.join(sorted(known))}." if known else "Load or attach one first.",
            )
        name = known.pop()
    bundle = bundle_of(target, name, family_of(target) or "")
    bundle.metadata |= {str(k): str(v) for k, v in (metadata or {}).items()}
    if format is None:
        formats = _FILES if os.fspath(path).endswith(".safetensors") else ("peft",)
        format = next((f for f in formats if not converters.refusal(bundle, f)), formats[0])
    converters.write(bundle, path, format=format, dtype=dtype, overwrite=overwrite)
    log.info("saved %r as %s: %s", name, format, path)


def _default_name(source: Source, filename: str | None) -> str:
    """The file's name without its ending, with nothing in it but letters, digits, dots, underscores and hyphens."""
    if not isinstance(source, (str, os.PathLike)):
        return "default"
    stem = name_in(source, filename)
    return re.sub(r"[^A-Za-z0-9._-]", "_", "" if stem == ".." else stem)[:128] or "default"


def _read(
    source: Path | Mapping[str, Tensor],
    expected: str | None,
    family: str | None,
    shapes: Shapes,
    alpha: float | None,
) -> Bundle:
    """The Bundle behind a file or dict. `expected` is the pipeline's family, or the one that the user names (`family`).

    The family comes first: in a file for another one no key is worth a complaint. Where a file is of no known family, and this pipeline's has some of
    its layers, what is wrong with it are the others.
    """
    if family is not None:
        return converters.read(source, family=family, names=shapes, fits=None, alpha=alpha)
    fits = converters.fitting(source, expected)
    partly = not fits.families and not fits.looks_like and fits.known.get(expected or "")
    if expected is not None and expected not in fits.families and not partly and not _fills(fits, expected, shapes):
        where = "a dict of tensors" if isinstance(source, Mapping) else source
        if fits.families:
            raise _wrong_base(fits.families, expected, where)
        raise converters.unknown_family(fits, where, expected)
    return converters.read(source, family=expected, names=shapes, fits=fits, alpha=alpha)


def _fills(fits: converters.Fit, family: str, shapes: Shapes) -> bool:
    """Whether a file has layers in all blocks of a transformer, and in no others, and its family's names: then it is for it, whatever model is published
    in that size.
    """
    blocks = grouped((layer, None) for by_layer in shapes.values() for layer in by_layer).blocks.values()
    theirs = grouped((part.layer, None) for part in fits.parts.values()).blocks.values()
    knows = fits.known.get(family) == fits.layers and "unet" not in shapes
    return bool(knows and theirs and all(numbers in blocks for numbers in theirs))


def _wrong_base(families: Sequence[str], expected: str, where: object) -> WrongBaseError:
    them = " or ".join(families)
    return WrongBaseError(
        f"the adapter is for {them}, this pipeline is {expected}", where=where, remedy=f"Use a pipeline of {them}."
    )


def _entry_in_memory(entry: Entry) -> Entry:
    return replace(
        entry,
        tensors={role: in_memory(h) for role, h in entry.tensors.items()},
        alpha=in_memory(entry.alpha),
    )


def _plan_slots(
    plan: Plan,
    name: str,
    strength: float | None,
    bundle: Bundle,
    slots: Mapping[str, Mapping[str, Slot]],
    absent: Sequence[Entry],
    parts: Mapping[str, nn.Module],
    layers: LayersByComponent,
    mixes: Mapping[str, Mix],
) -> None:
    """Plan the slots. What the file holds beside them goes to the first component that gets some."""
    changed: list[Mix] = []
    beside = beside_of(bundle, absent)
    for component, by_layer in slots.items():
        if by_layer:
            modules = {layer: layers[component][layer][0] for layer in by_layer}
            adapter = Adapter(name, tuple(by_layer), **beside)
            mix = install(plan, component, modules, by_layer, mixes.get(component), adapter, strength)
            plan.root(parts[component], mix)
            changed.append(plan.view(mix))
            beside = {}
    check_mix({name: 1.0 if strength is None else strength}, changed)


def beside_of(bundle: Bundle, absent: Sequence[Entry]) -> dict[str, Any]:
    """What an Adapter holds beside its slots."""
    return {
        "metadata": bundle.metadata,
        "carried": {key: in_memory(h) for key, h in bundle.carried.items()},
        "absent": tuple(map(_entry_in_memory, absent)),
    }


def report_of(
    name: str, bundle: Bundle, slots: Mapping[str, Mapping[str, Slot]], absent: Sequence[Entry]
) -> LoadReport:
    """What a load did: the layers with slots, and the keys that were kept without effect."""
    names = [dotted(component, layer) for component, by_layer in slots.items() for layer in by_layer]
    carried = (*bundle.carried, *(key for e in absent for key in e.keys or (e.layer,)))
    methods = frozenset(bundle.methods)
    return LoadReport(name, bundle.format, bundle.family, methods, tuple(names), carried, bundle.trigger_words)


def _warn(report: LoadReport, bundle: Bundle, slots: Mapping[str, Mapping[str, Slot]]) -> None:
    """Say what was kept without effect, and what is unusual."""
    idle = [e.layer for e in bundle.entries if LAYOUTS[e.method].alpha != "bound" and io.number(e.alpha) == 0]
    large = [layer for by_layer in slots.values() for layer in oversized(by_layer)]
    for what, names in (
        ("tensors are kept but have no effect here", report.carried),
        ("layers have alpha 0 and no effect", idle),
        (OVERSIZED, large),
    ):
        if names:
            warnings.warn(
                f"adapter {report.name!r}: {len(names)} {what}: {listed(names, 5)}", CheckpointWarning, stacklevel=4
            )

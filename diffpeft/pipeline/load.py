"""load_lora and save_lora: from a file onto a pipeline and back. All checks first, then a commit that cannot fail."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import converters
from converters.sizes import grouped
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle, dotted
from diffpeft.errors import (
    ConfigError,
    WrongBaseError,
    inside,
    listed,
    shown,
)
from diffpeft.families import family_of, is_unnamed
from diffpeft.layers.carried import base_class
from diffpeft.layers.site import site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods.layout import LAYOUTS
from diffpeft.model.attach import OVERSIZED, install, mixes_of, oversized, refuse_duplicate
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Adapter, Mix, check_mix, check_name, check_strength
from diffpeft.model.plan import Plan
from diffpeft.model.state import bundle_of
from diffpeft.model.target import components, walked
from diffpeft.pipeline.fused import unfused
from diffpeft.pipeline.locate import located
from diffpeft.pipeline.match import Layers, kept, matched

_FILES = ("diffusers", "kohya", "kohya-diffusers", "lycoris")  # formats of one file, the preferred one first


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `matched` are the layers adapted, `carried` the keys that were kept but not applied."""

    name: str
    format: str
    family: str
    methods: frozenset[str]
    matched: tuple[str, ...]
    carried: tuple[str, ...]
    trigger_words: tuple[str, ...]


def load_lora(
    target: Any,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Bundle,
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
) -> LoadReport:
    """Load an adapter onto a pipeline (or one of its models) and activate it at strength `weight`, after those already active.

    Args:
        source: a .safetensors file, a folder with one, a PEFT folder, a dict of tensors, a Bundle, or a Hub id (`revision`, `filename`).
        name: default: the file's name without its ending.
        strict: False carries an adapter's tensors for layers that the model lacks, with a warning, instead of refusing the file.
        trainable: the tensors get gradients, and are float32.
        max_rank: room for LoRAs of up to this rank, that `replace` may put in the place of this one.
        family: overrides the detected family.
        alpha: of layers for which the file tells none (PEFT's names without a config): the update is alpha / rank * B A. Default: the rank.

    Raises CheckpointError and its kin, UnknownNameError, ConfigError or AdapterStateError, in which case nothing has changed.
    """
    name = _default_name(source) if name is None else name
    check_name(name)
    check_strength(name, weight)
    check_max_rank(max_rank, trainable)
    parts = components(target)
    with exclusive(parts), _uncollected():
        walks = {component: walked(model) for component, model in parts.items()}
        layers = {component: found for component, (found, _) in walks.items()}
        mixes = mixes_of(parts, {component: adapted for component, (_, adapted) in walks.items()})
        refuse_duplicate(name, mixes.values())
        bundle = opened(target, source, layers, family=family, revision=revision, filename=filename, alpha=alpha)
        with inside(bundle.source):
            slots, absent = matched(bundle, parts, layers, strict=strict, trainable=trainable, max_rank=max_rank)
            plan = _planned(name, weight, bundle, slots, absent, parts, layers, mixes)
        report = report_of(name, bundle, slots, absent)
        _warn(report, bundle, slots)  # before the commit: a warning may be an error
        plan.commit()
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


def opened(
    target: Any,
    source: Any,
    layers: Layers,
    *,
    family: str | None,
    revision: str | None,
    filename: str | None,
    alpha: float | None = None,
) -> Bundle:
    """What is to be loaded, in the model's own layers. Raises CheckpointError and its kin."""
    own = family or family_of(target)
    if isinstance(source, Bundle):
        bundle = source
        if own is not None and bundle.family and own not in (bundle.families or (bundle.family,)):
            raise _wrong_base(bundle.families or (bundle.family,), own, bundle.source)
    else:
        names = {c: {n: _shape(m) for n, (m, _) in found.items() if _has_weights(m)} for c, found in layers.items()}
        bundle = _read(located(source, revision, filename), own, family, names, alpha)
    if own is None and is_unnamed(target):
        bundle = replace(bundle, family="", families=())
    return unfused(bundle, layers)


def _shape(module: Any) -> tuple[int, ...] | None:
    """The shape of a layer's canonical weight."""
    site = site_of(base_class(module))
    return site.geometry_of(module).shape if site is not None else None


def _has_weights(module: Any) -> bool:
    """Whether a layer has parameters: a norm without any can be named, but has nothing to adapt."""
    return any(p is not None for p in module._parameters.values())


def save_lora(
    target: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter to `path`, whole or not at all: a .safetensors file, or under any other name a PEFT folder.

    Args:
        name: may be left out if there is only one.
        format: one of converters.FORMATS; default: for a file the first of diffusers, kohya, kohya-diffusers and lycoris that can hold the adapter,
            for a folder peft. A model without a table has those formats that use its own names: diffusers, peft, kohya-diffusers, lycoris.
        dtype: of the factors; default: as they are stored.
        metadata: added to what the adapter's own file held.
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
    converters.write(bundle, path, format=format, dtype=dtype)


def _default_name(source: Any) -> str:
    if not isinstance(source, (str, os.PathLike)):
        return "default"
    stem = Path(source).name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9._-]", "_", "" if stem == ".." else stem)[:128] or "default"


def _read(
    source: Any, own: str | None, family: str | None, names: Mapping[str, Mapping[str, Any]], alpha: float | None
) -> Bundle:
    """The Bundle behind a file or dict. The family comes first: in a file for another one no key is worth a complaint. Where a file is of no known
    family, and this pipeline's has some of its layers, what is wrong with it are the others.
    """
    found = None
    if family is None:
        found = converters.fitting(source, own)
        partly = not found.families and not found.looks_like and found.known.get(own or "")
        if own is not None and own not in found.families and not partly and not _fills(found, own, names):
            where = "a dict of tensors" if isinstance(source, Mapping) else source
            raise (
                _wrong_base(found.families, own, where)
                if found.families
                else converters.unknown_family(found, where, own)
            )
        family = own
    return converters.read(source, family=family, names=names, fits=found, alpha=alpha)


def _fills(found: converters.Fit, own: str, names: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a file has layers in all blocks of a transformer, and in no others, and its family's names: then it is for it, whatever model is published
    in that size.
    """
    blocks = grouped((layer, None) for layers in names.values() for layer in layers).blocks.values()
    theirs = grouped((part.layer, None) for part in found.parts.values()).blocks.values()
    knows = found.known.get(own) == found.layers and "unet" not in names
    return bool(knows and theirs and all(numbers in blocks for numbers in theirs))


def _wrong_base(fits: Sequence[str], own: str, where: object) -> WrongBaseError:
    them = " or ".join(fits)
    return WrongBaseError(
        f"the adapter is for {them}, this pipeline is {own}", where=where, remedy=f"Use a pipeline of {them}."
    )


def _entry_kept(entry: Entry) -> Entry:
    return replace(
        entry,
        tensors={role: kept(h) for role, h in entry.tensors.items()},
        alpha=kept(entry.alpha) if isinstance(entry.alpha, Handle) else entry.alpha,
    )


def _planned(
    name: str,
    weight: Any,
    bundle: Bundle,
    slots: Mapping[str, Mapping[str, Slot]],
    absent: Sequence[Entry],
    parts: Mapping[str, nn.Module],
    layers: Layers,
    mixes: Mapping[str, Mix],
) -> Plan:
    """The writes. What the file holds beside the slots goes to the first component that gets some."""
    plan, changed = Plan(), []
    beside = beside_of(bundle, absent)
    for component, found in slots.items():
        if found:
            modules = {layer: layers[component][layer][0] for layer in found}
            adapter = Adapter(name, tuple(found), **beside)
            mix = install(plan, component, modules, found, mixes.get(component), adapter, weight)
            plan.root(parts[component], mix)
            changed.append(plan.view(mix))
            beside = {}
    check_mix({name: weight}, changed, layers)
    return plan


def beside_of(bundle: Bundle, absent: Sequence[Entry]) -> dict[str, Any]:
    """What an Adapter holds beside its slots."""
    return {
        "metadata": bundle.metadata,
        "carried": {key: kept(h) for key, h in bundle.carried.items()},
        "absent": tuple(map(_entry_kept, absent)),
    }


def report_of(
    name: str, bundle: Bundle, slots: Mapping[str, Mapping[str, Slot]], absent: Sequence[Entry]
) -> LoadReport:
    """What a load did."""
    names = [dotted(component, layer) for component, found in slots.items() for layer in found]
    carried = (*bundle.carried, *(key for e in absent for key in e.keys or (e.layer,)))
    methods = frozenset(bundle.methods)
    return LoadReport(name, bundle.format, bundle.family, methods, tuple(names), carried, bundle.trigger_words)


def _warn(report: LoadReport, bundle: Bundle, slots: Mapping[str, Mapping[str, Slot]]) -> None:
    """Say what was kept without effect, and what is unusual."""
    idle = [e.layer for e in bundle.entries if LAYOUTS[e.method].alpha != "bound" and io.number(e.alpha) == 0]
    large = [layer for found in slots.values() for layer in oversized(found)]
    for what, names in (
        ("tensors are kept but have no effect here", report.carried),
        ("layers have alpha 0 and no effect", idle),
        (OVERSIZED, large),
    ):
        if names:
            warnings.warn(f"adapter {report.name!r}: {len(names)} {what}: {listed(names[:5])}", stacklevel=3)

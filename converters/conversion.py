"""convert: file -> Bundle -> file, with a report of what became of every key."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

from diffpeft import io
from diffpeft.bundle import Bundle, Entry, parted
from diffpeft.converters.engine import read
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.base import magnitude_axis
from diffpeft.converters.formats.fields import on_inputs
from diffpeft.converters.holding import Held, held, refused
from diffpeft.converters.locating import Where, located
from diffpeft.converters.opening import Source
from diffpeft.converters.writing import check_path, files, planned, store, written
from diffpeft.definition import definition_of
from diffpeft.errors import ConfigError, UnknownNameError, inside, listed, near, shown
from diffpeft.files import refuse_existing
from diffpeft.handles import Scaled
from diffpeft.methods.layout import INNER, LAYOUTS
from diffpeft.methods.shapes import rank
from diffpeft.readable import Readable

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, repr=False)
class ConvertReport(Readable):
    """What a conversion did. Each key of the input is in `mapped` (part of an adapter) or in `carried` (kept as it is).

    `level`: L0 if the way back gives the same bytes, L1 if every weight is the same up to rounding.
    """

    level: str
    mapped: tuple[str, ...]
    carried: tuple[str, ...]
    warnings: tuple[str, ...]
    format: str
    family: str


def convert(
    source: Source,
    path: str | os.PathLike[str],
    *,
    to: str,
    family: str | None = None,
    format: str | None = None,
    dtype: torch.dtype | str | None = None,
    allow: str | None = None,
    overwrite: bool = True,
    **where: Unpack[Where],
) -> ConvertReport:
    """Write an adapter file as another format, whole or not at all.

    Args:
        to: one of converters.FORMATS.
        family, format: override what is detected.
        dtype: of the factors, a torch dtype or fp64, fp32, fp16, bf16; default: as they are stored.
        allow: "approximate" admits what loses more than rounding. (No conversion does so yet.)
        where: which file, as for `located`.
        overwrite: False refuses an output that is there already, as the command does; else it is replaced, as a whole or not at all.

    Where the format has no place for a method, LoHa, LoKr and Tucker forms become LoRAs of the same update (L1), with a warning that names the layers.
    Raises CannotConvertError, which names the layers and the reason, or CheckpointError.
    """
    if allow not in (None, "approximate"):
        raise ConfigError(f"allow is {shown(allow)}", remedy="It is 'approximate', or left out.")
    cast = dtype_named(dtype)
    check_path(path)
    source = located(source, **where)
    bundle = read(source, family=family, format=format)
    if isinstance(source, (str, os.PathLike)) and os.path.realpath(source) == os.path.realpath(path):
        raise ConfigError("the output is the input", where=path, remedy="Give another name.")
    with inside(bundle.source):
        UnknownNameError.check("format", to, FORMATS)
        report = _converted(bundle, path, to, cast, overwrite)
    log.info("converted %s to %s as %s: %s", bundle.source, path, to, report.level)
    return report


def _converted(
    bundle: Bundle, path: str | os.PathLike[str], to: str, cast: torch.dtype | None, overwrite: bool
) -> ConvertReport:
    asked = files(bundle, to, path)
    refuse_existing(written(asked, path, to), overwrite)
    parts = _of_one_adapter(bundle, {component: _fitted(part) for component, part in asked.items()})
    plans = {component: planned(part, cast) for component, part in parts.items()}
    store(plans, path, to)
    replaced = [entry for component, part in parts.items() for entry in _changed(asked[component], part)]
    inexact = [layer for plan in plans.values() for layer in plan.inexact]
    return _report(bundle, to, [part.bundle for part in parts.values()], replaced, inexact, cast)


def _of_one_adapter(bundle: Bundle, parts: Mapping[str, Held]) -> dict[str, Held]:
    """Parts of a bundle, each of the adapter that all of them are now."""
    if len(parts) < 2:
        return dict(parts)
    entries = {component: iter(part.bundle.entries) for component, part in parts.items()}
    adapter = replace(bundle, entries=[next(entries[parted(entry.layer)[0]]) for entry in bundle.entries])
    return {component: replace(part, adapter=adapter) for component, part in parts.items()}


def _report(
    bundle: Bundle,
    to: str,
    parts: Sequence[Bundle],
    replaced: Sequence[Entry],
    inexact: Sequence[str],
    cast: torch.dtype | None,
) -> ConvertReport:
    """What became of a bundle that was written in `parts`, of which entries were `replaced`, and layers have numbers that are `inexact`."""
    entries = [entry for part in parts for entry in part.entries]
    exact = not (replaced or inexact or cast or _folded(entries, to) or any(map(_is_computed, bundle.entries)))
    return ConvertReport(
        level="L0" if exact else "L1",
        mapped=_mapped(bundle),
        carried=tuple(bundle.carried),
        warnings=(*_told(bundle, replaced, inexact), *_caveats(entries, to)),
        format=bundle.format,
        family=bundle.family,
    )


def _mapped(bundle: Bundle) -> tuple[str, ...]:
    """The keys of the adapter: its layers', and what these share."""
    keys = [key for entry in bundle.entries for key in entry.keys]
    return tuple(dict.fromkeys([*keys, *(key for key in bundle.order if key not in bundle.carried)]))


def _is_computed(entry: Entry) -> bool:
    """Whether reading changed an entry's numbers."""
    return any(isinstance(handle.how, Scaled) for handle in entry.tensors.values())


def _fitted(part: Held) -> Held:
    """A bundle that the format holds: with LoRAs that do the same, where it cannot hold something else. Raises CannotConvertError."""
    if part.answer:
        return part
    expanded = _expanded(part)
    if expanded.answer:
        return expanded
    changed = _changed(part, expanded)
    left = {entry.layer for entry in part.bundle.entries if entry not in changed}
    raise refused(expanded if changed and left.issuperset(expanded.answer.layers) else part)


def _changed(before: Held, after: Held) -> list[Entry]:
    """The entries that were replaced."""
    entries = zip(before.bundle.entries, after.bundle.entries, strict=True)
    return [old for old, new in entries if old is not new]


def _told(bundle: Bundle, replaced: Sequence[Entry], inexact: Sequence[str]) -> list[str]:
    """What a user should know about a conversion, in words."""
    zero = [e.layer for e in bundle.entries if LAYOUTS[e.method].alpha != "bound" and io.number(e.alpha) == 0]
    told: dict[str, Sequence[str]] = {
        "layers were computed anew to do the same": [layer for entry in replaced for layer in entry.targets],
        "fused layers have parts of unequal scales, which went into the factors": inexact,
        "layers have alpha 0 and no effect": zero,
        "keys are no adapter's and were kept as they are": list(bundle.carried),
    }
    return [f"{len(names)} {fact}: {listed(names, 5)}" for fact, names in told.items() if names]


def _folded(entries: Sequence[Entry], to: str) -> list[str]:
    """The layers whose scale a format has no place for, so that it goes into their tensors."""
    return [] if FORMATS[to].folder else [entry.layer for entry in entries if "scale" in entry.options]


def _caveats(entries: Sequence[Entry], to: str) -> list[str]:
    """Where ComfyUI is known to do something else with a file of this format than other programs, in words."""
    doras = [e.layer for e in entries if magnitude_axis(e) == 0]
    rescaled = [e.layer for e in entries if "rescale" in e.tensors]
    loras = [e for e in entries if e.method in ("lora", "dora")]
    scaled = [e.layer for e in loras if (alpha := io.number(e.alpha)) is not None and alpha != rank(e.shapes)]
    told = {
        "comfyui": {
            "ComfyUI divides a DoRA by the norm of the base's weight alone": doras,
            "ComfyUI does not apply the rescale of a rotation": rescaled,
        },
        "diffusers": {"alphas stand in the metadata, which ComfyUI does not read (there the scale is 1)": scaled},
    }
    facts = {**told.get(to, {}), "alpha / r was multiplied into lokr_w1": _folded(entries, to)}
    return [f"{fact}: {len(layers)} layers" for fact, layers in facts.items() if layers]


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its short name, or as it is. Raises ConfigError for a name that is none."""
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype is {shown(dtype)}", remedy=f"{near(dtype, DTYPES)} It is one of {', '.join(DTYPES)}.".strip()
        )
    import torch

    return getattr(torch, DTYPES[dtype])


def _expanded(part: Held) -> Held:
    """The bundle with LoRAs in place of what the format cannot hold and a LoRA can say exactly, as far as there are such."""
    while not part.answer:
        entries = part.bundle.entries
        blamed = [bool({entry.layer, *entry.targets} & {*part.answer.layers}) for entry in entries]
        others = [_other_form(entry, part.format) if b else None for entry, b in zip(entries, blamed, strict=True)]
        if not any(others):  # what is to blame is a LoRA already, beside others
            others = [as_lora(entry) for entry in entries]
        if not any(others):
            break
        entries = [other or entry for entry, other in zip(entries, others, strict=True)]
        part = held(replace(part.bundle, entries=entries), part.format, part.adapter)
    return part


def _other_form(entry: Entry, to: str) -> Entry | None:
    """An entry that does the same, in a form that more formats hold."""
    return as_lora(entry) or _as_ia3(entry, to)


def as_lora(entry: Entry) -> Entry | None:
    """The same update as a plain LoRA of a rank below the layer's, in the dtype of the factors; None if there is none, or it is one.

    A file does not tell the kernel of a flattened convolution, so these stay as they are.
    """
    kernel = any(len(h.shape) > 2 for h in entry.tensors.values())
    plain = entry.method == "lora" and "lora_mid" not in entry.tensors
    hidden = re.search(r"conv[^.]*$|patch_embed|(pos_embed|x_embedder)\.proj$", entry.layer) and not kernel
    if plain or entry.method not in INNER or hidden:
        return None
    definition = definition_of(entry)
    method, (_, p, spec) = definition.additive, definition
    assert method is not None
    factors = method.factors(p, spec)
    if factors is None or (entry.method != "lora" and len(factors[0]) >= min(spec.geometry.out, spec.geometry.columns)):
        return None
    dtype = io.dtype_of(next(iter(entry.tensors.values())))
    A, B = factors[0].to(dtype), (method.scale(p, spec) * factors[1]).to(dtype)
    ones = (1,) * len(spec.geometry.kernel)
    A = A.reshape(len(A), spec.geometry.in_, *spec.geometry.kernel).contiguous()
    B = B.reshape(*B.shape[:2], *ones).contiguous()
    beside = {role: h for role, h in entry.tensors.items() if role in ("diff_b",)}
    tensors = {"lora_A": io.handle(A), "lora_B": io.handle(B), **beside}
    return replace(entry, method="lora", tensors=tensors, alpha=float(len(A)), options={})


def _as_ia3(entry: Entry, to: str) -> Entry | None:
    """(IA)^3 of a layer's inputs in the other program's way: PEFT stores factors, LyCORIS what they are above 1. None for outputs, where PEFT's
    factors are the bias's too, and if nothing is to do.
    """
    roles, inputs = {*entry.tensors}, io.number(entry.tensors["on_input"]) if "on_input" in entry.tensors else False
    if to == "peft" and inputs and "ia3_w" in roles:
        (w,) = io.load([entry.tensors["ia3_w"]])
        factors = (1 + w.double()).to(w.dtype).reshape(1, -1, *w.shape[2:])
        return replace(entry, tensors={"ia3_l": io.handle(factors)}, options={"feedforward": True})
    if to != "peft" and "ia3_l" in roles and on_inputs(entry):
        import torch

        (factors,) = io.load([entry.tensors["ia3_l"]])
        w = (factors.double() - 1).to(factors.dtype)
        w = w if w.ndim > 2 else w.flatten()
        tensors = {"ia3_w": io.handle(w), "on_input": io.handle(torch.tensor(True))}
        return replace(entry, tensors=tensors, options={})
    return None

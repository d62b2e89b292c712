"""convert: file -> Bundle -> file, with a report of what became of every key."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.engine import Source, read, refusal, write
from converters.formats import FORMATS
from converters.roles import ADDITIVE
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, definition_of
from diffpeft.errors import ConfigError, listed, near, shown

if TYPE_CHECKING:
    import torch

DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ConvertReport:
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
) -> ConvertReport:
    """Write an adapter file as another format, whole or not at all.

    Args:
        to: one of converters.FORMATS.
        family, format: override what is detected.
        dtype: of the factors, a torch dtype or fp64, fp32, fp16, bf16; default: as they are stored.
        allow: "approximate" admits what loses more than rounding. (No conversion does so yet.)

    Where the format has no place for a method, LoHa, LoKr and Tucker forms become LoRAs of the same update (L1), with a warning that names the layers.
    Raises CannotConvertError, which names the layers and the reason, or CheckpointError.
    """
    if allow not in (None, "approximate"):
        raise ConfigError(f"allow is {shown(allow)}", remedy="It is 'approximate', or left out.")
    cast = _dtype(dtype)
    bundle = read(source, family=family, format=format)
    said: list[str] = []
    out = bundle
    if refusal(bundle, to):
        out, expanded = _expanded(bundle, to)
        if expanded:
            said.append(f"{len(expanded)} layers became LoRAs of the same update: {listed(expanded[:5])}")
    if isinstance(source, (str, os.PathLike)) and Path(source).resolve() == Path(path).resolve():
        raise ConfigError("the output is the input", where=path, remedy="Give another name.")
    write(out, path, format=to, dtype=cast)
    if bundle.carried:
        said.append(
            f"{len(bundle.carried)} keys are no adapter's and were kept as they are: {listed(list(bundle.carried)[:5])}"
        )
    exact = out is bundle and cast is None and (to == bundle.format or not FORMATS[bundle.format].folder)
    mapped = tuple(key for entry in bundle.entries for key in entry.keys)
    return ConvertReport(
        "L0" if exact else "L1", mapped, tuple(bundle.carried), tuple(said), bundle.format, bundle.family
    )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype is {shown(dtype)}", remedy=f"{near(dtype, DTYPES)} It is one of {', '.join(DTYPES)}.".strip()
        )
    import torch

    return getattr(torch, DTYPES[dtype])


def _expanded(bundle: Bundle, to: str) -> tuple[Bundle, list[str]]:
    """The bundle with LoRAs in place of what the format cannot hold and a LoRA can say exactly, and the layers that this was done to."""
    fmt, entries, done = FORMATS[to], [], []
    for entry in bundle.entries:
        lora = _as_lora(entry) if fmt.problem([entry]) else None
        entries.append(lora or entry)
        done += [entry.layer] if lora else []
    return replace(bundle, entries=entries), done


def _as_lora(entry: Entry) -> Entry | None:
    """The same update as a plain LoRA of a rank below the layer's, in the dtype of the factors; None if there is none.

    A file does not tell the kernel of a flattened convolution, so these stay as they are.
    """
    kernel = any(len(h.shape) > 2 for h in entry.tensors.values())
    if entry.method not in ADDITIVE or (re.search(r"conv[^.]*$", entry.layer) and not kernel):
        return None
    method, p, spec = definition_of(entry)
    factors = method.factors(p, spec)
    if factors is None or len(factors[0]) >= min(spec.geometry.out, spec.geometry.columns):
        return None
    dtype = io.load([next(iter(entry.tensors.values()))])[0].dtype
    A, B = factors[0].to(dtype).contiguous(), (method.scale(p, spec) * factors[1]).to(dtype).contiguous()
    return Entry("lora", entry.layer, {"lora_A": io.handle(A), "lora_B": io.handle(B)}, float(len(A)), entry.keys)

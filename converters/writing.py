"""The engine's writing side: entries -> arranged for a format -> spelt in its words -> restored to what the file once was -> stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft import io
from diffpeft.bundle import COMPONENTS, Bundle, parted
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.base import shares_word, table_of
from diffpeft.converters.formats.peft import CONFIG, FILE, WEIGHTS
from diffpeft.converters.holding import Held, held, refused
from diffpeft.converters.restoring import restored
from diffpeft.converters.spelling import Draft, spelt
from diffpeft.errors import CannotConvertError, ConfigError, UnknownNameError, listed, shown
from diffpeft.files import config_in, refuse_existing

if TYPE_CHECKING:
    import torch


def write(
    bundle: Bundle,
    path: str | os.PathLike[str],
    *,
    format: str,
    dtype: torch.dtype | None = None,
    finish: Callable[[Draft], Draft] = lambda draft: draft,
    overwrite: bool = True,
) -> None:
    """Write a Bundle as a file or folder of another format, whole or not at all. `dtype` casts the factors; alphas keep theirs.

    `finish` is asked for the last word on each file: what else its metadata say. Without `overwrite` what is there already stays.

    Raises CannotConvertError, which names the layers, the reason and the formats that can hold the adapter; without `overwrite` ConfigError for
    an output that is there.
    """
    UnknownNameError.check("format", format, FORMATS)
    check_path(path)
    parts = files(bundle, format, path)
    refuse_existing(written(parts, path, format), overwrite)
    plans = {component: finish(planned(part, dtype)) for component, part in parts.items()}
    store(plans, path, format)


def planned(part: Held, dtype: torch.dtype | None = None) -> Draft:
    """What one file or folder will hold. Raises CannotConvertError if the format cannot hold it."""
    if not part.answer:
        raise refused(part)
    return restored(spelt(part, dtype), part)


def files(bundle: Bundle, format: str, path: str | os.PathLike[str]) -> dict[str, Held]:
    """{component: what the format makes of it}. The component is empty unless there are several, the format holds one (or one denoiser), and `path` is a
    folder's name.

    Raises CannotConvertError for a place where this cannot be written.
    """
    fmt, file = FORMATS[format], os.fspath(path).endswith(".safetensors") or os.path.isfile(path)
    components = list(dict.fromkeys(parted(e.layer)[0] for e in bundle.entries))
    apart = fmt.single or shares_word(fmt, table_of(fmt, bundle.family), components)
    several = apart and not file and len(components) > 1
    _check_place(Path(path), format, folder=fmt.folder or several)
    if not several:
        return {"": held(bundle, format)}
    _refuse_strangers(Path(path), components)
    return by_component(bundle, format)


def by_component(bundle: Bundle, format: str) -> dict[str, Held]:
    """{component: what the format makes of it}, each for itself."""
    parts: dict[str, Held] = {}
    for component in dict.fromkeys(parted(e.layer)[0] for e in bundle.entries):
        entries = [entry for entry in bundle.entries if parted(entry.layer)[0] == component]
        part = replace(bundle, entries=entries, carried={} if parts else bundle.carried)
        parts[component] = held(part, format, bundle)
    return parts


def check_path(path: object) -> None:
    """Raise ConfigError for what is no path."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise ConfigError(f"the output is {shown(path)}", remedy="It is a path.")


def _check_place(path: Path, format: str, *, folder: bool) -> None:
    """Raise CannotConvertError for a place where this cannot be written because of what is there."""
    if folder and (path.suffix == ".safetensors" or path.is_file()):
        raise CannotConvertError(
            f"{format} is a folder, and this is a file", where=path, remedy="Give a folder's name."
        )
    if not folder and path.is_dir():
        raise CannotConvertError(
            f"{format} is a file, and this is a folder", where=path, remedy="Give a name that ends in .safetensors."
        )
    above = next((place for place in path.parents if os.path.lexists(place)), None)
    if above is not None and not above.is_dir():
        raise CannotConvertError(
            "nothing can be written below a file", where=f"{path}: {above}", remedy="Give another place."
        )


def _refuse_strangers(path: Path, components: Sequence[str]) -> None:
    """Raise CannotConvertError if a folder holds files of another adapter that would be read along with these, or instead of them."""
    names = [component for component in COMPONENTS if component not in components]
    ends = (f"/{WEIGHTS}", ".safetensors")
    strangers = [f"{name}{end}" for name in names for end in ends if io.present(path / f"{name}{end}")]
    strangers += [WEIGHTS] if io.present(path / WEIGHTS) else []
    if strangers:
        raise CannotConvertError(
            "the folder holds parts of another adapter, with which this one would be read",
            where=f"{path}: {listed(strangers)}",
            remedy="Remove them, or give another folder.",
        )


def written(components: Iterable[str], path: str | os.PathLike[str], format: str) -> list[Path]:
    """The files that `store` writes for these components."""
    end = "" if FORMATS[format].folder else ".safetensors"
    places = [Path(path) / f"{component}{end}" if component else Path(path) for component in components]
    return [place / name for place in places for name in (WEIGHTS, FILE)] if FORMATS[format].folder else places


def store(plans: Mapping[str, Draft], path: str | os.PathLike[str], format: str) -> None:
    """Write what is planned, whole or not at all."""
    end = "" if FORMATS[format].folder else ".safetensors"
    if [*plans] == [""]:
        _store(plans[""], Path(path), format)
        return
    with io.folder(path) as folder:
        for component, plan in plans.items():
            _store(plan, folder / f"{component}{end}", format)


def _store(plan: Draft, path: Path, format: str) -> None:
    if not FORMATS[format].folder:
        io.save(path, plan.tensors, plan.metadata)
        return
    with io.folder(path) as folder:
        metadata = dict(plan.metadata)
        config = metadata.pop(CONFIG)
        io.save(folder / WEIGHTS, plan.tensors, metadata)
        write_config(folder / FILE, config + "\n")


def write_config(path: Path, text: str) -> None:
    """Write a config, unless it would not be read again: then CannotConvertError."""
    try:
        config_in(text, FILE)
        encoded = text.encode()
    except ValueError as error:
        raise CannotConvertError(f"a config like this would not be read again ({error})", where=path) from error
    with io.replacing(path) as f:
        f.write(encoded)

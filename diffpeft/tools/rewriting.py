"""A file's adapter with some layers changed or left out, written as a file of the same kind: what is not changed keeps keys, bytes and order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffpeft import converters, io
from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.fields import own_name
from diffpeft.converters.formats.peft import CONFIG
from diffpeft.converters.hashes import hashed, hashes, sorted_as_safetensors
from diffpeft.converters.spelling import HASHES, Draft
from diffpeft.errors import CannotConvertError, ConfigError, shown
from diffpeft.files import Json, parsed, refuse_existing

OF_THE_BASE = ("base_model_name_or_path", "task_type", "revision")  # what a config says that no tensor does
Changes = Sequence[tuple[Entry, Entry | None]]  # each entry, with what it becomes; None: it is left out


def rewrite(bundle: Bundle, changes: Changes, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write what becomes of a bundle that was read from a file, in the file's own format, whole or not at all.

    Hashes that the file had are renewed. A format that is only read, or that holds less than the file has, is written by the file's own keys.

    Raises ConfigError if nothing is left or the output is there, CannotConvertError for what has no place in the file.
    """
    after = [entry for _, entry in changes if entry is not None]
    if not after:
        raise ConfigError("nothing of the adapter would be left", where=bundle.source, remedy="Name fewer layers.")
    gone = {key for before, entry in changes if entry is None for key in before.keys}
    gone -= {key for entry in after for key in entry.keys}
    metadata = {**bundle.metadata, **_config(bundle, after, any(entry is None for _, entry in changes))}
    changed = replace(
        bundle, entries=after, order=tuple(key for key in bundle.order if key not in gone), metadata=metadata
    )
    try:
        converters.write(
            changed, out, format=bundle.format, finish=lambda draft: _finished(draft, metadata), overwrite=overwrite
        )
    except CannotConvertError as refusal:
        if FORMATS[bundle.format].folder or not Path(bundle.source).is_file():
            raise
        _write_by_keys(bundle, changes, gone, out, overwrite, refusal)


def _config(bundle: Bundle, after: Sequence[Entry], dropped: bool) -> dict[str, str]:
    """PEFT's config with the layers that are left; empty where nothing is to be said anew."""
    if CONFIG not in bundle.metadata or not dropped:
        return {}
    config = parsed(bundle.metadata[CONFIG])
    config["target_modules"] = sorted({own_name(entry) for entry in after})
    return {CONFIG: json.dumps(config, indent=2, sort_keys=True)}


def _finished(draft: Draft, before: Mapping[str, str]) -> Draft:
    """The file with hashes, if it had some, and a config that still says what it is for."""
    metadata = dict(draft.metadata)
    if CONFIG in before and CONFIG in metadata:
        earlier: Json = parsed(before[CONFIG])
        config: Json = parsed(metadata[CONFIG])
        config |= {key: earlier[key] for key in OF_THE_BASE if key in earlier}
        metadata[CONFIG] = json.dumps(config, indent=2, sort_keys=True)
    draft = replace(draft, metadata=metadata)
    return hashed(draft) if any(key.startswith(HASHES) for key in before) else draft


def _write_by_keys(
    bundle: Bundle,
    changes: Changes,
    gone: set[str],
    out: str | os.PathLike[str],
    overwrite: bool,
    refusal: CannotConvertError,
) -> None:
    """Write the file's own tensors by their keys, those of changed entries as they are now.

    Raises CannotConvertError for a change without a key, with what the format's own way was refused for.
    """
    refuse_existing([out], overwrite)
    tensors, metadata = io.header(bundle.source)
    places = {(handle.start, handle.end): key for key, handle in tensors.items()}
    for before, entry in changes:
        for role, old, new in _changed(before, entry):
            key = None if old is None else places.get((old.start, old.end))
            if key is None:
                raise CannotConvertError(
                    f"the file has no place of its own for the {role} of {shown(before.layer)}, and {refusal.what}",
                    where=f"{bundle.source}: {refusal.where}",
                    remedy=f"Convert it first. {refusal.remedy}",
                ) from refusal
            tensors[key] = io.reshaped(new, tensors[key].shape)
    staying = {key: handle for key, handle in tensors.items() if key not in gone}
    if any(key.startswith(HASHES) for key in metadata):
        staying = sorted_as_safetensors(staying)
        metadata = {**metadata, **hashes(staying, metadata)}
    io.save(out, staying, metadata)


def _changed(before: Entry, after: Entry | None) -> list[tuple[str, Handle | None, Handle]]:
    """(role, its tensor, what it becomes) of an entry that is changed; no tensor where there was none."""
    if after is None:
        return []
    rows: list[tuple[str, Handle | None, Handle]] = [
        (role, before.tensors.get(role), handle)
        for role, handle in after.tensors.items()
        if handle is not before.tensors.get(role)
    ]
    if after.alpha is not before.alpha:
        old = before.alpha if isinstance(before.alpha, Handle) else None
        rows.append(("alpha", old, after.alpha if isinstance(after.alpha, Handle) else io.scalar(after.alpha or 0.0)))
    return rows

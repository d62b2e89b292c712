"""edit: what a file's metadata say, its tensors' bytes as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffpeft import io
from diffpeft.bundle import Handle
from diffpeft.converters.hashes import hashes
from diffpeft.converters.spelling import HASHES
from diffpeft.errors import ConfigError, UnknownNameError, shown
from diffpeft.files import refuse_existing
from diffpeft.readable import Readable
from diffpeft.tools.catalogue import smaller
from diffpeft.tools.listing import THUMBNAIL

WORDS, TRAINED = "modelspec.trigger_phrase", "trained_words"
SIDE = 256  # pixels of a thumbnail, as ModelSpec has it


@dataclass(frozen=True, repr=False)
class EditReport(Readable):
    """What an edit did: the file that has it, and the keys of the metadata that were set anew and taken away."""

    path: str
    changed: tuple[str, ...]
    removed: tuple[str, ...]


def edit(
    path: str | os.PathLike[str],
    *,
    set: Mapping[str, str] | None = None,
    unset: Iterable[str] = (),
    trigger_words: Iterable[str] | None = None,
    thumbnail: str | os.PathLike[str] | None = None,
    hashed: bool = False,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> EditReport:
    """Change what a .safetensors file's metadata say, in place or in a copy; the bytes of its tensors, and their order, stay.

    Hashes that the file has are renewed: `sshs_model_hash` (AutoV3 is its beginning), `sshs_legacy_hash`, which the metadata that begin with `ss_`
    are part of, and `modelspec.hash_sha256`. A file in place is replaced as a whole or not at all; programs that have it open go on with the old one.

    Args:
        set: {key: text}.
        unset: keys to take away.
        trigger_words: what must stand in a prompt, in the place where the file says it; none takes them away.
        thumbnail: a picture, which is kept within 256 pixels.
        hashed: add the hashes if the file has none.
        out: the copy; without it the file itself is changed.
        overwrite: whether a copy may replace what is there.

    Raises UnknownNameError for a key to take away that is not there; ConfigError for a hash, no picture, or a copy that is there; CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError("this is a folder", where=path, remedy="Pass the .safetensors file in it.")
    if out is not None and os.path.realpath(out) != os.path.realpath(path):
        refuse_existing([out], overwrite)
    tensors, metadata = io.header(path)
    words = {} if trigger_words is None else _words(trigger_words, metadata)
    picture = {} if thumbnail is None else {THUMBNAIL: _thumbnail(Path(thumbnail))}
    edited = _edited(metadata, {**(set or {}), **words, **picture}, list(unset), path)
    edited |= _hashes(in_order(tensors), edited, hashed)
    io.save(out or path, in_order(tensors), edited)
    changed = tuple(key for key, text in edited.items() if metadata.get(key) != text)
    return EditReport(str(out or path), changed, tuple(key for key in metadata if key not in edited))


def in_order(tensors: Mapping[str, Handle]) -> dict[str, Handle]:
    """The tensors in the order of their bytes, so that these come out as they are."""
    return dict(sorted(tensors.items(), key=lambda row: (row[1].start, row[1].end)))


def _edited(metadata: Mapping[str, str], changes: Mapping[str, str], unset: list[str], path: Path) -> dict[str, str]:
    """The metadata with changes; an empty text takes a key away."""
    if by_hand := [key for key in changes if key.startswith(HASHES)]:
        raise ConfigError(
            f"{shown(by_hand[0])} is worked out of the tensors", where=path, remedy="Leave it out: it is renewed."
        )
    for key in unset:
        if key not in metadata:
            raise UnknownNameError.of("metadata called", key, metadata, path)
    texts = {**metadata, **changes}
    return {key: text for key, text in texts.items() if key not in unset and (text or key not in changes)}


def _words(words: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Trigger words, in each place where the file says them, or in ModelSpec's."""
    words = [word.strip() for word in words if word.strip()]
    said = {WORDS: ", ".join(words)}
    if TRAINED in metadata:
        as_list = metadata[TRAINED].lstrip().startswith("[") and words
        said[TRAINED] = json.dumps(words, ensure_ascii=False) if as_list else ", ".join(words)
    return said


def _thumbnail(path: Path) -> str:
    picture = smaller(path, SIDE)
    if not picture:
        raise ConfigError("this is no picture that can be read", where=path, remedy="Pass a PNG, JPEG or WebP.")
    return picture


def _hashes(tensors: Mapping[str, Handle], metadata: Mapping[str, str], add: bool) -> dict[str, str]:
    """The hashes of the file as it will be, of the kinds that it has, or all."""
    if not add and not any(key.startswith(HASHES) for key in metadata):
        return {}
    return {key: text for key, text in hashes(tensors, metadata).items() if add or key in metadata}

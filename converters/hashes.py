"""The hashes by which other programs know an adapter's file: of its tensors alone, so that what the metadata say does not change them.

`sshs_model_hash` is the SHA-256 of all bytes after the header (AutoV3 is its beginning), and so is ModelSpec's `hash_sha256`. `sshs_legacy_hash` is that of
64 KiB at 1 MiB of the file that sd-scripts has in memory: with the metadata that begin with `ss_`, and no others. Both are of files with the
tensors in safetensors' order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from diffpeft import io
from diffpeft.bundle import Handle
from diffpeft.converters.spelling import Draft

# the dtypes by what safetensors sorts tensors by, the last first: the largest numbers stand in front, so that all are aligned
_DTYPES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
_OLD = (0x100000, 0x10000)  # where the legacy hash begins, and of how many bytes it is


def sorted_as_safetensors(tensors: Mapping[str, Handle]) -> dict[str, Handle]:
    """The same in the order in which safetensors writes them."""
    return dict(sorted(tensors.items(), key=lambda row: (-_DTYPES.index(row[1].dtype), row[0])))


def hashed(draft: Draft) -> Draft:
    """The file with its tensors in safetensors' order, and their hashes in its metadata. Reads every tensor once."""
    tensors = sorted_as_safetensors(draft.tensors)
    return replace(draft, tensors=tensors, metadata={**draft.metadata, **hashes(tensors, draft.metadata)})


def hashes(tensors: Mapping[str, Handle], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a file of these tensors, which are in safetensors' order, with these metadata."""
    shown = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    at, (start, size) = io.start_of(tensors, shown), _OLD
    data, old = hashlib.sha256(), hashlib.sha256()
    for chunk in (chunk for handle in tensors.values() for chunk in io.chunks(handle)):
        data.update(chunk)
        old.update(chunk[max(start - at, 0) : max(start + size - at, 0)])
        at += len(chunk)
    digest = data.hexdigest()
    return {
        "sshs_model_hash": digest,
        "sshs_legacy_hash": old.hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{digest}",
    }

"""Embeddings that an adapter file has along (`bundle_emb.<token>.clip_l`, as OneTrainer and A1111 bundle them), each as a file of its own."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from diffpeft import io
from diffpeft.bundle import Handle
from diffpeft.converters.locating import Where, located
from diffpeft.converters.opening import Source, opened
from diffpeft.errors import CheckpointError

_MAX_NAME = 200  # bytes
_KEY = re.compile(
    r"bundle_emb\.(?P<token>.+)\.(?P<name>clip_l|clip_g|t5|llama|gemma|qwen|string_to_param\.[^.]+)(?P<out>_out)?"
)


def embeddings(source: Source, **where: Unpack[Where]) -> dict[str, dict[str, Handle]]:
    """{token: {key in a file of its own: vectors [tokens, width]}} of what a file has bundled. Reads the header only. `where`: which file, as for `located`.

    The keys are those of textual inversion files: `emb_params` where there is one text encoder, else `clip_l`, `clip_g` and so on.
    """
    return _found(opened(located(source, **where))[0])


def write_embeddings(source: Source, folder: str | os.PathLike[str], **where: Unpack[Where]) -> list[Path]:
    """Write each bundled embedding to `folder/<token>.safetensors`, and return the paths. Characters that file names lack become underscores.

    The adapter chose these names, so nothing is overwritten: where another file has one, a number is added.
    """
    paths: list[Path] = []
    for token, tensors in embeddings(source, **where).items():
        stem = re.sub(r"[^\w.-]", "_", token).encode()[:_MAX_NAME].decode(errors="ignore")
        names = (f"{stem}{f'-{n}' if n else ''}.safetensors" for n in itertools.count())
        path = next(p for name in names if _is_free(p := Path(folder) / name, tensors) and p not in paths)
        if not os.path.lexists(path):
            io.save(path, tensors, {"format": "pt"})
        paths.append(path)
    return paths


def _is_free(path: Path, tensors: Mapping[str, Handle]) -> bool:
    """Whether a place has nothing, or these tensors already."""
    try:
        there = io.header(path)[0] if os.path.lexists(path) else tensors
    except CheckpointError:
        return False
    return there.keys() == tensors.keys() and all(io.same(there[key], tensors[key]) for key in tensors)


def _found(tensors: Mapping[str, Handle]) -> dict[str, dict[str, Handle]]:
    by_token: dict[str, dict[str, Handle]] = {}
    for key, handle in tensors.items():
        if match := _KEY.fullmatch(key):
            name = "emb_params" if match["name"].startswith("string_to_param") else match["name"] + (match["out"] or "")
            by_token.setdefault(match["token"], {})[name] = handle
    return {
        token: {"emb_params": vectors["clip_l"]} if vectors.keys() == {"clip_l"} else vectors
        for token, vectors in by_token.items()
    }

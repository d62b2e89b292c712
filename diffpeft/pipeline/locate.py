"""Where an adapter lies: a file, a folder with one, a PEFT folder, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import converters
from diffpeft.errors import CheckpointError, UnreadableFileError, listed, near, shown
from diffpeft.files import present

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = "pytorch_lora_weights.safetensors"
_PEFT = ("adapter_config.json", "adapter_model.safetensors")


def located(source: Any, revision: str | None = None, filename: str | None = None) -> Any:
    """The file behind a path, a folder or a Hub id; a dict of tensors as it is."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"cannot load an adapter from a {type(source).__name__}",
            remedy="Pass a path, a dict of tensors, a Bundle or a Hub id.",
        )
    path = Path(source)
    if path.is_dir():
        return _in_folder(path, filename)
    if path.exists() or not HUB_ID.fullmatch(str(source)) or path.suffix == ".safetensors":
        if not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UnreadableFileError("no such file", where=path, remedy=near(path.name, siblings) or "Check the path.")
        return path
    return _downloaded(str(source), revision, filename)


def _in_folder(folder: Path, filename: str | None) -> Path:
    peft = all(present(folder / name) for name in _PEFT)
    if not filename and (peft or converters.components_in(folder)):
        return folder
    files = sorted(folder.glob("*.safetensors"))
    if filename or present(folder / _FILE):
        return folder / (filename or _FILE)
    if len(files) != 1:
        raise CheckpointError(
            f"the folder holds {len(files)} .safetensors files",
            where=folder,
            remedy=f"Say filename=, one of {listed(f.name for f in files)}." if files else "Pass the adapter's file.",
        )
    return files[0]


def _downloaded(repo: str, revision: str | None, filename: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision))

    try:
        try:
            return get(filename or _FILE)
        except EntryNotFoundError as error:
            if filename or isinstance(error, LocalEntryNotFoundError):
                raise
            return [get(name) for name in _PEFT][-1]
    except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UnreadableFileError(
            f"cannot get {filename or _FILE} of {shown(repo)} from the Hub",
            where=str(error).splitlines()[0],
            remedy="If you mean a file, check its path; else check the id, filename= and the network.",
        ) from error

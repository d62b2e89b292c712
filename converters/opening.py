"""A source, opened: what a file, a folder or a dict of tensors held at one instant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffpeft import io
from diffpeft.bundle import COMPONENTS, Handle
from diffpeft.converters.formats.peft import CONFIG, FILE, WEIGHTS
from diffpeft.errors import CheckpointError, UnreadableFileError, inside, shown
from diffpeft.files import Snapshot, config_text, near_path

if TYPE_CHECKING:
    import torch


class Opened(NamedTuple):
    """The tensors by key, the metadata (the config beside PEFT's weights counts as such), and where they are, for messages."""

    tensors: dict[str, Handle]
    metadata: dict[str, str]
    where: str


Source = str | os.PathLike[str] | Mapping[str, "torch.Tensor"] | Opened


def opened(source: Source) -> Opened:
    """A file, a PEFT folder or a dict of tensors. Of a file the header is read, and the tensors can be read later, from the same file.

    Raises UnreadableFileError, UnsafeFileError, or CheckpointError for what is nothing of these.
    """
    if isinstance(source, Opened):
        return source
    if isinstance(source, Mapping):
        return Opened(_handles(source), {}, "a dict of tensors")
    path = path_of(source)
    folder = path if os.path.isdir(path) else path.parent
    if folder is path or path.name == WEIGHTS:
        return _peft(io.together(folder, (WEIGHTS, FILE)), "", folder / WEIGHTS, str(source))
    return Opened(*io.header(path), str(source))


def parts_of(source: Source) -> list[Opened]:
    """The files or PEFT folders of a folder that has one for each of several components, as they all were at one instant; none of anything else."""
    if (
        isinstance(source, (Mapping, Opened))
        or not os.path.isdir(path := path_of(source))
        or io.present(path / WEIGHTS)
    ):
        return []
    files = io.together(path, (f"{c}{end}" for c in COMPONENTS for end in _ENDS))
    parts = []
    for component in COMPONENTS:
        if f"{component}/{WEIGHTS}" in files:
            parts.append(_peft(files, f"{component}/", path / component / WEIGHTS, str(path / component)))
        if single := files.get(f"{component}.safetensors"):
            parts.append(Opened(*io.header(single), str(single.path)))
    return parts


def components_in(source: Source) -> list[Path]:
    """The files or PEFT folders in a folder that has one for each of several components."""
    return [Path(part.where) for part in parts_of(source)]


_ENDS = (f"/{WEIGHTS}", f"/{FILE}", ".safetensors")


def path_of(source: object) -> Path:
    """The path that a source is. Raises CheckpointError for what is none."""
    if not isinstance(source, (str, os.PathLike)) or not isinstance(os.fspath(source), str):
        raise CheckpointError(
            f"an adapter cannot be read from a {type(source).__name__}",
            where=shown(source),
            remedy="Pass a path, a PEFT folder or a dict of tensors.",
        )
    return Path(source)


def _peft(files: Mapping[str, Snapshot], prefix: str, path: Path, where: str) -> Opened:
    """The weights and the config of one PEFT folder among files that were opened together."""
    weights, config = files.get(prefix + WEIGHTS), files.get(prefix + FILE)
    if weights is None:
        raise UnreadableFileError("no such file", where=path, remedy=near_path(path) or "Check the path.")
    handles, metadata = io.header(weights)
    return Opened(handles, metadata | ({CONFIG: config_text(config).rstrip("\n")} if config else {}), where)


def _handles(tensors: Mapping[str, torch.Tensor]) -> dict[str, Handle]:
    """Handles on tensors in memory. Raises CheckpointError for a dict of anything else."""
    wrong = [key for key, t in tensors.items() if not (isinstance(key, str) and hasattr(t, "detach")) or t.is_meta]
    if not tensors or wrong:
        raise CheckpointError(
            "a dict of tensors maps names to tensors, and holds at least one", where=shown(wrong[0]) if wrong else ""
        )
    handles = {}
    for key, tensor in tensors.items():
        with inside(shown(key)):
            handles[key] = io.handle(tensor)
    return handles

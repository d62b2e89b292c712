"""Where an adapter lies: a file, a folder with one, a PEFT folder, or a repository on the Hub, also by a link to it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, overload
from urllib.parse import unquote

from diffpeft import converters
from diffpeft.errors import CheckpointError, UnreadableFileError, listed, near, shown
from diffpeft.files import present

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = TypeVar("Tensors", bound=Mapping[str, Tensor])

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE = "pytorch_lora_weights.safetensors"
PEFT = ("adapter_config.json", "adapter_model.safetensors")


_LINK = re.compile(
    r"(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
    r"(?:/(?:blob|resolve|raw|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]*))?)?/?(?:[?#].*)?"
)
_NO_MODELS = ("datasets/", "spaces/", "api/", "collections/", "papers/")


class HubPlace(NamedTuple):
    """A repository on the Hub, or a file in one."""

    repo: str
    revision: str | None = None
    filename: str | None = None


def on_hub(source: str) -> HubPlace | None:
    """The place on the Hub that a text names: an id, a link to a repository or a file, or owner/name/file.safetensors. None for other texts.

    A path collapses the slashes of a link, and is one all the same.
    """
    link = _LINK.fullmatch(source)
    if link and not link["repo"].startswith(_NO_MODELS):
        file = unquote(link["file"] or "").strip("/")
        if file and Path(file).suffix != ".safetensors":  # a folder
            file = f"{file}/{_FILE}"
        return HubPlace(link["repo"], unquote(link["revision"]) if link["revision"] else None, file or None)
    if HUB_ID.fullmatch(source) and Path(source).suffix != ".safetensors":
        return HubPlace(source)
    owner, name, file = (*source.split("/", 2), "", "")[:3]
    if HUB_ID.fullmatch(f"{owner}/{name}") and file.endswith(".safetensors") and not Path(owner).exists():
        return HubPlace(f"{owner}/{name}", None, file)
    return None


@overload
def located(source: Tensors, revision: str | None = None, filename: str | None = None) -> Tensors: ...
@overload
def located(source: str | os.PathLike[str], revision: str | None = None, filename: str | None = None) -> Path: ...
def located(source: object, revision: str | None = None, filename: str | None = None) -> object:
    """The file behind a path, a folder, a Hub id or a link to the Hub; a dict of tensors as it is."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"cannot load an adapter from a {type(source).__name__}",
            remedy="Pass a path, a dict of tensors, a Bundle or a Hub id.",
        )
    path, place = Path(source), on_hub(str(source))
    if path.is_dir():
        return _in_folder(path, filename)
    if path.exists():
        return path
    if place:
        return _downloaded(place.repo, revision or place.revision, filename or place.filename)
    raise UnreadableFileError("no such file", where=path, remedy=_remedy(path))


def _remedy(path: Path) -> str:
    """What to do about a path that does not exist."""
    if re.match(r"https?:/", str(path)):
        return (
            "A link is followed to huggingface.co only: save the file, and pass its path; or a Hub id with filename=."
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return near(path.name, siblings) or "Check the path."


def _in_folder(folder: Path, filename: str | None) -> Path:
    """The adapter's file in a folder, or the folder itself if it is a PEFT folder. Raises CheckpointError if several may be meant."""
    peft = all(present(folder / name) for name in PEFT)
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
    """A file of a repository: the one that is named, else diffusers' or PEFT's, else the only one that there is."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def get(*names: str) -> Path | None:
        """The last of these files; None if the repository lacks one."""
        try:
            return [Path(hf_hub_download(repo, name, revision=revision)) for name in names][-1]
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    try:
        path = get(filename) if filename else get(_FILE) or get(*PEFT)
        if path:
            return path
        files = [name for name in list_repo_files(repo, revision=revision) if name.endswith(".safetensors")]
        if not filename and len(files) == 1 and (path := get(files[0])):
            return path
    except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UnreadableFileError(
            f"cannot get {filename or _FILE} of {shown(repo)} from the Hub",
            where=str(error).splitlines()[0],
            remedy="If you mean a file, check its path; else check the id, filename= and the network.",
        ) from error
    raise UnreadableFileError(
        f"the repository holds {len(files)} .safetensors files, and no {shown(filename or _FILE)}",
        where=repo,
        remedy=f"Say filename=, one of {listed(files)}." if files else "Pass another id.",
    )

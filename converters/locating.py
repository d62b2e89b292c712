"""Where an adapter lies: a file, a folder with one, a PEFT folder, or a repository on the Hub, also by a link to it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar, Unpack, overload
from urllib.parse import unquote

from diffpeft.converters.formats.peft import FILE, WEIGHTS
from diffpeft.converters.opening import Opened, components_in
from diffpeft.errors import CheckpointError, UnreadableFileError, listed, one_of, shown
from diffpeft.files import Json, near_path, present

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = TypeVar("Tensors", bound=Mapping[str, Tensor] | Opened)

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PEFT = (FILE, WEIGHTS)
_USUAL = "pytorch_lora_weights.safetensors"
_OTHERS = ("scheduler", "optimizer", "checkpoint")  # files that are no adapter's, or of a step on the way to it


class Where(TypedDict, total=False):
    """What can be said of a source beside itself: which of its files, and how a repository on the Hub is reached. As diffusers and huggingface_hub call it."""

    filename: str | None
    weight_name: str | None  # the same
    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None


_LINK = re.compile(
    r"(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
    r"(?:/(?:blob|resolve|raw|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]*))?)?/?(?:[?#].*)?"
)
_NO_MODELS = ("datasets/", "spaces/", "api/", "collections/", "papers/")


class HubPlace(NamedTuple):
    """A repository on the Hub, or a file in one: of a folder the usual file, in whose place the only other one may be."""

    repo: str
    revision: str | None = None
    filename: str | None = None


def on_hub(source: str) -> HubPlace | None:
    """The place on the Hub that a text names: an id, a link to a repository, a file or a folder, or owner/name/file.safetensors. None for other texts.

    A path collapses the slashes of a link, and is one all the same.
    """
    link = _LINK.fullmatch(source)
    if link and not link["repo"].startswith(_NO_MODELS):
        file = unquote(link["file"] or "").strip("/")
        if file and Path(file).suffix != ".safetensors":  # a folder
            file = f"{file}/{_USUAL}"
        return HubPlace(link["repo"], unquote(link["revision"]) if link["revision"] else None, file or None)
    if HUB_ID.fullmatch(source) and Path(source).suffix != ".safetensors":
        return HubPlace(source)
    owner, name, file = (*source.split("/", 2), "", "")[:3]
    if HUB_ID.fullmatch(f"{owner}/{name}") and file.endswith(".safetensors") and not os.path.exists(owner):
        return HubPlace(f"{owner}/{name}", None, file)
    return None


def name_in(source: str | os.PathLike[str], filename: str | None = None) -> str:
    """The file's name without its ending: of `filename` if it is said, of the file or folder that a link names, else of the path or the repository."""
    place = None if os.path.exists(source) else on_hub(os.fspath(source))
    inner = place and (place.filename or place.repo).removesuffix(f"/{_USUAL}")
    return Path(filename or inner or source).name.removesuffix(".safetensors")


@overload
def located(source: Tensors, **where: Unpack[Where]) -> Tensors: ...
@overload
def located(source: str | os.PathLike[str], **where: Unpack[Where]) -> Path: ...
def located(source: object, **where: Unpack[Where]) -> object:
    """The file behind a path, a folder, a Hub id or a link to the Hub; what is in memory as it is.

    Args:
        filename: the file in the folder or the repository; `weight_name` is the same.
        subfolder: the folder in it.
        revision, token, cache_dir: of a repository, for huggingface_hub. A revision in a link is the default.

    Of several files the usual one is taken, `pytorch_lora_weights.safetensors`, or PEFT's, or the only one that is no scheduler's, optimizer's or
    checkpoint's. Raises UnreadableFileError, CheckpointError if several may be meant, or ConfigError.
    """
    if unknown := where.keys() - Where.__annotations__.keys():
        raise TypeError(f"unexpected keyword arguments: {listed(sorted(unknown))}")
    filename = one_of(filename=where.get("filename"), weight_name=where.get("weight_name"))
    if isinstance(source, (Mapping, Opened)):
        return source
    if not isinstance(source, (str, os.PathLike)) or not isinstance(os.fspath(source), str):
        raise CheckpointError(
            f"cannot load an adapter from a {type(source).__name__}",
            where=shown(source),
            remedy="Pass a path, a dict of tensors, a Bundle or a Hub id.",
        )
    path, place = Path(source), on_hub(os.fspath(source))
    if os.path.isdir(path):  # which is no error for what cannot be a path
        return _in_folder(path / (where.get("subfolder") or ""), filename)
    if os.path.exists(path):
        return path
    if place:
        return _fetched(place, filename, where)
    raise UnreadableFileError("no such file", where=path, remedy=_remedy(path))


def _fetched(place: HubPlace, filename: str | None, where: Where) -> Path:
    """The file of a repository that a text and what is said beside it mean; the latter wins."""
    revision, subfolder = where.get("revision") or place.revision, where.get("subfolder")
    folder, _, file = (place.filename or "").rpartition("/")
    if folder and file == _USUAL:
        subfolder = subfolder or folder
    elif not filename:
        filename = place.filename
    repository = _Repository(place.repo, revision, where.get("token"), where.get("cache_dir"))
    return repository.file(filename, subfolder or "")


def _remedy(path: Path) -> str:
    """What to do about a path that does not exist."""
    if re.match(r"https?:/", str(path)):
        return (
            "A link is followed to huggingface.co only: save the file, and pass its path; or a Hub id with filename=."
        )
    return near_path(path) or "Check the path."


def _in_folder(folder: Path, filename: str | None) -> Path:
    """The adapter's file in a folder, or the folder itself if it is a PEFT folder. Raises CheckpointError if several may be meant."""
    if filename or not os.path.isdir(folder):
        path = folder / (filename or "")
        if not os.path.exists(path):
            raise UnreadableFileError("no such file", where=path, remedy=_remedy(path))
        return path
    if all(present(folder / name) for name in PEFT) or components_in(folder):
        return folder
    if present(folder / _USUAL):
        return folder / _USUAL
    return folder / _guessed(sorted(file.name for file in folder.glob("*.safetensors")), folder, "folder")


def _guessed(files: Sequence[str], where: object, kind: str) -> str:
    """The only file that may be an adapter, or the only one of the usual name. Raises UnreadableFileError, which names them, if there are several, or none."""
    likely = [file for file in files if not any(word in file for word in _OTHERS)] or files
    usual = [file for file in likely if file.endswith(_USUAL)] or likely
    if len(usual) == 1:
        return usual[0]
    raise UnreadableFileError(
        f"the {kind} holds {len(usual)} .safetensors files",
        where=where,
        remedy=f"Say filename=, one of {listed(usual)}." if usual else "Pass the adapter's file.",
    )


@dataclass(frozen=True)
class _Repository:
    """A repository on the Hub, and how it is reached."""

    id: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None

    def file(self, filename: str | None, subfolder: str) -> Path:
        """A file of it, downloaded: the one that is named, else diffusers' or PEFT's, else the only one that there is."""
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        wanted = str(PurePosixPath(subfolder, filename or _USUAL))
        usual = (wanted,) if filename else (wanted, str(PurePosixPath(subfolder, WEIGHTS)))
        try:
            path = next(filter(None, map(self._get, usual)), None)
            files = [] if path else self._files(subfolder)
            if path is None and not filename:
                path = self._get(_guessed(files, self.id, "repository"))
        except CheckpointError:
            raise
        except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise UnreadableFileError(
                f"cannot get {wanted} of {shown(self.id)} from the Hub",
                where=str(error).strip().splitlines()[0],
                remedy="If you mean a file, check its path; else check the id, filename= and the network. A private or gated repository needs token=.",
            ) from error
        if path is None:
            raise UnreadableFileError(
                f"the repository holds no {shown(wanted)}",
                where=self.id,
                remedy=f"Say filename=, one of {listed(files)}." if files else "Pass another id.",
            )
        return path

    def _get(self, name: str) -> Path | None:
        """A file, downloaded, with the config beside it if it is PEFT's; None if the repository lacks it."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        options = _said(revision=self.revision, token=self.token, cache_dir=self.cache_dir)
        log.debug("asking the Hub for %s of %s", name, self.id)
        try:
            path = Path(hf_hub_download(self.id, name, **options))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        if path.name == WEIGHTS:
            self._get(str(PurePosixPath(name).with_name(FILE)))
        return path

    def _files(self, subfolder: str) -> list[str]:
        """The names of its .safetensors files, of those in a folder."""
        from huggingface_hub import list_repo_files

        names = list_repo_files(self.id, **_said(revision=self.revision, token=self.token))
        inside = [PurePosixPath(name) for name in names if PurePosixPath(name).is_relative_to(subfolder)]
        return [str(name) for name in inside if name.suffix == ".safetensors"]


def _said(**options: object) -> Json:
    """The options that say something."""
    return {name: value for name, value in options.items() if value is not None}

"""The states of a run on disk, as far as they are told without torch: where they are, whether they are whole, and what options they had.

OUT/checkpoints/NAME-step00000500/ is the state after 500 steps. It becomes visible by one rename when all of it is on the disk; `manifest.json` names its files
with their hashes, and is the first that goes when it is taken away: a folder without one is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffpeft.errors import CheckpointError, ConfigError, listed
from diffpeft.files import Json, folder, replacing

FOLDER, MANIFEST, FACTS = "checkpoints", "manifest.json", "state.json"
LATEST = "latest"
_NAME = re.compile(r".+-step(\d{8,})")
_REMEDY = "Pass --resume with another folder of checkpoints, or leave it out and begin anew with --overwrite."


@dataclass(frozen=True, order=True)
class SavedState:
    """The state of a run after `step` steps, in a folder."""

    step: int
    folder: Path

    def facts(self) -> Json:
        """What is no tensor: the options, the numbers of the optimiser, the seconds. Raises CheckpointError for a file that is not whole."""
        return _json(self.folder / FACTS)

    @property
    def options(self) -> Json:
        """The options that the run was started with, by name; those that were left out are None."""
        return dict(self.facts()["options"])

    @property
    def run(self) -> Path:
        """The output folder that it was written into."""
        return self.folder.parent.parent

    def damage(self) -> str:
        """What is wrong with it, in words; empty if every file is what was written."""
        try:
            files = _json(self.folder / MANIFEST)["files"]
            damaged = [name for name, digest in files.items() if sha256(self.folder / name) != digest]
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        return f"other bytes than were written: {listed(damaged)}" if damaged else ""


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _json(path: Path) -> Json:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the state of the run cannot be read ({error})", where=path, remedy=_REMEDY) from error
    if not isinstance(table, dict):
        raise CheckpointError("the state of the run is no table", where=path, remedy=_REMEDY)
    return table


def step_of(checkpoint: Path) -> int:
    """After how many steps a state is one, by the name of its folder; 0 if that is no state's."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def checkpoints_in(out: Path) -> list[SavedState]:
    """The states in an output folder, the oldest first. Whether they are whole is not asked."""
    home = out / FOLDER
    folders = home.iterdir() if home.is_dir() else ()
    return sorted(SavedState(step_of(path), path) for path in folders if (path / MANIFEST).is_file() and step_of(path))


def chosen(resume: str, out: Path | None) -> SavedState:
    """The state that `resume` means: `latest` in `out`, the latest of an output folder, or one checkpoint.

    A latest one that is damaged is passed over for the one before. Raises CheckpointError if none is whole, ConfigError for a folder that holds none.
    """
    path = out if resume == LATEST else Path(resume)
    if path is None:
        raise ConfigError("--resume without --out", remedy="Pass the output folder of the run: --resume FOLDER.")
    if (path / MANIFEST).is_file() and (step := step_of(path.resolve())):
        candidates = [SavedState(step, path.resolve())]
    else:
        candidates = checkpoints_in(path.parent if path.name == FOLDER else path)
    if not candidates:
        raise ConfigError(
            "no run can go on from there: it holds no checkpoints",
            where=path,
            remedy="Pass the output folder of a run, or one of its checkpoints; without --resume a run begins anew.",
        )
    damages = {}
    for checkpoint in reversed(candidates):
        if not (damage := checkpoint.damage()):
            return checkpoint
        damages[checkpoint.folder.name] = damage
    raise CheckpointError(
        f"no checkpoint is whole: {'; '.join(f'{name}: {damage}' for name, damage in damages.items())}",
        where=path,
        remedy=_REMEDY,
    )


def place_of(out: Path, name: str, step: int) -> Path:
    """Where the state of a run after so many steps is."""
    return out / FOLDER / f"{name}-step{step:08d}"


@contextlib.contextmanager
def writing(out: Path, name: str, step: int) -> Iterator[Path]:
    """A temporary folder that becomes the checkpoint of `step` when the block ends well and all of it is on the disk. Raises OSError.

    It is locked meanwhile: what commits whole folders of its own writes into one inside.
    """
    place = place_of(out, name, step)
    if place.exists():  # of a run that went on from an earlier one, or what was left when it was taken away
        remove(place)
    with folder(place) as temporary:
        yield temporary
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {str(path.relative_to(temporary)): sha256(path) for path in written}
        with replacing(temporary / MANIFEST) as f:
            f.write(json.dumps({"step": step, "files": files}, indent=1).encode())
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
    _sync(place.parent)


def write_facts(folder: Path, facts: Mapping[str, object]) -> None:
    """Write what is no tensor."""
    with replacing(folder / FACTS) as f:
        f.write(json.dumps(facts, indent=1, sort_keys=True).encode())


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(folder: Path) -> None:
    """Take a checkpoint away; one that is half gone is none."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def prune(out: Path, keep: int, done: int = sys.maxsize, best: int | None = None) -> None:
    """Leave the last `keep` checkpoints and that of the `best` step, none of more steps than are done, and nothing of those that were half taken away."""
    home = out / FOLDER
    until = [checkpoint.folder for checkpoint in checkpoints_in(out) if checkpoint.step <= done]
    staying = {*(until[-keep:] if keep else ()), *(path for path in until if keep and step_of(path) == best)}
    for path in home.iterdir() if home.is_dir() else ():
        if step_of(path) and path not in staying:
            remove(path)
    if not keep and home.is_dir() and not any(home.iterdir()):
        home.rmdir()


def state_at(out: Path, step: int | None) -> SavedState | None:
    """The state of a step in an output folder, whatever the run was called; None if it is not there."""
    return next((checkpoint for checkpoint in checkpoints_in(out) if checkpoint.step == step), None)


def bring(source: Path, out: Path, step: int | None) -> None:
    """Copy the state of a step from a run that goes on in another folder; one that is not there is none."""
    state = state_at(source, step)
    if state is not None and state_at(out, step) is None:
        with folder(out / FOLDER / state.folder.name) as temporary:
            shutil.copytree(state.folder, temporary, dirs_exist_ok=True)

"""Saving what a run learnt: the adapter's files, what they say of the run, and which programs read them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from diffpeft import converters
from diffpeft.bundle import Bundle
from diffpeft.converters.detection import COMPONENT
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.hashes import hashed
from diffpeft.converters.spelling import Draft
from diffpeft.errors import ConfigError, listed
from diffpeft.families import Family, family_of
from diffpeft.model.state import bundle_of, parameters_of, slots_of
from diffpeft.train.card import write_card
from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.formats import SavedFormats, asked, chosen, file_of, files_of, half_of, halves_of
from diffpeft.train.gallery import newest_sample
from diffpeft.train.lock import occupied
from diffpeft.train.metadata import finished, metadata_of
from diffpeft.train.outcome import check_room, refuse_unread, rescue, rescued
from diffpeft.train.run import TrainRun
from diffpeft.train.showing import finish, told
from diffpeft.train.team import team
from diffpeft.train.watching import write_metrics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 10**9  # parameters of a model from which on files are bf16, where nothing is said


def save(run: TrainRun) -> list[Path]:
    """Write the adapter, a file for each format that can hold it, its card and the figures of the run into the output folder; the adapter's paths.

    `run.files` are those and the card.
    Each file is read again. If one cannot be written, the files go into a temporary folder, which the OSError names.
    Of several processes the main one writes; where the base is sharded, all call this.
    Raises ConfigError for numbers that the dtype of the files does not have, NothingLearntError if a file holds something else than what was learnt.
    """
    if not (team().main or team().sharded):
        return []
    out, dtype, files = Path(run.config.out or ""), DTYPES[run.config.save_dtype or "fp32"], list[Path]()
    with told(run):
        refuse_too_large(run, dtype)
        if team().main:
            with occupied(out):
                files = rescued(lambda folder: _written(run, folder, dtype), out, run.name)
        files = team().as_said_by_main(files)
        for file in files:
            refuse_unread(run.family.pipe, file, run.name, dtype, half_of(run.name, file))
        if not team().main:
            return []
        run.files = [*files, write_card(run, out, {file.name: readers_of(file) for file in files})]
        write_metrics(run)
        finish(run, files, readers(run, files))
    return files


def exported(run: TrainRun, folder: Path, step: int) -> None:
    """Write the adapter as it is after so many steps into the folder of a checkpoint; in fp32 where it does not fit the dtype of the files."""
    dtype = DTYPES[run.config.save_dtype or "fp32"]
    _written(run, folder, torch.float32 if _too_large(run, dtype) else dtype, step)


def formats_of(run: TrainRun) -> SavedFormats:
    """What a run is saved as. Raises CannotConvertError if no format can hold its adapter."""
    return chosen(_bundle(run), asked(run.config))


def check_saving(run: TrainRun) -> None:
    """Raise CannotConvertError if no format can hold what will be trained, OSError if there is no room for the files and the states."""
    bytes_a_number = DTYPES[run.config.save_dtype or "fp32"].itemsize
    files = len(formats_of(run).written) * bytes_a_number / torch.float32.itemsize
    check_room(run.config.output(), parameters_of(run.family.pipe, run.name), files, run.config)


def file_dtype(family: Family) -> str:
    """The dtype of files where none was asked for."""
    size = sum(p.numel() for p in family.parts.outline(family.denoiser).parameters())
    return "bf16" if size > LARGE else "fp32"


def refuse_too_large(run: TrainRun, dtype: torch.dtype) -> None:
    """Raise ConfigError for layers with numbers that become infinite in a dtype; a note says where the adapter was saved in fp32."""
    layers, out = _too_large(run, dtype), run.config.out or ""
    if not layers:
        return
    again = (
        f" diffpeft {run.config.COMMAND} --resume {shlex.quote(out)} --save-dtype bf16"
        if checkpoints_in(Path(out))
        else ""
    )
    error = ConfigError(
        f"save_dtype is {run.config.save_dtype}, and {len(layers)} layers have numbers that are too large for it: {listed(layers)}",
        remedy=f"Save with --save-dtype bf16 or fp32.{again}",
    )
    if team().main:
        rescue(lambda folder: _written(run, folder, torch.float32), run.name, error)
    raise error


def _too_large(run: TrainRun, dtype: torch.dtype) -> list[str]:
    """The layers with numbers that become infinite in a dtype."""
    slots = slots_of(run.family.pipe, run.name)
    return [
        layer for layer, slot in slots.items() if not all(t.to(dtype).isfinite().all() for t in slot.tensors.values())
    ]


def _bundle(run: TrainRun) -> Bundle:
    return bundle_of(run.family.pipe, run.name, family_of(run.family.pipe) or "")


def _written(run: TrainRun, folder: Path, dtype: torch.dtype, step: int | None = None) -> list[Path]:
    """Write the adapter in the formats of the run; the paths."""
    bundle = _bundle(run)
    halves = [(f, *half) for f in formats_of(run).written for half in halves_of(bundle, f).items()]
    picture = newest_sample(Path(run.config.out or ""), run.step if step is None else step)
    told, family = metadata_of(run, step, picture), family_of(run.family.pipe) or ""
    places = [folder / file_of(run.name, format, half) for format, half, _ in halves]
    for place, (format, _, part) in zip(places, halves, strict=True):
        if FORMATS[format].folder and place.is_dir():
            shutil.rmtree(place)  # parts of an earlier adapter would be read along
        component = {COMPONENT: part.metadata[COMPONENT]} if part is not bundle else {}
        converters.write(
            part,
            place,
            format=format,
            dtype=None if dtype == torch.float32 else dtype,
            finish=partial(_finished, told=told | component, format=format, family=family),
        )
    return places


def _finished(draft: Draft, told: Mapping[str, str], format: str, family: str) -> Draft:
    """A file with all that its metadata say; the hashes are of the metadata of training too."""
    return hashed(finished(draft, told, format, family))


def readers(run: TrainRun, files: Sequence[Path]) -> dict[str, str]:
    """{file: which programs read it}, and {format: why there is no such file}."""
    formats = formats_of(run)
    adapters = [path for path in files if path.suffix == ".safetensors" or path.is_dir()]
    told = {path.name: f"read by {', '.join(readers_of(path)) or 'diffpeft alone'}" for path in adapters}
    if formats.instead:
        for half in halves_of(_bundle(run), formats.instead):
            told[file_of(run.name, formats.instead, half)] += (
                f", and written because {_either(formats.refused)} hold this adapter"
            )
    return told | {f"no {format} file": why for format, why in formats.refused.items()}


def earlier_files(run: TrainRun) -> list[str]:
    """The adapter files in the output folder that an earlier run wrote, in other formats than this one."""
    written = {path.name for path in run.files}
    return [name for name in files_of(run.name) if name not in written and (run.config.output() / name).exists()]


def _either(formats: Iterable[str]) -> str:
    """What cannot, in words."""
    *others, last = formats
    return f"neither {', '.join(others)} nor {last} can" if others else f"{last} cannot"


def readers_of(path: Path) -> tuple[str, ...]:
    """The programs that read a file, or all parts of a folder."""
    parts = converters.components_in(path) if path.is_dir() else []
    read_by = [converters.inspect(part).readable_by for part in parts or [path]]
    return tuple(name for name in read_by[0] if all(name in names for names in read_by))

"""Prompts with their settings, from options and from files. Imports no torch.

A line is a prompt, and sd-scripts' flags may follow it: `a photo of sks dog --n blurry --w 512 --h 768 --d 7 --l 7.5 --g 3.5 --s 30`.
`--ci FILE` is a control image.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from diffpeft.errors import ConfigError, UnknownNameError, shown
from diffpeft.files import Json, near_path


@dataclass(frozen=True)
class SamplePrompt:
    """A picture to draw. What is None is the run's or the pipeline's own.

    Args:
        cfg: how far the prediction is led away from that of the negative prompt: classifier-free guidance.
        guidance: what a model is told that was distilled to read a guidance.
        controls: the files of the control images, for a model that reads some.
        frames: of a model of videos, how many.
        image: what it begins with, if the model is shown that: an image, or a clip with it as the first frame.
        where: the file and line that it is from, or the option.
    """

    prompt: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    cfg: float | None = None
    guidance: float | None = None
    steps: int | None = None
    controls: tuple[str, ...] = ()
    where: str = ""
    frames: int | None = None
    image: str | None = None


class Setting(NamedTuple):
    """A field of SamplePrompt that a flag or a table may set."""

    field: str
    kind: Callable[[str], object]
    least: float = 0
    words: str = "a text"


_WHOLE, _NUMBER = "a whole number from {:g}", "a number from {:g}"


def _files(said: str | Sequence[str]) -> tuple[str, ...]:
    """The names of files, one or several. Raises ValueError for one that is not there."""
    files = (said,) if isinstance(said, str) else tuple(said)
    if not files or not all(Path(file).is_file() for file in files):
        raise ValueError
    return files


FLAGS = {
    "n": Setting("negative", str),
    "w": Setting("width", int, 8, _WHOLE),
    "h": Setting("height", int, 8, _WHOLE),
    "d": Setting("seed", int, 0, _WHOLE),
    "l": Setting("cfg", float, 0, _NUMBER),
    "g": Setting("guidance", float, 0, _NUMBER),
    "s": Setting("steps", int, 1, _WHOLE),
    "ci": Setting("controls", _files, words="the file of a control image"),  # may be repeated
    "f": Setting("frames", int, 1, _WHOLE),
    "i": Setting("image", str),
}
_LETTERS = {setting.field: letter for letter, setting in FLAGS.items()}
# {what tables, and people who spell flags out, call a setting: its field}
_SPELT = {
    **{field: field for field in _LETTERS},
    "negative_prompt": "negative",
    "scale": "cfg",
    "cfg_scale": "cfg",
    "guidance_scale": "guidance",
    "sample_steps": "steps",
    "num_inference_steps": "steps",
    "image_path": "image",
    "init_image": "image",
    **dict.fromkeys(("control", "control_image", "control_images", "control_image_path", "ctrl_img"), "controls"),
    "num_frames": "frames",
    "frame_count": "frames",
    "video_length": "frames",
}
_SAMPLER = "Samples have the model's own sampler, and generate has --scheduler: leave it out."
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def of_line(line: str, where: str) -> SamplePrompt:
    """A prompt with its flags. Raises ConfigError or UnknownNameError, which say where."""
    prompt, *flags = (part.strip() for part in _FLAG.split(line))
    if not prompt:
        raise ConfigError("there is no prompt before the flags", where=where, remedy="PROMPT --w 512 --h 512 ...")
    values: Json = {}
    for flag in flags:
        name, _, text = flag.partition(" ")
        if name not in FLAGS:
            raise _unknown(f"--{name}", {f"--{letter}" for letter in FLAGS}, where)
        setting = FLAGS[name]
        value = _value(f"--{name}", text.strip(), setting, where)
        values[setting.field] = (*values.get(setting.field, ()), *value) if isinstance(value, tuple) else value
    return replace(SamplePrompt(prompt, where=where), **values)


def _unknown(name: str, known: Iterable[str], where: str) -> UnknownNameError:
    """The error for a flag or a name in a table that there is not, with what it is called here."""
    word = name.strip("-")
    error = UnknownNameError.of("setting of a sample", name, known, where=where)
    if word in ("ss", "sampler", "sample_sampler"):
        return UnknownNameError(error.what, where=where, remedy=_SAMPLER)
    spelt = _SPELT.get(word)
    hint = f"Here that is --{_LETTERS[spelt]}." if spelt else ""
    return UnknownNameError(error.what, where=where, remedy=f"{hint} {error.remedy}".strip())


def _value(name: str, said: object, setting: Setting, where: str) -> object:
    """What a setting is given, as what it must be. Raises ConfigError."""
    try:
        if isinstance(said, bool) or (setting.kind is int and isinstance(said, float) and not said.is_integer()):
            raise ValueError
        value = setting.kind(said)  # type: ignore[arg-type]
        if isinstance(value, (int, float)) and not setting.least <= value < float("inf"):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(
            f"{name} is {shown(said)}", where=where, remedy=f"It is {setting.words.format(setting.least)}."
        ) from None
    return value


def read(path: Path) -> list[SamplePrompt]:
    """The prompts of a file. Raises ConfigError or UnknownNameError, which name the file and the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"cannot read the file of prompts: {error.strerror}",
            where=path,
            remedy=near_path(path) or "Check the path.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the file of prompts is no UTF-8 text", where=path, remedy="Save it as UTF-8.") from error
    rows = _TABLES.get(path.suffix.lower())
    prompts = _lines(text, path) if rows is None else [_of_row(row, f"{path}, {at}") for at, row in rows(text, path)]
    if not prompts:
        raise ConfigError("no prompt is in the file of prompts", where=path, remedy="Write a prompt on each line.")
    return prompts


def _lines(text: str, path: Path) -> list[SamplePrompt]:
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [of_line(line, f"{path}, line {n}") for n, line in numbered if line and not line.startswith("#")]


Line = tuple[str, object]  # where in the file, and what is there


def _of_row(row: object, where: str) -> SamplePrompt:
    """A prompt from a text, or from a table of `prompt` and settings."""
    if isinstance(row, str):
        return of_line(row, where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ConfigError("there is no prompt", where=where, remedy='It is a text, or a table with prompt = "...".')
    values: Json = {}
    for name, said in row.items():
        if name not in _SPELT and name != "prompt":
            raise _unknown(name, {*_SPELT, "prompt"}, where)
        if name != "prompt":
            setting = FLAGS[_LETTERS[_SPELT[name]]]
            values[setting.field] = _value(name, said, setting, where)
    return replace(SamplePrompt(row["prompt"].strip(), where=where), **values)


def _json_rows(text: str, path: Path) -> list[Line]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"the file of prompts is no JSON ({error})", where=path, remedy='It is ["a prompt", {"prompt": "..."}].'
        ) from error
    if not isinstance(rows, list):
        raise ConfigError("the file of prompts is no list", where=path, remedy='It is ["a prompt", {"prompt": "..."}].')
    return [(f"prompt {number}", row) for number, row in enumerate(rows, 1)]


def _toml_rows(text: str, path: Path) -> list[Line]:
    """sd-scripts' shape, [prompt] with what all have and [[prompt.subset]] for each, or a list [[prompt]]."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"the file of prompts is no TOML ({error})",
            where=path,
            remedy='It has [[prompt]], with prompt = "..." below.',
        ) from error
    said = table.get("prompt")
    if isinstance(said, dict):
        common = {name: value for name, value in said.items() if name != "subset"}
        subsets = said.get("subset", [{}])
        dicts = isinstance(subsets, list) and all(isinstance(row, dict) for row in subsets)
        said = [common | row for row in subsets] if dicts else None
    if table.keys() != {"prompt"} or not isinstance(said, list):
        raise ConfigError("the file of prompts is no list of them", where=path, remedy="Write [[prompt]] for each.")
    return [(f"prompt {number}", row) for number, row in enumerate(said, 1)]


_TABLES: Mapping[str, Callable[[str, Path], list[Line]]] = {".json": _json_rows, ".toml": _toml_rows}


def check_sizes(prompts: Iterable[SamplePrompt], multiple: int | None) -> None:
    """Raise ConfigError for a width or height that the model cannot draw, if its configs tell."""
    for prompt in prompts:
        for flag, side in (("--w", prompt.width), ("--h", prompt.height)):
            if side is not None and multiple and side % multiple:
                below = side // multiple * multiple
                near = " or ".join(str(n) for n in (below, below + multiple) if n)
                raise ConfigError(
                    f"{flag} is {side}",
                    where=prompt.where,
                    remedy=f"For this model it is a multiple of {multiple}: {near}.",
                )

"""A1111's prompt tags: `<lora:name:0.8>`, `<lora:name:TE:UNET>`, weights by block, `<lora:name:1:1:lbw=OUTALL>`, and from when to when, `start=`, `stop=`.

The tags are those of stable-diffusion-webui (extra_networks_lora.py: the text encoders' strength comes first, the denoiser's second, which is the
same if it is left out), the weights by block and the steps those of hako-mikan's sd-webui-lora-block-weight. `<lyco:...>` is the same as `<lora:...>`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from diffpeft import converters
from diffpeft.bundle import COMPONENTS
from diffpeft.converters.families.base import Table
from diffpeft.errors import ConfigError, UnknownNameError, shown

if TYPE_CHECKING:
    from diffpeft.model.mix import Level, Strength

Value = TypeVar("Value")
_TAG = re.compile(r"\s*<(?:lora|lyco):([^>]*)>")
_NAMED = ("te", "unet", "lbw", "w", "start", "stop", "step")
_END = ".safetensors"

# What the numbers of a vector are for. BASE (CLIP, T5) are text encoders; IN, M and OUT number the blocks as LDM and SGM do.
_SD, _XL = (
    ["BASE", *(f"IN{i:02}" for i in range(n)), "M00", *(f"OUT{i:02}" for i in range(n))] for n in (12, 9)
)  # all blocks, for LoRAs of every layer; the shorter vectors have those with attention
_SD_LORA = ["BASE", *(f"IN{i:02}" for i in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{i:02}" for i in range(3, 12))]
_XL_LORA = ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02}" for i in range(6))]
_FLUX = ["CLIP", "T5", "IN", *(f"D{i:02}" for i in range(19)), *(f"S{i:02}" for i in range(38)), "OUT"]
VECTORS: dict[str, tuple[Sequence[str], ...]] = {
    "sd15": (_SD_LORA, _SD),
    "sd2": (_SD_LORA, _SD),
    "sdxl": (_XL_LORA, _XL),
    "flux": (_FLUX,),
}
# One digit a number of the family's first vector. BASE is 1 as in the extension's README and script (an older file of it has 0).
_ON_OFF = {n: {"ALL": "1" * n, "NONE": "0" * n} for n in (12, 17, 61)}
PRESETS: dict[int, dict[str, str]] = _ON_OFF | {
    12: _ON_OFF[12] | {"INALL": "111110000000", "OUTALL": "100000111111"},
    17: _ON_OFF[17]
    | {
        "INS": "11110000000000000",
        "IND": "10001110000000000",
        "INALL": "11111110000000000",
        "MIDD": "10001111111100000",
        "OUTD": "10000000111100000",
        "OUTS": "10000000000011111",
        "OUTALL": "10000000111111111",
    },
}
_SGM = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.")
_FLUX_ENDS = {"IN": ("x_embedder", "context_embedder", "time_text_embed"), "OUT": ("norm_out", "proj_out")}


@dataclass(frozen=True)
class Tag:
    """One tag: an adapter's name, its strength on the denoiser and on the text encoders, and a preset or a weight for each block.

    It acts on the denoiser from `start` until before `stop`: an int is the number of a step, the first is 1; a float a share of the steps.
    """

    name: str
    unet: float = 1.0
    text_encoder: float = 1.0
    lbw: str | tuple[float, ...] | None = None
    start: float | int | None = None
    stop: float | int | None = None

    def __str__(self) -> str:
        """As it is written in a prompt."""
        numbers = [self.unet] if self.unet == self.text_encoder else [self.text_encoder, self.unet]
        lbw = self.lbw if isinstance(self.lbw, str | None) else ",".join(f"{weight:g}" for weight in self.lbw)
        named = {"lbw": lbw, "start": self.start, "stop": self.stop}
        said = [f"{key}={value}" for key, value in named.items() if value is not None]
        return f"<lora:{':'.join([self.name, *(f'{number:g}' for number in numbers), *said])}>"

    def at(self, strength: float) -> Tag:
        """The same with another strength."""
        return replace(self, unet=strength, text_encoder=strength)

    def level(self, place: str, strength: float, steps: int) -> Level:
        """A strength on a component, or on a layer of one, in a run of so many steps. Text encoders have read the prompt before the first one."""
        if (self.start, self.stop) == (None, None) or place.startswith("text_encoder"):
            return strength
        from diffpeft.model import schedule  # torch

        start, stop = _share(self.start, steps, 0.0), _share(self.stop, steps, 1.0)
        points = {0.0: 0.0} | ({start: strength} if start < stop else {})
        return schedule.steps(points | ({stop: 0.0} if stop < 1 else {}))

    def strength_on(self, place: str) -> float:
        """The strength on a component, or on a layer of one."""
        return self.text_encoder if place.startswith("text_encoder") else self.unet


def parsed(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags (and the spaces before them), and the tags. A prompt without any stays as it is.

    Raises ConfigError or UnknownNameError for a tag that says what is not known.
    """
    tags = [_tag(match[1]) for match in _TAG.finditer(prompt)]
    return (_TAG.sub("", prompt).strip() if tags else prompt), tags


def resolved(
    files: Sequence[tuple[str, Value]], tags: Iterable[Tag], folder: Path
) -> list[tuple[str | Path, Value | Tag]]:
    """What to load and how strong each is: the given `files`, then those that only tags name, `name.safetensors` in `folder`.

    A tag's strength takes the place of that of the given file with its name. Raises UnknownNameError if there is none.
    """
    in_folder = {path.name.removesuffix(_END): path for path in sorted(folder.glob(f"*{_END}"))}
    resolved_files: list[tuple[str | Path, Value | Tag]] = list(files)
    names = [Path(file).name.removesuffix(_END) for file, _ in files]
    seen: set[str] = set()
    for tag in tags:
        name = tag.name.removesuffix(_END)
        if name in seen or names.count(name) > 1:
            what = "two tags are" if name in seen else "two files given are"
            raise ConfigError(f"{what} for {shown(name)}", remedy="Name each adapter once.")
        seen.add(name)
        if name in names:
            n = names.index(name)
            resolved_files[n] = (resolved_files[n][0], tag)
        elif name in in_folder:
            resolved_files.append((in_folder[name], tag))
        else:
            raise UnknownNameError.of("adapter", name, {*in_folder, *names}, f"the prompt's tags (looked in {folder})")
    return resolved_files


def _share(point: float | int | None, steps: int, default: float) -> float:
    """The share of the steps that lie before a point."""
    if isinstance(point, int):
        return min(max(point - 1, 0) / steps, 1.0)
    return default if point is None else point


def strengths(tag: Tag, family: str | None, layers: Sequence[str] | None = None, steps: int = 25) -> Strength:
    """What `set_adapters` takes: one number, or numbers by component and block. `layers`: the adapter's own, to name nothing else.

    `steps`: how many a run has, for tags that say from which step to which.

    Raises ConfigError or UnknownNameError if the family has no such blocks.
    """
    if tag.lbw is None and tag.unet == tag.text_encoder and (tag.start, tag.stop) == (None, None):
        return tag.unet
    table = converters.TABLES.get(family or "")
    parts = COMPONENTS if table is None else tuple(table.components)
    numbers = {part: tag.strength_on(part) for part in parts} | _by_block(tag, family)
    by_pattern = {pattern: tag.level(pattern, number, steps) for pattern, number in numbers.items()}
    if layers is None:
        return by_pattern
    return {
        pattern: strength
        for pattern, strength in by_pattern.items()
        if any(layer == pattern or layer.startswith(f"{pattern}.") for layer in layers)
    }


def _by_block(tag: Tag, family: str | None) -> dict[str, float]:
    """{pattern of a block's layers: strength}; empty for a tag without weights by block."""
    if tag.lbw is None:
        return {}
    weights = _weights(tag, family)
    return {
        pattern: tag.strength_on(pattern) * weights.get(block, 0.0)
        for block, patterns in places(family or "").items()
        for pattern in patterns
    }


@functools.cache
def places(family: str) -> Mapping[str, tuple[str, ...]]:
    """{block: patterns of its layers} of a family with known blocks. What is in no block (time embedding, output layer) keeps the whole strength."""
    table = converters.TABLES[family]
    encoders = [part for part in table.components if part.startswith("text_encoder")]
    blocks = _flux_blocks(encoders) if family == "flux" else _unet_blocks(encoders, table)
    return {block: tuple(patterns) for block, patterns in blocks.items()}


def _flux_blocks(encoders: Sequence[str]) -> dict[str, list[str]]:
    blocks = {block: [f"transformer.{name}" for name in ends] for block, ends in _FLUX_ENDS.items()}
    blocks |= {block: [encoder] for block, encoder in zip(("CLIP", "T5"), encoders, strict=True)}
    for letter, name in (("D", "transformer_blocks"), ("S", "single_transformer_blocks")):
        blocks |= {b: [f"transformer.{name}.{int(b[1:])}"] for b in _FLUX if b[0] == letter}
    return blocks


def _unet_blocks(encoders: Sequence[str], table: Table) -> dict[str, dict[str, None]]:
    """Blocks by the numbers that LDM and SGM give them. Dicts are sets in order."""
    blocks = {"BASE": dict[str, None].fromkeys(encoders)}
    for rule in table.rules["unet"]:
        if m := _SGM.match(rule.original):
            block = f"{m[1].removesuffix('put').upper()}{int(m[2]):02}" if m[1] else "M00"
            patterns = blocks.setdefault(block, {})
            for name, _ in rule.parts:
                # an attention goes with the resnet before it, also in a UNet that has some where the family's has none
                patterns |= dict.fromkeys((_pattern(name), _pattern(name).replace(".resnets.", ".attentions.")))
    return blocks


def _pattern(layer: str) -> str:
    """`unet.down_blocks.1.attentions.0` of any layer in it: with what LDM gives one number."""
    return ".".join(["unet", *layer.split(".")[: 1 if layer.startswith("mid_block") else 4]])


def _weights(tag: Tag, family: str | None) -> dict[str, float]:
    """{block: its weight}. Blocks that the vector leaves out have 0, as in the extension."""
    vectors = VECTORS.get(family or "")
    if vectors is None:
        raise ConfigError(
            f"<lora:{tag.name}> has weights by block, and those of {family or 'this pipeline'} are not known",
            remedy=f"They are for {', '.join(VECTORS)}.",
        )
    if isinstance(tag.lbw, str):
        presets = PRESETS[len(vectors[0])]
        if tag.lbw not in presets:
            raise UnknownNameError.of(f"preset of block weights for {family} called", tag.lbw, presets)
        return dict(zip(vectors[0], map(float, presets[tag.lbw]), strict=True))
    numbers = tag.lbw or ()
    names = next((v for v in vectors if len(v) == len(numbers)), None)
    if names is None:
        raise ConfigError(
            f"<lora:{tag.name}> has {len(numbers)} weights by block",
            remedy=f"{family} has {' or '.join(str(len(v)) for v in vectors)}.",
        )
    return dict(zip(names, numbers, strict=True))


def _tag(text: str) -> Tag:
    """The tag between `<lora:` and `>`."""
    name, *settings = (part.strip() for part in text.split(":"))
    where = f"<lora:{text}>"
    if not name:
        raise ConfigError("a tag without a name", where=where, remedy="For example <lora:style:0.8>.")
    numbers, named = _sorted(settings, where)
    if len(numbers) > 2:
        raise ConfigError("too many numbers", where=where, remedy="It is <lora:NAME:TEXT_ENCODER:UNET>.")
    te, unet = (*numbers, "", "")[:2]
    text_encoder = _number(named.get("te", te or "1"), where)
    unet = named.get("unet", unet)
    unet_strength = _number(unet, where) if unet else text_encoder
    return Tag(name, unet_strength, text_encoder, block_weights(named.get("lbw", ""), where), *_span(named, where))


def _span(named: Mapping[str, str], where: str) -> tuple[float | int | None, float | int | None]:
    """From when and until when an adapter acts: start= and stop=, or both as step=FROM-TO."""
    start, stop = named.get("start", ""), named.get("stop", "")
    if "step" in named:
        start, dash, stop = named["step"].partition("-")
        if not (dash and start and stop):
            raise ConfigError(f"step={named['step']}", where=where, remedy="It is step=FROM-TO, as step=5-10.")
    return _point(start, where), _point(stop, where)


def _point(text: str, where: str) -> float | int | None:
    """The number of a step, a share of the steps, or None for an empty text."""
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return int(text[:9])
    share = _number(text, where)
    if not 0 <= share <= 1:
        raise ConfigError(
            f"{shown(text)} is no step and no share of them",
            where=where,
            remedy="A whole number is a step, the first is 1; a number with a point is a share, from 0.0 to 1.0.",
        )
    return share


def _sorted(settings: Sequence[str], where: str) -> tuple[list[str], dict[str, str]]:
    """The settings of a tag without names, and those with; weights by block are called lbw."""
    named = dict(part.split("=", 1) for part in settings if "=" in part)
    if unknown := [key for key in named if key not in _NAMED]:
        raise UnknownNameError.of("setting of a tag called", unknown[0], _NAMED, where)
    plain = [part for part in settings if "=" not in part]
    named["lbw"] = named.get("lbw", named.get("w", ""))
    # an old spelling puts the weights by block after the strength: <lora:name:1:OUTALL>
    if not named["lbw"] and len(plain) > 1 and not _is_number(plain[-1]):
        named["lbw"] = plain.pop()
    return plain, named


def block_weights(text: str, where: str) -> str | tuple[float, ...] | None:
    """Weights by block as a tag says them: the name of a preset, or numbers with commas; None for an empty text."""
    if not text:
        return None
    if "," in text:
        return tuple(_number(part, where) for part in text.split(","))
    known = {name for presets in PRESETS.values() for name in presets}
    if text not in known:
        raise UnknownNameError.of("preset of block weights called", text, known, where)
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, where: str) -> float:
    if not _is_number(text) or not math.isfinite(float(text)):
        raise ConfigError(f"{shown(text.strip())} is no finite number", where=where, remedy="For example 0.8.")
    return float(text)

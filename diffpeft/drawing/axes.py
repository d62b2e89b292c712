"""What a grid varies: `strength=0:1.5:0.5 x lora=a,b` is four columns and two rows.

The first axis lies across, the second down; each combination of those after is a grid of its own. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from diffpeft.drawing.ranges import numbers, whole_numbers
from diffpeft.drawing.samplers import chosen
from diffpeft.errors import ConfigError, UnknownNameError, shown

_NAME = re.compile(r"\s*([^=]*?)\s*(?:=(.*))?", re.S)
_TIMES = re.compile(r"\s+[xX×*]\s+(?=[^\s=]+\s*=|(?:prompt|seed)\s*(?:$|[xX×*]\s))")
NONE = "none"  # the value of `lora` that is no adapter


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes, one after another. `kind` is a name in KINDS, or `weight`, of the adapter called `name`."""

    kind: str
    name: str
    values: tuple[object, ...]

    @property
    def labels(self) -> list[str]:
        """What stands beside the pictures."""
        say = {"prompt": str, "lora": str, "scheduler": str}.get(self.kind, lambda v: f"{self.name} {_number(v)}")
        return [say(value) for value in self.values]


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(text: str, where: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _prompts(text: str, where: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


def _schedulers(text: str, where: str) -> list[str]:
    return [chosen(name).name for name in _names(text, where)]


def _steps(text: str, where: str) -> list[int]:
    return whole_numbers(text, where, least=1)


Reader = Callable[[str, str], Sequence[object]]
KINDS: Mapping[str, Reader] = {
    "strength": numbers,
    "lora": _names,
    "seed": whole_numbers,
    "prompt": _prompts,
    "steps": _steps,
    "guidance": numbers,
    "scheduler": _schedulers,
}
_SPELT = {"seeds": "seed", "prompts": "prompt", "sampler": "scheduler", "cfg": "guidance", "loras": "lora"}
_HELP = "For example: --grid 'strength=0:1.5:0.5 x lora=a,b', 'seed=1-4', 'prompt=a cat|a dog', 'NAME=0,1'."


def parsed(text: str, standing: Mapping[str, Sequence[object]], adapters: Collection[str]) -> list[Axis]:
    """The axes of a grid. `standing`: the values that `prompt` and `seed` have where none are said: those of all pictures.

    `adapters`: the names of those that may have an axis for their weight. Raises ConfigError or UnknownNameError.
    """
    axes = [_axis(part, standing, adapters) for part in _TIMES.split(text.strip())]
    names = [axis.name for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two axes of the grid are {shown(twice)}", remedy="Give all its values in one.")
    return axes


def _axis(text: str, standing: Mapping[str, Sequence[object]], adapters: Collection[str]) -> Axis:
    match = _NAME.fullmatch(text)
    name, values = (match[1], match[2]) if match else (text, None)
    kind = name if name in adapters else _SPELT.get(name, name)
    if values is None and kind in standing:
        return Axis(kind, kind, tuple(standing[kind]))
    if values is None or not values.strip():
        raise ConfigError(f"the axis {shown(text.strip())} has no values", where="--grid", remedy=_HELP)
    where = f"--grid {name}"
    if kind in adapters:
        return Axis("weight", kind, tuple(numbers(values, where)))
    if kind not in KINDS:
        raise UnknownNameError.of("axis of a grid called", name, {*KINDS, *adapters}, "--grid")
    spread = tuple(KINDS[kind](values, where))
    if not all(str(value).strip() for value in spread if kind != "prompt"):
        raise ConfigError(f"{where} has an empty value", where="--grid", remedy=_HELP)
    return Axis(kind, kind, spread)

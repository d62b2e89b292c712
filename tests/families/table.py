"""What docs/families.md says of each family, from the registries that the tests of families, converters and pipelines go through.

`python -m tests.families.table` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffpeft.converters.families import TABLES
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.readers import readers
from diffpeft.families import FAMILIES, Family, named_as
from diffpeft.families.dit import ClipTransformer
from tests.converters.table import BEGIN, END, formats_of, table
from tests.train.presets import MEMORIES, recorded

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
NONE = "–"


def families() -> list[str]:
    """Those that are trained, and then those whose layers have names alone."""
    return [*FAMILIES, *(family for family in TABLES if family not in FAMILIES)]


def abilities() -> str:
    """Family by what can be done with it."""
    head = ("", "names", "trained from", "text encoders", "edit", "video")
    return table(head, ([f"`{family}`", *_abilities(family)] for family in families()))


def _abilities(family: str) -> Iterable[str]:
    names, kind = named_as(family), FAMILIES.get(family)
    yield NONE if names is None else "its own" if names == family else f"`{names}`"
    if kind is None:
        yield from (NONE,) * 4
    else:
        yield ", ".join(name.removesuffix("Pipeline") for name in kind.pipelines) or "any other pipeline"
        yield ", ".join(f"`{name}`" for name in kind.adaptable) or NONE
        yield _edits(kind)
        yield _clips(kind)


def _edits(kind: type[Family]) -> str:
    fewest, most = kind.controls
    return NONE if not most else f"{fewest} to {most} images" if fewest < most else f"{most} image{'s' * (most > 1)}"


def _clips(kind: type[Family]) -> str:
    if not issubclass(kind, ClipTransformer):
        return NONE
    return "clips, with their first frame" if kind.first_frame else "clips"


PROGRAMS = (
    "diffusers",
    "ComfyUI",
    "sd-scripts",
    "A1111",
    "OneTrainer",
)  # those that know models; libraries ask the model for its names


def programs() -> str:
    """Family by program: the formats of which it reads LoRAs as they are meant."""
    return table(
        ["", *PROGRAMS], ([f"`{family}`", *(_read_by(program, family) for program in PROGRAMS)] for family in TABLES)
    )


def _read_by(program: str, family: str) -> str:
    written = (name for name, format in FORMATS.items() if format.writable and family in format.tables)
    return ", ".join(f"`{name}`" for name in written if program in readers(name, ("lora",), family)) or NONE


def memories() -> str:
    """Published model by memory: what `--memory` picks."""
    rows = ([name, *(_picked(picked[memory]) for memory in MEMORIES)] for name, picked in recorded().items())
    return table(["", *MEMORIES], rows)


def _picked(options: str) -> str:
    return f"`{options}`" if options.startswith("--") else options


HELD = (
    "What `--memory` picks for published models, as estimated: at the model's own resolution, of one picture (of models of clips: one frame), at rank 16 in\n"
    "bf16, with 1 GiB left free. `not`: it does not fit. Sizes are those of the models' cards; of a language model that reads pictures too, only the half that\n"  # noqa: E501
    "reads words is counted. `python -m tests.train.presets` computes it anew.\n"
)
READ = (
    "Which programs read LoRAs of a family as they are meant, in which of our formats. Layers that they pass over are told by `diffpeft inspect`, and\n"
    "by the report of a run.\n"
)
NAMED = "Which format has names for a family: x is read and written, r only read.\n"


def text() -> str:
    """All of it."""
    return "\n".join((abilities(), HELD, memories(), READ, programs(), NAMED, formats_of()))


def main() -> None:
    """Put it where it belongs."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + text() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()

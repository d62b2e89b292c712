"""What docs/formats.md says of formats and methods, from the levels that test_matrix.py holds every cell to.

`python -m tests.converters.table` writes it into the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffpeft.converters.families import TABLES
from diffpeft.converters.formats import FORMATS, Format
from tests.converters import factory
from tests.converters.test_matrix import NO, SOURCES, WHERE, crosses, exists, expected

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- formats -->\n", "<!-- /formats -->\n"
WORDS = {  # a method of factory.py for people
    "lora": "LoRA",
    "tucker": "LoRA, Tucker (LoCon)",
    "dora": "DoRA by output",
    "dora-in": "DoRA by input",
    "loha": "LoHa",
    "loha-tucker": "LoHa, Tucker",
    "lokr": "LoKr, both halves whole",
    "lokr-first": "LoKr, first half factored",
    "lokr-second": "LoKr, second half factored",
    "lokr-both": "LoKr, both halves factored",
    "lokr-tucker": "LoKr, Tucker",
    "oft": "OFT of outputs",
    "oft-rescaled": "OFT of outputs, rescaled",
    "boft": "BOFT of outputs",
    "ia3-in": "(IA)³ of inputs",
    "ia3-out": "(IA)³ of outputs",
    "glora": "GLoRA",
    "full": "whole weights and biases",
    "norm": "norms",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def formats_of() -> str:
    """Family by format, for docs/families.md: x is read and written, r only read."""
    return table(
        ["", *(f"`{name}`" for name in FORMATS)],
        ([f"`{family}`", *(_spells(fmt, family) for fmt in FORMATS.values())] for family in TABLES),
    )


def _spells(fmt: Format, family: str) -> str:
    own = fmt.tables.get(family)
    if own is None or not any(fmt.word(component, own) is not None for component in own.components):
        return ""
    return "x" if fmt.writable else "r"


def methods() -> str:
    """Method by format: the level of writing what another format holds."""
    return table(
        ["", *(f"`{name}`" for name in factory.FORMATS)],
        ([WORDS[method], *(_level(method, target) for target in factory.FORMATS)] for method in WORDS),
    )


def _level(method: str, target: str) -> str:
    """The levels that occur, the best first; over fused or turned layers in brackets if they differ."""
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for family in WHERE[method]:
        for source in SOURCES[method]:
            if source != target and exists(source, family) and exists(target, family) and source != "peft":
                level = expected(method, source, target, family)
                found[crosses(source, target, family)].add("–" if level == NO else level)
    plain, fused = (" or ".join(sorted(levels, key="L0 L1 –".index)) for levels in (found[False], found[True]))
    return plain if not fused or fused == plain else f"{plain or '–'} ({fused})"


def text() -> str:
    """All of it."""
    return methods()


def main() -> None:
    """Put it where it belongs."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + text() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()

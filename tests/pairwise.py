"""Which rows of a matrix `make test` runs; `make test-all` runs them all.

A fault that takes two things to show needs the two to meet once, whatever the others are: so each pair of values that occurs in two columns is met by
a chosen row. Where three things decide together, their columns are named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]


def pairwise(rows: Iterable[Row], together: Sequence[tuple[int, ...]] = ()) -> list[Row]:
    """The rows, in order, that show a pair of values for the first time; or for columns named in `together`, values of all of these."""
    rows, met, chosen = list(rows), set(), []
    columns = [*itertools.combinations(range(len(rows[0])), 2), *together]
    for row in rows:
        shown = {(of, tuple(row[n] for n in of)) for of in columns}
        if not shown <= met:
            chosen.append(row)
            met |= shown
    return chosen


def covering(*columns: Sequence[Any]) -> list[Row]:
    """Rows that show each pair of values of any two columns, about as few as will do: always the one that shows most that is new."""
    rows = list(itertools.product(*columns))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing, chosen = set().union(*pairs.values()), list[Row]()
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def params(rows: Iterable[Row], chosen: Iterable[Row]) -> list[Any]:
    """All rows as parameters of a test; those that are not chosen are slow."""
    quick = set(chosen)
    return [pytest.param(*row, marks=() if row in quick else pytest.mark.slow) for row in rows]

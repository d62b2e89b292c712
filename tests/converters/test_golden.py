"""The bytes of files are what golden.json says they are."""

from __future__ import annotations

import json

import pytest

from tests.converters import golden

BEFORE = json.loads(golden.PATH.read_text())


def test_every_method_and_format_has_a_row():
    assert [" ".join(source) for source in golden.sources()] == [*BEFORE]


@pytest.mark.parametrize("source", golden.sources(), ids=" ".join)
def test_files_are_byte_for_byte_what_they_were(source, tmp_path):
    assert dict(golden.results(*source, tmp_path)) == BEFORE[" ".join(source)]

"""Short runs of mutate.py and kills.py; DIFFPEFT_ROBUSTNESS=10 makes them ten times as long."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.robustness import kills, mutate, seeds

TIMES = int(os.environ.get("DIFFPEFT_ROBUSTNESS", "1"))


@pytest.fixture(scope="module")
def few():
    return seeds.seeds(few=True)


def test_damaged_files_are_refused_or_read_and_change_nothing(few):
    account = mutate.run(150 * TIMES, 0, few)
    assert not account.faults
    assert all(
        account.counts[f"{step} ok"] for step in ("detect", "inspect", "read", "convert", "load", "save", "unload")
    )


def test_damaged_folders_of_language_models_are_refused_or_read_and_change_nothing():
    account = mutate.run(60 * TIMES, 1, seeds.language_seeds(), language=True)
    assert not account.faults and account.counts["from_pretrained ok"]


QUICK_WAYS = ("a file", "several PEFT folders")
WAYS = [way if way in QUICK_WAYS else pytest.param(way, marks=pytest.mark.slow) for way in kills.WAYS]


@pytest.mark.parametrize("way", WAYS)
def test_a_writer_that_is_killed_leaves_the_old_or_the_new(way):
    """Before events all over a save; the last steps, where it commits, are in each run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dict(kills.every_event(kills.WAYS[way](), step=max(1, STEPS[way] // TIMES)))
        assert len(found) >= 8 and not [(event, wrong) for event, wrong in found.items() if wrong]


STEPS = {"a file": 1, "a PEFT folder": 5, "several PEFT folders": 19, "several files": 13, "save_pretrained": 11}


@pytest.mark.parametrize("way", ["a PEFT folder", "save_pretrained"])
def test_a_reader_beside_a_writer_gets_one_version(way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reads, wrong = kills.beside(kills.WAYS[way](), 1.0 * TIMES)
        assert reads > 20 and not wrong
        assert not [w for own in kills.at_random(kills.WAYS[way](), 3 * TIMES, random.Random(0)) for w in own]


def test_the_checks_find_what_they_look_for(monkeypatch):
    """A reader that does not look into journals does find old or missing files."""
    from diffpeft.files import snapshots

    monkeypatch.setattr(snapshots, "resolved", lambda path: path)
    with tempfile.TemporaryDirectory() as folder:
        way, place, k = kills.WAYS["a PEFT folder"](), Path(folder), 1
        way.write(place, k)
        event, wrong = 30, []
        while not wrong and kills.killed_at(way, place, event, k + 1):
            wrong, event, k = kills.check(way, place, (k, k + 1), k + 2), event + 1, k + 2
        assert wrong

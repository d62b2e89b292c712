"""What is shown while a run goes on: a bar on a terminal or in a notebook, and plain lines elsewhere."""

import io
import sys
import time
from types import SimpleNamespace

import pytest

from diffpeft.train import progress
from diffpeft.train.journal import Logbook, StepNumbers
from diffpeft.train.progress import Progress, in_notebook, shown
from diffpeft.train.watch import Quiet


def lines(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_the_line_has_losses_rate_speed_and_the_time_left_with_all_that_lies_between_steps(clock):
    bar = Progress()
    bar.phase("training")
    for step in range(1, 11):
        clock.seconds += 2  # a second of it is saving
        bar.figures(lr=1e-4, rate=1.0)
        bar.step(step, 40, 0.5)
    bar.figures(heldout=0.25)
    assert bar.numbers() == "step 10/40  loss 0.5000  held-out 0.2500  lr 0.0001  1.00 it/s  left 1:00"
    clock.seconds += 2
    bar.step(40, 40, 0.5)
    assert bar.numbers() == "step 40/40  loss 0.5000  held-out 0.2500  lr 0.0001"


def test_a_run_that_goes_on_is_timed_by_its_own_steps(clock):
    bar = Progress()
    bar.phase("training")
    clock.seconds += 4
    bar.step(901, 1000, 0.3)
    assert bar.numbers() == "step 901/1000  loss 0.3000"
    clock.seconds += 8
    bar.step(903, 1000, 0.3)
    assert bar.numbers() == "step 903/1000  loss 0.3000  0.25 it/s  left 6:28"  # and the mean loss is a number at once


def test_the_mean_loss_is_smoothed_and_hours_are_told(clock):
    bar = Progress()
    bar.phase("training")
    for done, loss in ((1, 1.0), (2, 2.0)):
        clock.seconds += 5
        bar.step(done, 3000, loss)
    assert "loss 1.0500" in bar.numbers() and "left 4:09:50" in bar.numbers()


def test_away_from_a_terminal_lines_come_at_least_so_often_each_with_the_loss(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with Progress() as bar:
        bar.phase("training")
        bar.note("a note")
        bar.step(1, 3, 0.5)
        time.sleep(0.3)
        bar.step(3, 3, 0.4)
    told = lines(capsys)
    assert any("a note" in line for line in told) and sum("training: step" in line for line in told) >= 4
    assert all("loss" in line for line in told if "a note" not in line)
    assert progress.PATIENCE + 5 <= 30


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


def test_on_a_terminal_there_is_one_bar_and_notes_stay(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as bar:
        bar.phase("training")
        bar.step(1, 2, 0.5)
        bar.note("[not markup]")
        bar.figures(heldout=0.25)
        bar.step(2, 2, 0.5)
    assert "[not markup]" in terminal.getvalue() and "step 2/2  loss 0.5000  held-out 0.2500" in terminal.getvalue()


@pytest.fixture
def notebook(monkeypatch):
    """A notebook's kernel, as IPython shows it, with ipywidgets."""
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress, "find_spec", lambda name: object())
    return shell


def test_a_notebook_is_told_by_its_kernel_and_needs_ipywidgets(notebook, monkeypatch):
    assert in_notebook()
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    assert not in_notebook()
    monkeypatch.setattr(progress, "find_spec", lambda name: object())
    del notebook.kernel  # ipython in a terminal
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_in_a_notebook_a_run_has_a_bar_unless_somebody_else_is_told(notebook, monkeypatch):
    made = []
    monkeypatch.setattr(Progress, "__enter__", lambda self: made.append(self) or self)
    monkeypatch.setattr(Progress, "__exit__", lambda self, *exc: None)
    with shown(None) as watch:
        assert made == [watch]
    other = Quiet()
    with shown(other) as watch:
        assert watch is other
    del notebook.kernel
    with shown(None) as watch:
        assert isinstance(watch, Quiet) and len(made) == 1


def test_the_bar_in_a_notebook_is_richs(notebook, monkeypatch):
    from rich import progress as rich

    consoles = []
    monkeypatch.setattr(rich.Progress, "start", lambda self: consoles.append(self.console))
    monkeypatch.setattr(rich.Progress, "stop", lambda self: None)
    with Progress() as bar:
        bar.step(1, 2, 0.5)
    assert [console.is_jupyter for console in consoles] == [True]


def test_the_logbook_shows_the_rate_and_the_speed_of_late():
    shown_numbers, seconds = [], iter([0.0, 9.0, 11.0, 12.0])
    book = Logbook(every=100, seconds=lambda: next(seconds), figures=lambda **numbers: shown_numbers.append(numbers))
    book.begin(0, [])
    for step in (1, 2, 3):
        book.told(StepNumbers(step, 0.5, 1.0, {"x1": 3e-4, "x0.5": 1.5e-4}))
    assert [numbers["lr"] for numbers in shown_numbers] == [3e-4] * 3 and shown_numbers[2]["rate"] == pytest.approx(
        1 / 1.9
    )

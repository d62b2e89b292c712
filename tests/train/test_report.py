"""The page of a run, from made-up values: self-contained, escaped, and with curves that show all that they are of."""

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from diffpeft.train.checkpoints import writing
from diffpeft.train.heldout import Band, Best, HeldoutLoss
from diffpeft.train.report import Page, PictureRow, Pictures, Status, Use, charts, live, words
from diffpeft.train.report.live import Live
from diffpeft.train.report.page import COLUMNS, render
from diffpeft.train.report.thumbnails import data_uri
from diffpeft.train.signals import Interrupted

EVIL = "<script>alert('x')</script> & \"quotes\""
BANDS = (Band(0.0, 0.5, 0.2, 0.15, 0.01), Band(0.5, 1.0, 0.5, 0.52, 0.04))
HELDOUT = [HeldoutLoss(step, 0.35, 0.35 - 0.001 * step, 0.004, BANDS) for step in (0, 10, 20)]
NUMBERS = np.random.default_rng(0)


def picture(colour=(200, 30, 30), size=(64, 64)):
    return Image.new("RGB", size, colour)


def everything(tmp_path, **changes):
    (tmp_path / "a b#1.safetensors").write_bytes(b"x")
    facts = dict(
        title=f"a {EVIL}",
        status=Status("running"),
        total=40,
        losses=NUMBERS.uniform(0.1, 0.3, 20).tolist(),
        rates=[1e-4] * 20,
        before_after=Pictures(
            ["strength 0", "strength 1"], [PictureRow(EVIL, [picture(), np.zeros((8, 8, 3), np.uint8)])]
        ),
        samples=Pictures([str(n) for n in range(20)], [PictureRow("p", [picture((n, 0, 0)) for n in range(20)])]),
        drawn_on="turbo",
        heldout=HELDOUT,
        best=Best(10, f"the lowest {EVIL}"),
        measures={
            "heldout_loss": {"before": 0.5, "after": 0.4, "standard_error": 0.01},
            EVIL: {"before": 0.0, "after": 1.0},
        },
        answers=[{"prompt": EVIL, "expected": "e", "before": "b", "after": "a"}],
        data=[f"3 images in {EVIL}"],
        options={
            "lr": 1e-4,
            "seed": 0,
            "model": EVIL,
            "mask": None,
            "flip": False,
            "data": ("a", "b"),
            "rank": 16,
            "steps": 3,
        },
        origins={"lr": "command line", "flip": "file run.toml", "seed": "default", "steps": "default"},
        defaults={"lr": None, "seed": 0, "rank": 16, "steps": 500},
        files=[tmp_path / "a b#1.safetensors"],
        readers={"a b#1.safetensors": "read by ComfyUI", "no kohya file": EVIL},
        uses=[Use("diffpeft", f"diffpeft generate -p {EVIL}")],
        seconds=125.0,
        per_second=0.25,
        memory=3 * 2**30,
    )
    return Page(**facts | changes)


class Tags(HTMLParser):
    """All tags with their attributes, and what is open at the end."""

    VOID = ("meta", "img", "br", "path", "polyline", "circle", "rect")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_of_everything_is_whole_escaped_and_fetches_nothing(tmp_path):
    text = render(everything(tmp_path), tmp_path)
    page = Tags(text)
    assert not page.open and text.startswith("<!doctype html>")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base"} and "url(" not in text and "@import" not in text
    sources = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset", "data")
    ]
    assert all(s.startswith("data:image/webp;base64,") or s == "a%20b%231.safetensors" for s in sources) and sources
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert EVIL in "".join(page.words) and "<script" not in text
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_a_page_says_what_there_is_and_leaves_out_what_there_is_not(tmp_path):
    text = render(everything(tmp_path), tmp_path)
    for words_ in ("step 20 of 40", "4.0 s/it", "2:05 min", "3.0 GiB", "1:20 min left", "drawn with turbo", "lower is better", "read by ComfyUI",
        "-20.0 % ± 2.0", "pure noise, at step 10", "command line", "file run.toml", "pure noise"):  # fmt: skip
        assert words_ in text, words_
    empty = render(Page("x"), tmp_path)
    assert not set(re.findall(r"<h2>(.*?)</h2>", empty)) - {"Loss"} and "No step is done yet" in empty
    assert not any(word in empty for word in ("nan", "None", "undefined", "it/s", "lower is better"))


def test_options_that_somebody_said_come_first_and_the_others_are_folded(tmp_path):
    shown, _, folded = render(everything(tmp_path), tmp_path).partition("<details>")
    names = [re.findall(r"<code>(\w+)</code></th>", part) for part in (shown, folded)]
    assert names == [["lr", "model", "flip", "data", "steps"], ["seed", "mask", "rank"]]
    assert "a, b" in shown and "not set" in folded


def test_a_page_looks_again_only_while_the_run_is_under_way(tmp_path):
    for kind in ("running", "finished", "stopped", "failed"):
        text = render(everything(tmp_path, status=Status(kind, EVIL, "diffpeft train --resume out")), tmp_path)
        assert ('http-equiv="refresh"' in text) == (kind == "running")
        assert "diffpeft train --resume out" in text and "&lt;script" in text


def test_many_steps_are_thinned_with_the_first_and_the_last(tmp_path):
    text = render(everything(tmp_path), tmp_path)
    steps = re.findall(r'<th scope="col">(\d+)</th>', text)
    assert len(steps) == COLUMNS and steps[0] == "0" and steps[-1] == "19" and f"{20 - COLUMNS} more" in text
    assert data_uri(picture((19, 0, 0))) in text


def test_pictures_are_small_and_files_are_linked(tmp_path):
    file = tmp_path / "samples" / "step 1" / "p0.png"
    file.parent.mkdir(parents=True)
    Image.fromarray(NUMBERS.integers(0, 256, (600, 900, 3), dtype=np.uint8)).save(file)
    missing = file.with_name("none.png")
    text = render(Page("x", before_after=Pictures(["a", "b"], [PictureRow("r", [file, missing])])), tmp_path)
    assert 'href="samples/step%201/p0.png"' in text and text.count("<img") == 1
    assert len(text) < 150_000 and data_uri(Image.open(file)) in text
    elsewhere = render(Page("x", files=[Path("/somewhere/else.txt")]), tmp_path)
    assert "else.txt" in elsewhere and "href" not in elsewhere


# -- curves ----------------------------------------------------------------------------------------------------------------


def points(svg, kind):
    """The points of a line of a kind [n, 2]."""
    (line,) = [e for e in ElementTree.fromstring(svg) if e.get("class") == f"line {kind}" and e.tag == "polyline"]
    return np.array([[float(n) for n in pair.split(",")] for pair in line.get("points").split()])


def inside(svg):
    """Whether all that is drawn is in the picture."""
    root = ElementTree.fromstring(svg)
    width, height = (float(n) for n in root.get("viewBox").split()[2:])
    places = [pair.split(",") for e in root if e.tag == "polyline" for pair in e.get("points").split()]
    return all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places)


@pytest.mark.parametrize("count", [1, 2, 5, 50, 5000])
def test_the_axis_of_losses_has_room_for_the_smoothed_line_and_counts_what_is_above(count):
    losses = (1.0 * np.exp(-np.arange(count) / (count / 5)) + NUMBERS.exponential(0.1, count)).tolist()
    losses[-1] += 8.0 if count > 5 else 0  # one wild step
    svg = charts.loss_chart(losses, count)
    assert inside(svg) and len(svg) < 40_000
    smooth = points(svg, "smooth")
    mean = charts.smoothed(losses)
    assert len(np.unique(smooth[:, 1])) > min(count, 50) / 2 or count == 1  # not flat at an edge
    assert np.allclose(mean[-1], np.mean(losses[-(max(count // 40, min(5, count // 8)) + 1) :]))
    above = re.search(r"(\d+) above the axis, up to ([\d.]+)", svg)
    assert (above is not None) == (count > 5)
    if above:
        assert float(above[2]) == pytest.approx(max(losses), rel=1e-3) and 1 <= int(above[1]) < 0.04 * count + 1
    if count > 50:
        assert np.ptp(smooth[:, 1]) > 60  # the wild step does not make it flat


def test_curves_of_nothing_special_are_drawn():
    for losses in ([0.0, 0.0], [3.0], [1e-9, 2e-9], [-1.0, -2.0]):
        assert inside(charts.loss_chart(losses, 100))
    assert inside(charts.rate_chart([0.0, 1e-5, 2e-5], 9))
    flat = [HeldoutLoss(0, 0.1, 0.1, 0.0, ())]
    assert inside(charts.heldout_chart(flat, 0))


def test_held_out_losses_have_error_bars_and_the_best_is_marked():
    svg = charts.heldout_chart(HELDOUT, 20, best=10)
    root = ElementTree.fromstring(svg)
    bars = [e for e in root if e.tag == "path" and e.get("class") == "line after"]
    assert len(bars) == 3 and [e.get("class") for e in root if e.tag == "circle"] == [
        "dot after",
        "dot best",
        "dot after",
    ]
    before, after = points(svg, "before"), points(svg, "after")
    assert (before[:, 1] == before[0, 1]).all() and (np.diff(after[:, 1]) > 0).all()  # down is larger
    top, foot = (float(n) for n in re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bars[0].get("d")).groups())
    assert foot - top == pytest.approx(2 * 0.004 / 0.001 / 10 * (after[1, 1] - after[0, 1]), abs=0.3)


def test_bands_say_their_change_in_percent():
    root = ElementTree.fromstring(charts.band_chart(HELDOUT[-1]))
    rects = [(e.get("class"), float(e.get("height"))) for e in root if e.tag == "rect"]
    assert [kind for kind, _ in rects] == ["better", "worse"]
    assert rects[0][1] / rects[1][1] == pytest.approx(25 / 4, rel=0.02)
    assert "0 to 0.5" in "".join(root.itertext())


@pytest.mark.parametrize("low, high", [(0, 1), (0.012, 0.0134), (-3, 40), (1e-5, 1e-4), (5, 5), (1.5720001, 1.5720009)])
def test_ticks_are_round_and_within(low, high):
    ticks = charts.ticks(low, high)
    assert 1 <= len(ticks) <= 7 and all(low - 1e-12 <= t <= high + 1e-12 for t in ticks)
    told = charts.labels(ticks)
    assert len({*told}) == len(ticks) and all(
        float(t) == pytest.approx(tick, rel=1e-3) for t, tick in zip(told, ticks, strict=True)
    )


def test_words_of_numbers():
    assert [words.duration(s) for s in (0.4, 59.6, 200, 7500)] == ["0 s", "1:00 min", "3:20 min", "2:05 h"]
    assert [words.speed(s) for s in (2.5, 0.5)] == ["2.50 it/s", "2.0 s/it"]
    assert words.change(0.5, 0.4) == "-20.0 %" and words.change(0, 1) == "" and words.change(1.0, 9.0) == "9.0 times"
    assert words.measure("shape_kept").better == "higher is better" and words.measure("a_b").words == "A b"


# -- the live page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path):
    return Live(
        tmp_path / "report.html",
        Page("x", Status("running"), total=10),
        lambda step: 1e-3,
        command="diffpeft train --resume here",
    )


def test_a_page_is_renewed_now_and_then_and_a_full_disk_between_is_no_end(shown, monkeypatch):
    shown.renew()
    before = shown.path.read_text()
    shown.step(1, 0.5)
    assert shown.path.read_text() == before
    shown.written = time.monotonic() - live.EVERY - 1
    shown.step(2, 0.4)
    assert (
        "step 2 of 10" in shown.path.read_text() and shown.page.losses == (0.5, 0.4) and shown.page.rates == (1e-3,) * 2
    )
    shown.written, shown.path = 0.0, Path("/dev/null/report.html")
    shown.step(3, 0.3)
    with pytest.raises(OSError):
        shown.renew()


def test_losses_of_steps_that_are_done_again_are_replaced(tmp_path):
    shown = Live(tmp_path / "r.html", Page("x", losses=[1.0, 2.0, 3.0]))
    shown.step(3, 9.0)
    shown.step(4, 8.0)
    assert shown.losses == [1.0, 2.0, 9.0, 8.0]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    "error", [ValueError("a < b"), Interrupted(2, "The state after step 3 is in s."), KeyboardInterrupt()]
)
def test_what_ends_a_run_is_on_its_page_with_what_goes_on(error, state, shown, tmp_path):
    if state:
        with writing(tmp_path, "x", 3):
            pass
    if isinstance(error, ValueError):
        error.add_note("It goes on with: diffpeft train --resume here")
    with pytest.raises(type(error)), shown.told():
        raise error
    text = shown.path.read_text()
    assert (
        "diffpeft train --resume here" in text.replace("It goes on with: diffpeft train --resume here", "")
    ) == state
    assert ("ValueError: a &lt; b" in text) == isinstance(error, ValueError)
    assert ("interrupted" in text) == isinstance(error, KeyboardInterrupt) and "refresh" not in text
    assert ("The state after step 3" in text) == isinstance(error, Interrupted)

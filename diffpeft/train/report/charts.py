"""Curves as SVG. Colours are classes, which the page's style sheet gives; all that is drawn are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from diffpeft.train.heldout import HeldoutLoss
from diffpeft.train.report.words import number

_WIDTH, _HEIGHT, _LOW = 720, 250, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 14, 40
_POINTS = 600  # of a line, at most
_SEEN = 0.97  # the share of the losses that an axis has room for, at least


@dataclass(frozen=True)
class Plot:
    """A frame with two axes; low and high are the values at its ends."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int = _HEIGHT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is, in units of the picture."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        foot = self.height - _BOTTOM
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), foot - up * (foot - _TOP)

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> str:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        return f'<polyline class="line {kind}" points="{path}"/>'

    def dot(self, x: float, y: float, kind: str) -> str:
        """A point."""
        cx, cy = self.at(x, y)
        return f'<circle class="dot {kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="4"/>'

    def whisker(self, x: float, y: float, error: float, kind: str) -> str:
        """An error bar of a standard error up and down."""
        (cx, top), (_, foot) = self.at(x, y + error), self.at(x, y - error)
        ends = "".join(f"M{cx - 5:.1f} {end:.1f}H{cx + 5:.1f}" for end in (top, foot))
        return f'<path class="line {kind}" d="M{cx:.1f} {top:.1f}V{foot:.1f}{ends}"/>'

    def text(self, x: float, y: float, words: str, anchor: str = "middle") -> str:
        """Words at a place of the picture, in its units."""
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{Markup.escape(words)}</text>'

    def grid(self, unit: str = "") -> str:
        """Horizontal lines with their values."""
        out = []
        places = ticks(*self.y, 5 if self.height > _LOW else 2)
        for tick, label in zip(places, labels(places), strict=True):
            x, y = self.at(self.x[0], tick)
            out.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            out.append(self.text(x - 8, y + 4, f"{label}{unit}", "end"))
        return "".join(out)

    def steps(self) -> str:
        """The numbers of steps below."""
        low, high = (round(end) for end in self.x)
        marks = sorted({low, high, *(round(t) for t in ticks(low, high) if t - low > (high - low) / 9 < high - t)})
        return "".join(self.text(self.at(mark, 0)[0], self.height - 14, str(mark)) for mark in marks)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, about `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labels(places: Sequence[float]) -> list[str]:
    """The numbers of an axis, with as many digits as tell them apart."""
    texts = ([_short(tick, digits) for tick in places] for digits in range(4, 16))
    return next((row for row in texts if len({*row}) == len(row)), [f"{tick:.15g}" for tick in places])


def _short(tick: float, digits: int) -> str:
    """A number for an axis; a very small one as 2.5e-4."""
    if not tick or abs(tick) >= 0.001:
        return f"{tick:.{digits}g}"
    exponent = math.floor(math.log10(abs(tick)) + 1e-9)
    return f"{tick / 10.0**exponent:.{digits - 1}g}e{exponent}"


def _svg(label: str, *parts: str, height: int = _HEIGHT) -> Markup:
    """A picture with a label for those who cannot see it."""
    head = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{Markup.escape(label)}">'
    return Markup(head + "".join(parts) + "</svg>")


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The mean of each step and those around it, a twentieth of all and ten where there are many [n]."""
    values = np.asarray(losses, dtype=float)
    half = max(len(values) // 40, min(5, len(values) // 8))
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)


def _thinned(values: np.ndarray) -> list[tuple[float, float]]:
    """(step, value) of a long line, the lowest and the highest of each stretch."""
    if len(values) <= _POINTS:
        return [(step + 1, value) for step, value in enumerate(values)]
    points = []
    for stretch in np.array_split(np.arange(len(values)), _POINTS // 2):
        ends = sorted({stretch[values[stretch].argmin()], stretch[values[stretch].argmax()]})
        points += [(float(step + 1), float(values[step])) for step in ends]
    return points


def loss_chart(losses: Sequence[float], total: int) -> Markup:
    """The loss of each step, pale, and smoothed.

    The axis has room for all of the smoothed line and nearly all losses; those few above it are drawn as marks at its top, and counted.
    """
    values, mean = np.asarray(losses, dtype=float), smoothed(losses)
    most, least = max(mean.max(), np.quantile(values, _SEEN)), min(mean.min(), values.min())
    room = 0.06 * (most - least) or abs(most) * 0.1 or 1.0
    low = 0.0 if least >= 0 and least < 0.4 * most else least - room
    plot = Plot((1, max(total, len(values), 2)), (low, most + room))
    above = [step + 1 for step, value in enumerate(values) if value > plot.y[1]]
    marks = "".join(_mark(plot, step) for step in above[:_POINTS])
    raw = [(step, min(value, plot.y[1])) for step, value in _thinned(values)]
    parts = [plot.grid(), plot.steps(), plot.line(raw, "raw"), marks, plot.line(_thinned(mean), "smooth")]
    if len(values) == 1:
        parts.append(plot.dot(1, values[0], "smooth"))
    if above:
        said = f"{len(above)} above the axis, up to {number(values.max())}"
        parts.append(plot.text(_WIDTH - _RIGHT, _TOP + 2, said, "end"))
    return _svg(f"Loss by step; smoothed, it went from {number(mean[0])} to {number(mean[-1])}", *parts)


def _mark(plot: Plot, step: int) -> str:
    """A small arrow at the top."""
    x, y = plot.at(step, plot.y[1])
    return f'<path class="above" d="M{x - 3:.1f} {y + 5:.1f}L{x:.1f} {y:.1f}L{x + 3:.1f} {y + 5:.1f}"/>'


def rate_chart(rates: Sequence[float], total: int) -> Markup:
    """The learning rate of each step."""
    values = np.asarray(rates, dtype=float)
    plot = Plot((1, max(total, len(values), 2)), (0.0, values.max() * 1.06 or 1.0), _LOW)
    return _svg("Learning rate by step", plot.grid(), plot.steps(), plot.line(_thinned(values), "smooth"), height=_LOW)


def heldout_chart(losses: Sequence[HeldoutLoss], total: int, best: int | None = None) -> Markup:
    """The loss on held-out pictures without and with the adapter; the bars are the standard error of their difference."""
    ends = [end for m in losses for end in (m.before, m.after - m.standard_error, m.after + m.standard_error)]
    low, high = min(ends), max(ends)
    room = 0.1 * (high - low) or abs(high) * 0.1 or 1.0
    plot = Plot((0, max(total, 1)), (low - room, high + room))
    parts = [plot.grid(), plot.steps()]
    parts += [plot.line([(m.step, getattr(m, when)) for m in losses], when) for when in ("before", "after")]
    parts += [plot.whisker(m.step, m.after, m.standard_error, "after") for m in losses]
    parts += [plot.dot(m.step, m.after, "best" if m.step == best else "after") for m in losses]
    return _svg("Loss on held-out pictures by step, without and with the adapter", *parts)


def band_chart(loss: HeldoutLoss) -> Markup:
    """How the loss on held-out pictures changed in each band of noise, in percent of the base's, with standard errors."""
    rows = [
        (b, 100 * (b.after - b.before) / b.before, 100 * b.standard_error / b.before) for b in loss.bands if b.before
    ]
    ends = [0.0, *(end for _, change, error in rows for end in (change - error, change + error))]
    room = 0.1 * (max(ends) - min(ends)) or 1.0
    plot = Plot((0, len(rows)), (min(ends) - room, max(ends) + room))
    parts = [plot.grid(" %")]
    for place, (band, change, error) in enumerate(rows):
        (left, top), (right, foot) = plot.at(place + 0.2, max(change, 0.0)), plot.at(place + 0.8, min(change, 0.0))
        kind = "better" if change < 0 else "worse"
        parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{foot - top:.1f}"/>'
        )
        parts.append(plot.whisker(place + 0.5, change, error, "error"))
        parts.append(plot.text(plot.at(place + 0.5, 0)[0], _HEIGHT - 14, f"{band.low:.2g} to {band.high:.2g}"))
    x, y = plot.at(0, 0)
    parts.append(f'<path class="zero" d="M{x:.1f} {y:.1f}H{_WIDTH - _RIGHT}"/>')
    return _svg("Change of the held-out loss by share of noise", *parts)

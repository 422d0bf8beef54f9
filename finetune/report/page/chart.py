"""Geometry of the page's loss chart."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.events import StepDone, Validated
from finetune.report.plot import WIDE, smooth

MOST_POINTS = 300  # of a curve
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 46, 34  # margins; above the curves stand the figures of the band pointed at
_TICKS = 5


@dataclass(frozen=True)
class Band:
    """A strip of the chart: pointing at it shows one step's figures."""

    x: float
    width: float
    at: float  # where the step is
    dots: tuple[tuple[float, str], ...]  # (y, class) of each curve there
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """Two curves in a box of `width` x `height`; points as SVG reads them."""

    width: int
    height: int
    each_step: str
    mean: str
    validation: str
    dots: tuple[tuple[float, float, bool], ...]  # x, y, best: of the validations
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    bands: tuple[Band, ...]
    log: bool


class Scale:
    """Numbers to places in the box."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self._log = log
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        value = math.log(value) if self._log else value
        share = (value - self._low) / (self._high - self._low) if self._high > self._low else 0.5
        return round(self._start + share * (self._end - self._start), 1)


def loss_chart(
    steps: Sequence[StepDone], validations: Sequence[Validated], width: int, height: int, bands: int
) -> Chart | None:
    """None where there is nothing to draw."""
    events: list[StepDone | Validated] = [*steps, *validations]
    losses = [event.loss for event in events if math.isfinite(event.loss)]
    if not losses:
        return None
    last = max(event.step for event in events)
    log = min(losses) > 0 and max(losses) > WIDE * min(losses)
    ticks = _log_ticks(min(losses), max(losses)) if log else _ticks(min(0.0, *losses), max(losses))
    low, high = min([*ticks, *losses] if log else ticks), max([*ticks, *losses])
    x = Scale(0, max(last, 1), LEFT, width - RIGHT)
    y = Scale(low, high, height - BOTTOM, TOP, log)
    means = dict(zip((step.step for step in steps), _means(steps), strict=True))
    few = [steps[i] for i in _spread(len(steps), MOST_POINTS)]
    best = min(validations, key=lambda event: event.loss, default=None)
    return Chart(
        width=width,
        height=height,
        each_step=_line([(x(event.step), y(event.loss)) for event in few]),
        mean=_line([(x(event.step), y(means[event.step])) for event in few]),
        validation=_line([(x(event.step), y(event.loss)) for event in validations]),
        dots=tuple((x(event.step), y(event.loss), event is best) for event in validations),
        x_ticks=tuple((x(step), f"{step:,}") for step in _whole_ticks(last, width)),
        y_ticks=tuple((y(tick), f"{tick:g}") for tick in ticks),
        bands=tuple(_bands(steps, validations, means, x, y, bands, width)),
        log=log,
    )


def _means(steps: Sequence[StepDone]) -> list[float]:
    return [float(m) for m in smooth([s.loss for s in steps], [s.tokens for s in steps])] if steps else []


def _line(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _bands(
    steps: Sequence[StepDone],
    validations: Sequence[Validated],
    means: dict[int, float],
    x: Scale,
    y: Scale,
    most: int,
    width: int,
) -> list[Band]:
    """Every validation's step and as many others as there is room for, each as wide as half the way to its next."""
    step_at, valid_at = {event.step: event for event in steps}, {event.step: event for event in validations}
    wanted = {steps[i].step for i in _spread(len(steps), most)} | {
        validations[i].step for i in _spread(len(validations), most)
    }
    numbers = sorted(wanted)
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in itertools.pairwise(numbers)), width - RIGHT]
    made = []
    for i, number in enumerate(numbers):
        step, valid = step_at.get(number), valid_at.get(number)
        event = step or valid
        assert event is not None
        dots, words = [], [f"step {number:,} \u00b7 epoch {event.epoch:.2f}"]
        figures = []
        if step:
            dots += [(y(step.loss), "each"), (y(means[number]), "mean")]
            figures.append(f"training {step.loss:.4f}, mean {means[number]:.4f}")
        if valid:
            dots.append((y(valid.loss), "valid"))
            figures.append(f"validation {valid.loss:.4f}")
        words.append(" \u00b7 ".join(figures))
        made.append(Band(edges[i], round(edges[i + 1] - edges[i], 1), x(number), tuple(dots), tuple(words)))
    return made


def _spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    start, end = max(bisect_right(every, low) - 1, 0), bisect_right(every, high)
    ticks = every[start : end + 1]
    return ticks if len(ticks) <= 2 * _TICKS else [tick for tick in ticks if f"{tick:e}".startswith("1")]


def _whole_ticks(last: int, width: int) -> list[int]:
    wanted = 4 if width < 500 else 8
    raw = max(last / wanted, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return list(range(0, last + 1, step))

"""Loss curves in the terminal, in braille characters, with axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from rich.console import ConsoleOptions, RenderResult
from rich.text import Text

from finetune.report.plot import WIDE

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of one braille character
_LEAST = 0.2  # of a share, from the lowest to the highest of an axis
Points = Sequence[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Curve:
    """One line of a chart. Its points are joined."""

    name: str
    points: Points
    style: str
    marked: bool = False  # whether each point has a mark of its own


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


class Canvas:
    """Characters with dots in them. Where two curves meet, the later one gives the colour."""

    def __init__(self, width: int, height: int, ascii_only: bool) -> None:
        self.width, self.height, self._ascii = width, height, ascii_only
        self.across, self.down = (width, height) if ascii_only else (2 * width, 4 * height)  # dots
        self._cells: dict[tuple[int, int], tuple[int, str]] = {}  # (row, column) -> dots of it, style
        self._marks: dict[tuple[int, int], tuple[str, str]] = {}  # (row, column) -> character, style

    def dot(self, x: int, y: int, style: str) -> None:
        """x: dots from the left; y: dots from the top."""
        if not (0 <= x < self.across and 0 <= y < self.down):
            return
        cell, bit = ((y, x), 1) if self._ascii else ((y // 4, x // 2), _DOTS[y % 4][x % 2])
        self._cells[cell] = (self._cells.get(cell, (0, ""))[0] | bit, style)

    def line(self, x0: int, y0: int, x1: int, y1: int, style: str) -> None:
        longest = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(longest + 1):
            self.dot(round(x0 + (x1 - x0) * i / longest), round(y0 + (y1 - y0) * i / longest), style)

    def mark(self, x: int, y: int, style: str) -> None:
        cell = (y, x) if self._ascii else (y // 4, x // 2)
        self._marks[cell] = ("o" if self._ascii else "●", style)

    def level(self, y: int, style: str, name: str = "") -> None:
        """A thin line behind all curves, with its name at its end where no curve is."""
        row = y if self._ascii else y // 4
        named = range(self.width - len(name), self.width)
        if not any((row, column) in self._cells or (row, column) in self._marks for column in named):
            self._marks |= {(row, column): (letter, style) for column, letter in zip(named, name, strict=True)}
        for column in range(self.width):
            self._marks.setdefault((row, column), ("-" if self._ascii else "╌", style))
            if (row, column) in self._cells:
                del self._marks[row, column]

    def row(self, number: int) -> Text:
        """Characters of one style at a time: a Text is slow to add to."""
        cells = [self._cell(number, column) for column in range(self.width)]
        same = ((style, "".join(char for char, _ in run)) for style, run in groupby(cells, key=lambda cell: cell[1]))
        return Text.assemble(*((text, style) for style, text in same), no_wrap=True, end="")

    def _cell(self, row: int, column: int) -> tuple[str, str]:
        """(character, style)"""
        if (row, column) in self._marks:
            return self._marks[row, column]
        if (row, column) not in self._cells:
            return " ", ""
        dots, style = self._cells[row, column]
        return "." if self._ascii else chr(0x2800 + dots), style


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a whole run, as wide and as high as there is room."""

    title: str
    curves: Sequence[Curve]
    steps: int  # at the right end
    levels: Sequence[Level] = ()
    percent: bool = False  # values are shares, and the axis goes no further than 0 to 1
    height: int | None = None  # lines; None: all that there is room for

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        height = max((self.height or options.height or 12) - 2, 1)  # a line for the title, one for the steps
        low, high, log = self._range()
        scale = (lambda value: math.log10(value)) if log else (lambda value: value)
        labels = self._labels(low, high, log, height)
        left = max(map(len, labels.values()), default=0) + 2
        width = max(options.max_width - left, 4)
        canvas = Canvas(width, height, options.ascii_only)
        span = scale(high) - scale(low)

        def across(step: float) -> int:
            return round(step / max(self.steps, 1) * (canvas.across - 1))

        def down(value: float) -> int:
            return round((scale(high) - scale(value)) / span * (canvas.down - 1)) if span else canvas.down // 2

        for curve in self.curves:
            dots = [(across(x), down(y)) for x, y in _by_column(curve.points, self.steps, canvas.across, log)]
            for (x0, y0), (x1, y1) in pairwise(dots):
                canvas.line(x0, y0, x1, y1, curve.style)
            if len(dots) == 1:
                canvas.dot(*dots[0], curve.style)
        for curve in self.curves:
            for x, y in curve.points if curve.marked else ():
                if math.isfinite(y) and (y > 0 or not log):
                    canvas.mark(across(x), down(y), curve.style)
        names: dict[int, list[str]] = {}
        for level in self.levels:
            if low <= level.value <= high:
                names.setdefault(down(level.value), []).append(level.name)
        for row, together in names.items():
            canvas.level(row, "dim", f" {', '.join(together)}")
        heading = self._heading(log, "   ")
        yield heading if heading.cell_len <= options.max_width else self._heading(log, " ")
        bar, corner, floor = ("|", "+", "-") if options.ascii_only else ("┤", "└", "─")
        for number in range(height):
            label = labels.get(number, "")
            side = bar if label else ("|" if options.ascii_only else "│")
            yield Text.assemble((f"{label:>{left - 2}} {side}", "dim"), canvas.row(number), no_wrap=True)
        first, last = "0", f"step {self.steps:,}"
        between = floor * max(width - len(last) - 2, 0)
        yield Text(f"{first:>{left - 2}} {corner}{between} {last}", "dim", no_wrap=True, overflow="crop")

    def _heading(self, log: bool, gap: str) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{self.title}{', log scale' if log else ''}", "bold")
        for curve in reversed(self.curves):  # the one that lies above the others first
            value = next((y for _, y in reversed(curve.points)), None)
            if value is not None:
                text.append(f"{gap}{curve.name} ", curve.style)
                text.append(f"{value:.1%}" if self.percent else f"{value:.4f}", f"bold {curve.style}")
        for level in self.levels:
            text.append(f"{gap}{level.name} {level.value:.1%}", "dim")
        return text

    def _range(self) -> tuple[float, float, bool]:
        """The lowest and the highest value of the axis, and whether it is logarithmic."""
        values = [y for curve in self.curves for _, y in curve.points if math.isfinite(y)]
        values += [level.value for level in self.levels]
        if not values:
            return 0.0, 1.0, False
        low, high = min(values), max(values)
        log = not self.percent and low > 0 and high > WIDE * low
        room = 0.0 if log else (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
        if self.percent:
            short = max(_LEAST - (high - low), 0.0) / 2  # a point more is not drawn as a leap
            low, high = max(low - short, 0.0), min(high + short, 1.0)
        return max(low, 0.0) if values and min(values) >= 0 else low, high, log

    def _labels(self, low: float, high: float, log: bool, height: int) -> dict[int, str]:
        """row -> the value that stands beside it"""
        count = min(max(height // 3, 2), 6)
        rows = sorted({round(i * (height - 1) / (count - 1)) for i in range(count)}) if height > 1 else [0]
        labels = {}
        for row in rows:
            down = row / max(height - 1, 1)
            value = high * (low / high) ** down if log else high + (low - high) * down
            labels[row] = f"{value:.0%}" if self.percent else f"{value:.3g}" if log else f"{value:.2f}"
        return labels


def _by_column(points: Points, steps: int, columns: int, log: bool) -> list[tuple[float, float]]:
    """The mean of the points that fall on each column of dots; what cannot be drawn is left out."""
    sums: dict[int, tuple[float, float, int]] = {}
    for x, y in points:
        if math.isfinite(y) and (y > 0 or not log):
            column = round(x / max(steps, 1) * (columns - 1))
            sum_x, sum_y, count = sums.get(column, (0.0, 0.0, 0))
            sums[column] = (sum_x + x, sum_y + y, count + 1)
    return [(sum_x / count, sum_y / count) for _, (sum_x, sum_y, count) in sorted(sums.items())]

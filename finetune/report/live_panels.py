"""Panels of the live screen: header with phases, footer with current work, sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich.console import ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from finetune.console import lines
from finetune.events import Outlook, Sample
from finetune.report.eta import (
    BASE,
    ERRORS,
    FROZEN,
    PHASES,
    RACE,
    REFERENCES,
    SUITE,
    TRAINING,
    TUNED,
    VALIDATION,
)
from finetune.report.prompts import distinct
from finetune.report.screen import Status
from finetune.text import duration, shorten

NARROW = 64  # columns below which nothing stands side by side
ANSWERS = 10  # lines of the samples
PROMPT = 2  # lines of a prompt

_SHOWN = {RACE: "rate"}
_SHORT = {FROZEN: "frozen", REFERENCES: "refs", BASE: "base", TRAINING: "train", VALIDATION: "valid.", TUNED: "tuned",
          ERRORS: "err.", SUITE: "suite"}  # fmt: skip

Overflow = Literal["crop", "ellipsis"]


def overflow(options: ConsoleOptions) -> Overflow:
    """The ellipsis of rich is a character that a terminal without Unicode cannot show."""
    return "crop" if options.ascii_only else "ellipsis"


class Header:
    """The run, its bar and its phases: what is over, what goes on, what is to come."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        pace = self._status.pace
        title = Table.grid(expand=True, padding=(0, 1))
        title.add_column(ratio=1, no_wrap=True, overflow=overflow(options))
        title.add_column(justify="right", no_wrap=True)
        name = pace.outlook.title if pace.outlook else ""
        left = "" if pace.seconds_left is None else f"ETA {duration(pace.seconds_left)}"
        passed = Text.assemble((f"{duration(pace.elapsed)} so far   ", "dim"), (left, "bold"))
        title.add_row(lines(name, style="bold"), passed)
        yield title
        yield ProgressBar(1.0, pace.share or 0.0, complete_style="green", finished_style="green")
        yield Segment.line()
        whole, short = (self._line(options.ascii_only, short) for short in (False, True))
        yield whole if whole.cell_len <= options.max_width else short

    def _line(self, ascii_only: bool, short: bool) -> Text:
        phases = Text(no_wrap=True, overflow="crop", end="\n")
        for i, (mark, style, text) in enumerate(self._phases(ascii_only, short)):
            phases.append(f"{'  ' if short and i else '   ' if i else ''}{mark} {text}", style)
        return phases

    def _phases(self, ascii_only: bool, short: bool) -> list[tuple[str, str, str]]:
        """(mark, style, text) of each."""
        pace = self._status.pace
        over, now, later = ("+", ">", "-") if ascii_only else ("✓", "●", "○")
        outlook: Outlook | None = pace.outlook
        names = {name: name for name in PHASES} | _SHOWN | (_SHORT if short else {})
        there = {TRAINING, VALIDATION, TUNED, pace.phase, *(outlook.parts if outlook else ())}
        order = [name for name in names if name in there]
        if outlook is None and pace.phase not in names:
            return [(now, "bold", pace.phase)] if pace.phase else []
        phases = []
        for name in order:
            text = names[name]
            if name == TRAINING and pace.steps:
                text += f" {pace.step}/{pace.steps}"
            elif name == VALIDATION and outlook:
                text += f" {pace.validations}/{outlook.validations}"
            mark, style = (now, "bold") if name == pace.phase else (later, "dim")
            phases.append((over, "green", text) if pace.is_over(name) else (mark, style, text))
        return phases


class Foot:
    """The last line: what happens now. Above it, where there is room, what was said last."""

    def __init__(self, status: Status, notes: Sequence[str], height: int, over: bool) -> None:
        self._status, self._notes, self._height = status, notes, height
        self._over = over

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        cut = overflow(options)
        if self._height > 1:
            yield lines(self._notes[0] if self._notes else "", style="dim", no_wrap=True, overflow=cut)
        yield lines(f"{'ended' if self._over else 'now'}: {self._now()}", style="bold", no_wrap=True, overflow=cut)

    def _now(self) -> str:
        pace = self._status.pace
        if len(self._notes) > 1:
            return self._notes[1]
        if not pace.phase:
            return "getting ready"
        if pace.working_on:
            return f"{pace.working_on}, {pace.done:,} of {pace.total:,}"
        if pace.step >= pace.steps:
            return f"all {pace.steps:,} steps are done"
        return f"after step {pace.step:,}" if self._over else f"step {pace.step + 1:,} of {pace.steps:,}"


class Answers:
    """Validation rows with the base model's answer and the present one, as many as there is room for."""

    def __init__(self, status: Status, cut: Overflow) -> None:
        self._status, self._cut = status, cut

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        now, base = self._status.samples, self._status.first_samples
        if now is None:
            return
        before = {row.prompt: row.answer for row in base.rows} if base and base is not now else {}
        width, room = options.max_width, (options.height or ANSWERS) - 1
        yield Text(f"answers after step {now.step:,}", "bold", no_wrap=True)
        for row, prompt in zip(now.rows, distinct([row.prompt for row in now.rows]), strict=True):
            shown = [*self._prompt(console, prompt, width), *self._answers(row, before.get(row.prompt), width)]
            if len(shown) > room:
                return
            room -= len(shown)
            yield from shown

    def _prompt(self, console: Any, prompt: str, width: int) -> list[Text]:
        text = lines(shorten(prompt, width if width >= 60 else PROMPT * width - 10), style="italic")
        return list(text.wrap(console, width))[:PROMPT]

    def _answers(self, row: Sample, before: str | None, width: int) -> list[Text]:
        """In one line where they fit."""
        right = row.answer.strip() == row.expected.strip()
        answers = [("expected", row.expected, ""), *([("base", before, "")] if before is not None else [])]
        answers.append(("now", row.answer, "green" if right else "red"))
        parts = [
            Text.assemble((f"{name} ", "dim"), (shorten(answer, max(width - 10, 10)) or "-", style))
            for name, answer, style in answers
        ]
        together = Text("   ").join(parts)
        shown = [together] if together.cell_len <= width else parts
        for text in shown:
            text.no_wrap, text.overflow = True, self._cut
        return shown

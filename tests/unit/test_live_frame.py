"""The frame of the live screen: what it shows at each size, the time that is left, and the curves."""

from __future__ import annotations

import io
import math
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from finetune.console import Console
from finetune.events import (
    Event,
    Outlook,
    Progress,
    RunStarted,
    Sample,
    Samples,
    StepDone,
    StoppedEarly,
    Validated,
)
from finetune.report.chart import Canvas, Chart, Curve, Level
from finetune.report.eta import Pace
from finetune.report.live_frame import Frame
from finetune.report.live_screen import LiveScreen
from finetune.report.screen import CURVE, Status
from finetune.terminal import HeldOutput

SECONDS = {
    "base model: loss": 10.0, "base model: labels": 10.0, "training": 40.0, "validation: loss": 15.0,
    "tuned model: loss": 10.0, "tuned model: labels": 10.0,
}  # fmt: skip
STEPS = 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def outlook(labels: bool = True) -> Outlook:
    chance, majority = (0.25, 0.4) if labels else (None, None)
    return Outlook(0, "a model on torch (cpu), 600 rows", STEPS, 3, SECONDS, chance, majority, 8e9)


def step(number: int, seconds: float = 2.0, loss: float | None = None) -> StepDone:
    return StepDone(number, number / 10, loss or 3.0 / number, 0.5, 1e-4, 40, 900, seconds, 1_400_000_000)


def validated(number: int, accuracy: float | None = 0.83, best: bool = True) -> Validated:
    return Validated(number, number / 10, 0.9, 2.0 - number / 100, 3.49, 0.7, accuracy, best, 5.0)


def base(clock: Clock, slower: float = 1.0) -> list[tuple[Event, float]]:
    """(event, seconds before it)"""
    told: list[tuple[Event, float]] = [(outlook(), 0.0)]
    for what in ("base model: loss", "base model: labels"):
        told += [(Progress(0, what, done, 4), 2.5 * slower) for done in (1, 2, 3, 4)]
    return [*told, (RunStarted(0, STEPS, 10, False), 0.0)]


def validation(number: int) -> list[tuple[Event, float]]:
    return [(Progress(number, "validation: loss", i, 2), 2.5) for i in (1, 2)] + [(validated(number), 0.0)]


def give(pace: Pace | Status, clock: Clock, told: list[tuple[Event, float]]) -> None:
    for event, seconds in told:
        clock.now += seconds
        pace.update(event)


# the time that is left


def test_the_whole_run_is_counted_from_the_first_moment_to_the_last() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_left is None
    pace.update(outlook())
    assert pace.seconds_left == pytest.approx(sum(SECONDS.values()))
    give(pace, clock, base(clock)[1:])
    assert pace.seconds_left == pytest.approx(75.0)  # 40 + 15 + 20
    give(pace, clock, validation(0))
    assert pace.seconds_left == pytest.approx(70.0)
    give(pace, clock, [(step(n), 2.0) for n in range(1, STEPS + 1)])
    give(pace, clock, [*validation(10), *validation(STEPS)])
    assert pace.seconds_left == pytest.approx(20.0)
    give(pace, clock, [(Progress(STEPS, "tuned model: loss", 4, 4), 10.0)])
    assert pace.seconds_left == pytest.approx(10.0)
    assert pace.share == pytest.approx(clock.now / (clock.now + 10.0))


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_what_was_measured_corrects_what_was_predicted(slower: float) -> None:
    clock = Clock()
    pace = Pace(clock)
    give(pace, clock, base(clock, slower))
    assert pace.seconds_left == pytest.approx(slower * 75.0)
    pace.update(validated(0))  # known from the base: it tells nothing of how long one takes
    give(pace, clock, [(step(n, 1.0), 1.0) for n in range(1, 4)])
    assert pace.seconds_left == pytest.approx(17 * 1.0 + 2 * 5.0 * slower + 20.0 * slower)


def test_the_longest_rows_come_first_and_do_not_count_for_all() -> None:
    clock = Clock()
    pace = Pace(clock)
    give(pace, clock, [(outlook(), 0.0), (Progress(0, "base model: loss", 5, 100), 4.0)])
    assert 10.0 < (pace.seconds_left or 0) - (sum(SECONDS.values()) - 10.0) < 15.0  # not 76


@given(st.lists(st.floats(0.0, 50.0), min_size=4, max_size=30))
@settings(max_examples=30)
def test_the_time_left_is_never_negative_and_the_share_never_more_than_all(waits: list[float]) -> None:
    clock = Clock()
    pace = Pace(clock)
    told = [*base(clock), *validation(0), *((step(n), 0.0) for n in range(1, STEPS + 1))]
    for (event, _), wait in zip(told, [*waits, *[0.0] * len(told)], strict=False):
        clock.now += wait
        pace.update(event)
        assert pace.seconds_left is None or (pace.seconds_left >= 0 and 0 <= (pace.share or 0) <= 1)


def test_a_resumed_run_has_no_base_before_it_and_only_its_own_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    give(
        pace, clock, [(outlook(), 0.0), (validated(0), 0.0), (validated(10), 0.0), (RunStarted(15, 20, 10, True), 0.0)]
    )
    assert pace.seconds_left == pytest.approx(5 * 2.0 + 5.0 + 20.0)


def test_after_an_early_stop_only_the_tuned_model_is_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    give(pace, clock, [*base(clock), *validation(0), (step(1), 2.0), (StoppedEarly(1, 0, 1.0), 0.0)])
    assert pace.seconds_left == pytest.approx(20.0)


def test_without_an_outlook_the_steps_are_counted_alone() -> None:
    clock = Clock()
    pace = Pace(clock)
    give(pace, clock, [(RunStarted(0, STEPS, 10, False), 0.0), *((step(n), 2.0) for n in range(1, 6))])
    assert pace.seconds_left == pytest.approx(30.0)


# the frame


def filled(labels: bool = True) -> Status:
    clock = Clock()
    status = Status(clock)
    texts = ("a fine film", "dull and long", "not bad")
    rows = tuple(Sample(f"<ask> {text} <end>", "good", ("bad", "good")[i % 2]) for i, text in enumerate(texts))
    give(status, clock, [(outlook(labels), 0.0), *base(clock)[1:]])
    give(status, clock, [(validated(0, 0.5 if labels else None), 0.0), (Samples(0, rows), 0.0)])
    for number in range(1, 16):
        give(status, clock, [(step(number), 2.0)])
    rows = tuple(Sample(row.prompt, row.expected, "good") for row in rows)
    give(status, clock, [(validated(10, 0.83 if labels else None), 0.0), (Samples(10, rows), 0.0)])
    return status


def drawn(status: Status, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    class File(io.StringIO):
        pass

    File.encoding = encoding  # type: ignore[assignment]
    page = Console(file=File(), width=width, height=height, color_system=None)
    page.print(Frame(status, ["a note"], height), end="")
    return page.file.getvalue().rstrip("\n").split("\n")


SIZES = [(80, 24), (200, 50), (60, 15), (40, 12), (100, 30), (120, 24), (99, 60), (30, 10), (20, 6)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("labels", [True, False])
def test_a_frame_is_as_large_as_the_window(width: int, height: int, labels: bool) -> None:
    for status in (Status(Clock()), filled(labels)):
        shown = drawn(status, width, height)
        assert len(shown) <= height
        assert max(map(cell_len, shown)) <= width
        assert shown[-1].startswith("now: ")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (100, 30), (120, 40)])
def test_what_a_large_frame_shows(width: int, height: int) -> None:
    text = "\n".join(drawn(filled(), width, height))
    for part in (
        "a model on torch (cpu), 600 rows", "so far", "ETA ", "✓ base model", "● training 15/20", "validation 2/3",
        "○ tuned model", "loss", "lr", "1.00e-04", "tokens/s", "s/step", "peak memory", "1.4 GB of 8.0 GB", "83.0%",
        "majority", "40.0%", "chance", "25.0%", "└", "step 20", "now: step 16 of 20", "a note", "a fine film",
        "answers after step 10", "expected good", "base bad", "now good", "1.9000*",
    ):  # fmt: skip
        assert part in text, part
    assert "<ask>" not in text, "what all prompts begin with says nothing"
    assert any("⠀" < char <= "⣿" for char in text)


BESIDE = {"errors: general text, base model": 6.0, "errors: general text, tuned model": 6.0, "suite: base model": 3.0}


def test_what_is_asked_beside_the_rows_is_part_of_the_time_that_is_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    told = replace(outlook(), seconds=SECONDS | BESIDE)
    give(pace, clock, [(told, 0.0), *base(clock)[1:], *validation(0)])
    assert pace.seconds_left == pytest.approx(70.0 + 15.0)
    give(pace, clock, [(StoppedEarly(1, 0, 1.0), 0.0), (Progress(STEPS, "tuned model: loss", 4, 4), 10.0)])
    assert pace.seconds_left == pytest.approx(10.0 + 15.0)
    give(
        pace, clock, [(Progress(STEPS, "errors: general text, base model", 1, 1), 9.0)]
    )  # labels were known: not asked
    assert pace.seconds_left == pytest.approx(9.0 + 3.0 * 39 / 36)  # as long as the base took; slower than predicted
    give(pace, clock, [(Progress(STEPS, "suite: base model", 2, 2), 4.0)])
    assert pace.seconds_left == 0.0


@pytest.mark.parametrize("what", ["frozen blocks", "references: loss", "head: states", "race of learning rates"])
def test_what_is_done_before_training_is_part_of_the_time_that_is_left(what: str) -> None:
    clock = Clock()
    pace = Pace(clock)
    give(pace, clock, [(replace(outlook(), seconds={what: 8.0} | SECONDS), 0.0)])
    assert pace.seconds_left == pytest.approx(8.0 + sum(SECONDS.values()))
    give(pace, clock, [(Progress(0, what, 1, 2), 4.0)])
    assert pace.phase == what.partition(":")[0]
    give(pace, clock, [(Progress(0, what, 2, 2), 4.0)])
    left = sum(SECONDS.values()) if what != "race of learning rates" else 75.0  # the base was measured before it
    assert pace.seconds_left == pytest.approx(left)
    give(pace, clock, [(RunStarted(0, STEPS, 10, False), 0.0)])
    assert pace.seconds_left == pytest.approx(75.0)
    status = Status(clock)
    status.pace = pace
    assert ("○ rate" in "".join(drawn(status, 200, 24))) is False and "✓" in "".join(drawn(status, 200, 24))


@pytest.mark.parametrize(
    ("width", "shown"), [(120, "○ tuned model   ○ errors   ○ suite"), (80, "○ tuned  ○ err.  ○ suite")]
)
def test_every_phase_has_room_in_the_head(width: int, shown: str) -> None:
    status = filled()
    status.pace.outlook = replace(outlook(), seconds=SECONDS | BESIDE)
    assert shown in "\n".join(drawn(status, width, 24))
    assert "errors" not in "\n".join(drawn(filled(), width, 24)), "only what lies ahead"


def test_before_the_first_figures_the_page_tells_what_is_predicted() -> None:
    status = Status(Clock())
    status.update(outlook())
    text = "\n".join(drawn(status, 80, 24))
    for line in (r"base model +20 s", r"training +40 s", r"validation +15 s", r"tuned model +20 s"):
        assert re.search(rf"^{line}", text, re.MULTILINE), line


def test_a_low_window_has_what_matters_most() -> None:
    text = "\n".join(drawn(filled(), 60, 15))
    for part in ("ETA ", "train 15/20", "loss 0.2000", "tokens/s", "└", "now: step 16 of 20"):
        assert part in text
    assert "perpl." not in text and "a note" not in text


def test_chance_and_majority_are_lines_where_there_are_labels() -> None:
    assert any(line.count("╌") > 40 for line in drawn(filled(), 200, 50))
    assert "╌" not in "".join(drawn(filled(labels=False), 200, 50))
    assert "chance" not in "".join(drawn(filled(labels=False), 80, 24))


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24), (64, 24), (60, 15), (30, 12), (200, 50)])
def test_a_terminal_without_unicode_gets_none(width: int, height: int) -> None:
    text = "\n".join(drawn(filled(), width, height, encoding="ascii"))
    assert text.isascii() and (("o" in text and "+--" in text) or height < 24)


def test_levels_are_named_where_no_curve_is() -> None:
    def last(points: list[tuple[float, float]]) -> list[str]:
        levels = [Level("chance", 0.25), Level("majority", 0.75)]
        shown = chart([Curve("validation", points, "")], 20, levels=levels, percent=True)
        return [line.split()[-1] for line in shown if "╌" in line]

    assert last([(0, 0.5), (10, 0.5)]) == ["majority", "chance"]
    (first, second) = last([(50, 0.25), (100, 0.25)])
    assert first == "majority" and "chance" not in second, "the curve lies there"


def test_the_parts_of_a_narrow_window_do_not_touch() -> None:
    shown = drawn(filled(), 80, 24)
    heading = next(line for line in shown if line.startswith("loss"))
    assert re.search(r"validation 1\.9000 {2,}loss +0\.2000$", heading)


def test_after_the_last_step_no_step_is_reported() -> None:
    status = filled()
    status.update(step(STEPS))
    assert drawn(status, 80, 24)[-1].strip() == "now: all 20 steps are done"


def test_a_million_steps_are_kept_as_a_curve_of_few_points() -> None:
    status = Status(Clock())
    for number in range(1, 50_001):
        status.update(step(number, loss=1.0 + number / 50_000))
    assert len(status.losses) < CURVE
    assert status.losses[-1][0] > 49_000 and status.losses[-1][1] == pytest.approx(2.0, abs=0.01)
    assert all(abs(y - 1 - x / 50_000) < 0.001 for x, y in status.losses)


# the chart


def chart(curves: list[Curve], height: int = 10, **options: object) -> list[str]:
    page = Console(file=io.StringIO(), width=50, color_system=None)
    page.print(Chart("loss", curves, 100, height=height, **options))  # type: ignore[arg-type]
    return page.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("height", [3, 5, 10, 30])
def test_a_falling_curve_falls(height: int) -> None:
    shown = chart([Curve("training", [(x, 10 - x / 10) for x in range(101)], "")], height)
    assert len(shown) == height
    rows = [[i for i, char in enumerate(line) if "⠀" < char <= "⣿"] for line in shown[1:-1]]
    firsts = [row[0] for row in rows if row]
    assert firsts == sorted(firsts) and len(firsts) >= 0.9 * (height - 2)


def test_the_scale_is_logarithmic_where_the_loss_falls_far() -> None:
    far, near = ([(0, high), (50, 1.0), (100, 0.5)] for high in (50.0, 5.0))
    assert "log scale" in chart([Curve("training", far, "")])[0]
    assert "log scale" not in chart([Curve("training", near, "")])[0]
    assert chart([Curve("training", far, "")])[1].split()[0] == "50"


@pytest.mark.parametrize(
    "points", [[], [(0, math.nan)], [(5, math.inf), (6, 1.0)], [(0, 0.0)], [(0, 1.0), (1, 1.0)], [(0, -1.0), (9, 4.0)]]
)
def test_odd_values_are_drawn_or_left_out(points: list[tuple[float, float]]) -> None:
    assert len(chart([Curve("training", points, "", marked=True)])) == 10


def test_a_level_lies_behind_the_curves() -> None:
    curve = Curve("validation", [(0, 0.2), (100, 0.8)], "", marked=True)
    shown = chart([curve], levels=[Level("chance", 0.5)], percent=True)
    assert "chance 50.0%" in shown[0] and "validation 80.0%" in shown[0]
    (line,) = [line for line in shown if "╌" in line]
    assert any("⠀" < char <= "⣿" for char in line)


@given(st.integers(-5, 60), st.integers(-5, 60))
def test_no_dot_lies_outside(x: int, y: int) -> None:
    canvas = Canvas(10, 5, False)
    canvas.dot(x, y, "")
    rows = [canvas.row(i).plain for i in range(5)]
    assert all(len(row) == 10 for row in rows)
    assert (sum(row.count(" ") for row in rows) == 49) == (0 <= x < 20 and 0 <= y < 20)


# the terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_printed_meanwhile_is_written_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    page = Console(file=Terminal(), width=80, height=24, force_terminal=True)
    with LiveScreen(page) as screen:
        screen.show(outlook())
        print("to a pipe")
        print("a library's warning", file=sys.stderr)
        assert (out.getvalue(), err.getvalue()) == ("to a pipe\n", "")
    assert err.getvalue() == "a library's warning\n"
    assert sys.stderr is err


def test_the_last_line_of_what_waits_is_reported() -> None:
    held = HeldOutput()
    assert held.last_line() == []


@pytest.mark.parametrize("fails", [True, False])
def test_the_signal_is_told_by_the_page_while_it_is_there(fails: bool) -> None:
    class Stop:
        quiet, stopping = False, False

    stop, page = Stop(), Console(file=Terminal(), width=80, height=24, force_terminal=True)
    try:
        with LiveScreen(page, stop) as screen:
            assert stop.quiet
            stop.stopping = True
            screen.show(validated(1))
            assert "stopping after this step; press Ctrl-C again to stop at once" in page.file.getvalue()
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass
    assert not stop.quiet

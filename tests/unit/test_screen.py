import io
import json
import os
import re
import select
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from finetune.console import Console
from finetune.disk.metrics import MetricsFile, read
from finetune.errors import Incompatible
from finetune.events import (
    CheckpointDue,
    CheckpointSaved,
    Event,
    Finished,
    MemorySplit,
    Note,
    Progress,
    RunStarted,
    StepDone,
    StoppedEarly,
    Validated,
)
from finetune.report import tables
from finetune.report.live_screen import LiveScreen, open_screen
from finetune.report.screen import PlainScreen, Status
from finetune.text import amount, duration, shorten

WIDTHS = [40, 80, 200]


def step(number: int, seconds: float = 0.5) -> StepDone:
    return StepDone(number, number / 10, 2.0 / number, 0.5, 1e-4, 40, 900, seconds, 1_400_000_000)


def validated(number: int, best: bool, accuracy: float | None = 0.83) -> Validated:
    train = None if number == 0 else 0.9
    return Validated(number, number / 10, train, 1.25 - number / 1000, 3.49, 0.7, accuracy, best, 0.2)


def run(steps: int = 40) -> list[Event]:
    events: list[Event] = [Progress(0, "base model: [labels]", 200, 200), RunStarted(0, steps, 10, False)]
    events.append(validated(0, best=True))
    for number in range(1, steps + 1):
        events.append(step(number))
        if number % 10 == 0:
            events += [validated(number, best=number <= 20), CheckpointSaved(number, f"runs/x/step-{number:08d}")]
    events += [MemorySplit(steps, 512), StoppedEarly(steps, 20, 1.23), Finished(steps, 20, 1.23)]
    return [*events, CheckpointDue(steps), Note(0, "a message [x]")]


def recorded(events: list[Event]) -> list[Event]:
    """Those that metrics.jsonl holds."""
    return [event for event in events if not isinstance(event, Progress | Note | CheckpointDue)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def console(width: int = 80, terminal: bool = False, **options) -> Console:
    return Console(file=io.StringIO(), width=width, height=24, force_terminal=terminal, **options)


def said(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


# plain


def test_a_pipe_gets_plain_lines():
    page = console(width=40)
    with open_screen(page) as screen:
        assert isinstance(screen, PlainScreen)
        for event in run():
            screen.show(event)
    lines = said(page)
    assert "\x1b" not in "".join(lines)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in lines)
    text = "\n".join(lines)
    assert text.count("validation after step") == 5
    assert text.count("checkpoint of step") == 4
    assert "best so far" in text
    assert "at most 512 tokens" in text
    assert "base model" not in text  # it took less than ten seconds
    assert lines[-1].endswith("a message [x]")


def steps_said(page: Console) -> list[int]:
    return [int(found[1]) for line in said(page) if (found := re.search(r"  step (\d+)/", line))]


def test_a_step_line_every_ten_seconds_or_twentieth():
    page, clock = console(), Clock()
    screen = PlainScreen(page, clock)
    screen.show(RunStarted(0, 1000, 100, False))
    for number in range(1, 1001):
        clock.now += 0.001
        screen.show(step(number))
    assert steps_said(page) == [1, *range(51, 1000, 50), 1000]

    page, clock = console(), Clock()
    screen = PlainScreen(page, clock)
    screen.show(RunStarted(500, 100_000, 100, True))
    assert "resumed after step 500" in said(page)[0]
    for number in range(501, 601):
        clock.now += 1
        screen.show(step(number))
    assert steps_said(page) == list(range(501, 601, 10))


def test_long_evaluations_speak_now_and_then():
    page, clock = console(), Clock()
    screen = PlainScreen(page, clock)
    for done in range(101):
        clock.now += 1
        screen.show(Progress(0, "tuned model: labels", done, 100))
    assert [line.split()[-1] for line in said(page)] == [*(f"{done}/100" for done in range(9, 100, 10))]


def test_many_short_works_are_not_silent():
    """As the trials of a search: each is over in less than the pause."""
    page, clock = console(), Clock()
    screen = PlainScreen(page, clock)
    for trial in range(1, 13):
        for done in range(1, 6):
            clock.now += 1
            screen.show(Progress(0, f"trial {trial}: training", done, 5))
    assert [line.split("  ", 1)[1] for line in said(page)] == [f"trial {n}: training 5/5" for n in range(2, 13, 2)]


def test_figures_of_a_step_line():
    page, clock = console(), Clock()
    screen = PlainScreen(page, clock)
    screen.show(RunStarted(10, 20, 10, True))
    clock.now += 3
    screen.show(step(11))
    assert said(page)[1].split("  ", 1)[1] == (
        "step 11/20  epoch 1.10  loss 0.1818  lr 1.00e-04  grad norm 0.5  1,800 tokens/s  memory 1.4 GB  ETA 4 s"
    )


def test_no_label_accuracy_where_there_are_no_labels():
    page = console()
    PlainScreen(page).show(validated(10, best=False, accuracy=None))
    assert "  accuracy" not in said(page)[0]
    assert "best" not in said(page)[0]


# live


def played(page: Console, events: list[Event], fail: bool = False) -> str:
    screen = open_screen(page)
    assert isinstance(screen, LiveScreen)
    try:
        with screen:
            for event in events:
                screen.show(event)
            if fail:
                raise InterruptedError
    except InterruptedError:
        pass
    return page.file.getvalue()


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_live_screen_fits(width):
    shown = played(console(width, terminal=True), run(400), fail=True)
    inside, left = shown.split("\x1b[?1049l")  # the page of its own, and what is printed when it is gone
    frames = [plain(frame).rstrip("\n").split("\n") for frame in inside.split("\x1b[H")[1:]]
    assert len(frames) > 10
    assert max(cell_len(line) for frame in frames for line in frame) <= width
    assert {len(frame) for frame in frames} <= {1, 24}, "a frame fills the window, and no more"
    last = plain(left)
    assert len(last.splitlines()) == 16
    assert max(cell_len(line) for line in last.splitlines()) <= width
    for part in ("400/400", "ETA", "lr", "1.00e-04", "loss", "ended: ", "└"):
        assert part in last


def test_the_page_is_left_empty_and_nothing_of_it_stays_but_after_a_failure():
    shown = played(console(terminal=True), run())
    inside, left = shown.split("\x1b[?1049l")
    assert inside.startswith("\x1b[?1049h") or "\x1b[?1049h" in inside[:40]
    assert plain(left) == ""
    assert not plain(inside[inside.rindex("\x1b[H") :]).strip(), "for a terminal that has one page only"
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :]
    assert "400/400" not in plain(left)


def test_no_colour(monkeypatch):
    def colours(shown):
        return {code for codes in re.findall(r"\x1b\[([0-9;]*)m", shown) for code in codes.split(";")} - {
            "0",
            "1",
            "2",
            "3",
        }

    page = {"terminal": True, "color_system": "truecolor"}
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colours(played(console(**page), run()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours(played(console(**page), run()))


def test_a_terminal_without_blocks():
    class Ascii(io.StringIO):
        encoding = "ascii"

    page = Console(file=Ascii(), width=80, height=24, force_terminal=True)
    with open_screen(page) as screen:
        for event in [*run(), Note(40, "a note that is wider than the terminal " * 3)]:
            screen.show(event)
    assert page.file.getvalue().isascii()


CHILD = """
import sys
from tests.unit.test_screen import run
from finetune.report.live_screen import open_screen
with open_screen() as screen:
    for event in run():
        screen.show(event)
    print("to standard output")
    if sys.argv[1:]:
        raise SystemExit(3)
"""


def child(*arguments: str, extra: dict[str, str] | None = None, **options) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": "utf-8"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.Popen(command, cwd=root, env={**environment, **(extra or {})}, **options)


def test_standard_error_only():
    process = child(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.split() == b"to standard output".split()
    assert b"step 40/40" in err
    assert b"\x1b" not in err


def test_a_log_that_wants_colours_gets_lines_all_the_same():
    """FORCE_COLOR, as services that build software set it: colours, and no page that is drawn over and over."""
    process = child(extra={"FORCE_COLOR": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"step 40/40" in err
    assert set(re.findall(rb"\x1b\[[0-9;?]*([A-Za-z])", err)) <= {b"m"}


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are a POSIX thing")
def test_a_pseudo_terminal():
    import pty

    ours, theirs = pty.openpty()
    process = child("fail", stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], 60)[0]:
            data = os.read(ours, 65536)
            if not data:
                break
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 3
    text = shown.decode()
    assert "40/40" in text
    assert "\x1b[?25h" in text[text.rindex("\x1b[?25l") :]  # the cursor is back
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1
    assert "Traceback" not in text


# status


def test_speed_leaves_old_steps_behind():
    status = Status()
    status.update(step(1, seconds=1000.0))
    for number in range(2, 22):
        status.update(step(number, seconds=0.5))
    assert status.tokens_per_second == pytest.approx(1800)


def test_words():
    times = {
        None: "?",
        0: "under 1 s",
        59.6: "60 s",
        99.6: "2 min",
        3723: "62 min",
        7199: "2 h 00 min",
        1e5: "27 h 47 min",
    }
    assert {seconds: duration(seconds) for seconds in times} == times
    assert [amount(value) for value in (12, 45_600, 7e6, 1.45e11)] == ["12 B", "45.6 kB", "7 MB", "145.0 GB"]


# metrics


def test_metrics_come_back_exactly(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for number, event in enumerate(recorded(run()), start=1):
            metrics.record(event)
            assert len(path.read_text().splitlines()) == number  # flushed
    assert read(path) == recorded(run())
    assert json.loads(path.read_text().splitlines()[0]) == {
        "event": "RunStarted", "step": 0, "steps": 40, "steps_per_epoch": 10, "resumed": False,
    }  # fmt: skip


def test_events_that_only_pass_leave_no_line(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(MetricsFile, "sync", lambda metrics: synced.append(path.read_text()))
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for event in (Progress(0, "x", 1, 2), Note(0, "x"), step(1), CheckpointDue(1), Progress(1, "x", 2, 2)):
            metrics.record(event)
    assert read(path) == [step(1)]
    assert synced == [path.read_text()], "a checkpoint is due: the lines before it should be on the disk"


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_floats_survive(tmp_path_factory, losses):
    path = tmp_path_factory.mktemp("floats") / "metrics.jsonl"
    events = [replace(step(1), loss=loss) for loss in losses]
    with MetricsFile(path) as metrics:
        for event in events:
            metrics.record(event)
    assert [event.loss.hex() for event in read(path)] == [loss.hex() for loss in losses]


def test_a_resumed_run_cuts_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for event in run():
            metrics.record(event)
    with path.open("a") as file:
        file.write('{"event": "StepDo')  # killed in the middle of a line
    assert read(path) == recorded(run())
    with MetricsFile(path) as metrics:
        metrics.truncate_after(10)
        metrics.record(step(11))
    assert read(path) == [*(event for event in recorded(run()) if event.step <= 10), step(11)]


def test_half_a_line_is_gone_before_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "Progress", "ste')
    with MetricsFile(path) as metrics:
        metrics.record(step(1))
    assert read(path) == [step(1)]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"event": "Unheard", "step": 1}', '{"event": "Finished", "step": 1}']
)
def test_a_strange_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "MemorySplit", "step": 1, "micro_tokens": 5}}\n{line}\n')
    with pytest.raises(Incompatible, match=r"metrics.jsonl:2: "):
        read(path)


# tables


@dataclass
class Answer:
    location: str
    prompt: str
    expected: str | None
    predicted: str | None


def drawn(table, width: int = 80) -> str:
    page = console(width)
    page.print(table)
    assert max(cell_len(line) for line in said(page)) <= width
    return page.file.getvalue()


SUMMARY = {"labels": ("n", "p"), "accuracy": 0.512, "interval": (0.44, 0.58), "macro_f1": 0.5, "loss": 0.9,
           "perplexity": 2.46, "token_accuracy": 0.6}  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_comparison(width):
    tuned = {**SUMMARY, "accuracy": 0.843, "interval": (0.78, 0.89), "loss": 0.4, "macro_f1": None}
    text = drawn(tables.comparison_table(SUMMARY, tuned, title="on 200 [test] rows"), width)
    for part in (
        "200 [test] rows",
        "51.2%",
        "84.3%",
        "44.0-58.0",
        "78.0-89.0",
        "perplexity",
        "+33.1 pt",
        "0.9000",
        "0.4000",
        "-0.5",
    ):
        assert part in text
    alone = drawn(tables.comparison_table({}, {**tuned, "labels": ()}), width)
    assert "change" not in alone
    assert "exact match" in alone
    assert "macro" not in alone
    assert "51.2%" not in alone


def test_a_comparison_without_right_and_wrong():
    text = drawn(tables.comparison_table({"loss": 2.0}, {"loss": 2.5, "accuracy": None, "interval": None}))
    assert "+0.5" in text
    assert "accuracy" not in text
    assert "interval" not in text


def test_better_is_green_whichever_way_it_points():
    table = tables.comparison_table(
        SUMMARY, {**SUMMARY, "accuracy": 0.6, "loss": 0.8, "macro_f1": 0.4, "perplexity": 3.0}
    )
    changes = dict(zip(table.columns[0].cells, table.columns[3].cells, strict=True))
    styles = {name: change.style for name, change in changes.items() if change}
    assert styles == {
        "accuracy": "green",
        "macro F1": "red",
        "loss, nats/token": "green",
        "perplexity": "red",
        "token accuracy": "",
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_epochs(width):
    rows = [validated(number, best=number <= 30) for number in range(0, 100, 10)]
    lines = drawn(tables.epoch_table(rows), width).splitlines()
    assert [line.split()[0] for line in lines[3:-1]] == [f"{number}.00" for number in range(10)]
    assert [line for line in lines[3:-1] if "*" in line] == [lines[6]]
    assert "label" in lines[0]
    assert "83.0%" in lines[5]
    without = drawn(tables.epoch_table([validated(1, best=True, accuracy=None)]), width)
    assert "label" not in without


def test_confusion():
    text = drawn(tables.confusion_table([[90, 10], [12, 88]], ["[red]bad", "good"]))
    assert re.search(r"1 \[red\]bad +90 +10\n2 good +12 +88", text)
    names = [f"label {i}" for i in range(20)]
    matrix = [[50 if i == j else 0 for j in range(20)] for i in range(20)]
    matrix[3][7], matrix[4][0] = 50, 1
    assert [line.split() for line in drawn(tables.confusion_table(matrix, names)).splitlines()[2:4]] == [
        ["label", "3", "label", "7", "50", "50%"],
        ["label", "4", "label", "0", "1", "2%"],
    ]


@pytest.mark.parametrize(
    "shown, confusions, said",
    [
        (10, 1500, "the 10 most frequent of 1,500 confusions"),
        (3, 3, "all 3 confusions"),
        (1, 1, "the only confusion"),
        (0, 0, "no confusions"),
    ],
)
def test_it_is_said_which_confusions_are_shown(shown: int, confusions: int, said: str) -> None:
    assert tables.which_confusions(shown, confusions) == said


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_any_length(width):
    names = ["x" * 300, "[/]", "a\nb\x1b[31m", *(f"label {i}" for i in range(9))]
    classes = [{"label": name, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 1000} for name in names]
    text = drawn(tables.per_class_table(classes), width)
    assert text.count("0.333") == 12
    assert "\x1b" not in text
    grid = drawn(tables.confusion_table([[90 + (i == j) for i in range(12)] for j in range(12)], names), width)
    assert grid.count("91") == 12
    assert "\x1b" not in grid


@pytest.mark.parametrize("width", WIDTHS)
def test_changed_rows(width):
    def pair(i: int, text: str, expected: str, base: str, tuned: str) -> tables.Pair:
        prompt = f"### Instruction:\nGood or bad?\n\n### Input:\n{text}\n\n### Response:\n"
        return Answer(f"test.jsonl:{i}", prompt, expected, base), Answer(f"test.jsonl:{i}", prompt, expected, tuned)

    fixed = [pair(i, f"{i} fine [film] " + "word " * 200, "good", "bad", "good") for i in range(7)]
    broken = [pair(9, "dull\x1b[31m", "bad", "bad", "good")]
    text = drawn(tables.changed_rows_table(fixed, broken), width)
    assert text.count("fixed  ") == 5
    assert "test.jsonl:9" in text
    assert "0 fine [film]" in text
    assert "Instruction" not in text
    assert "\x1b" not in text
    assert "7 fixed, 1 broken; 2 of them not shown" in " ".join(text.split())
    assert "Instruction" in drawn(tables.changed_rows_table([], broken), width)


@given(st.text(max_size=40), st.integers(12, 30))
def test_shortened_text_is_short(text, length):
    assert len(shorten(text, length)) <= length


def test_shortened_text_keeps_both_ends():
    assert shorten("abcdefghijklmnopqrstuvwxyz", 16) == "abcdef ... vwxyz"
    assert shorten(" a\n b ", 16) == "a b"

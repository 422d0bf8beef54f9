"""Draw a real `finetune demo` for the README: its end, and its live screen after two thirds of the steps.

    python tests/assets/make_demo_svg.py [--recorded FILE] [--out FILE]

It runs the demo offline in a temporary folder (3 minutes on two cores), reads its standard output with the colours
and its events with their times, and lets rich draw them. FILE: draw what was recorded before, or keep it there (its
events in FILE.events). The pictures name only fonts that a computer has; they load nothing from elsewhere. loss.png of
the run and live.svg stand beside demo.svg.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.text import Text

from finetune.console import Console
from finetune.events import Event, StepDone
from finetune.report.live_frame import Frame
from finetune.report.screen import Status, sentence

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT = 100, 30  # columns, and lines of the live screen
SHOWN = 2 / 3  # of the steps are done in its picture
# A command of finetune that writes its events and their times to a file.
RECORDER = """
import pickle, sys, time
from finetune.cli import main
from finetune.report.screen import PlainScreen
file, show = open(sys.argv.pop(1), "wb"), PlainScreen.show
def recorded(screen, event):
    pickle.dump((time.monotonic(), event), file)
    file.flush()
    show(screen, event)
PlainScreen.show = recorded
main()
"""
TimedEvents = Sequence[tuple[float, Event]]  # (seconds, event)
LEFT_OUT = Text("... each label, the confusion matrix, more rows ...", style="dim italic")
FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
    <title>{title}</title>
    <style>
    .{unique_id}-matrix {{
        font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
        font-size: {char_height}px;
        line-height: {line_height}px;
        font-variant-east-asian: full-width;
    }}
    .{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
    {styles}
    </style>
    <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
    </defs>
    {chrome}
    <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
    </g>
</svg>
"""


def recorded_demo(loss_picture: Path, events: Path) -> str:
    """The standard output of a run of the demo, with escape codes; keeps its events and the picture of its losses."""
    colours = {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "COLORTERM": "truecolor"}
    colours["TERM"] = "xterm-256color"
    surroundings = os.environ | colours | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])}
    surroundings.pop("NO_COLOR", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RECORDER, str(events.resolve()), "demo"]
        demo = subprocess.run(command, cwd=folder, env=surroundings, stdout=subprocess.PIPE, text=True, check=True)
        shutil.copyfile(next(Path(folder).glob("runs/*/loss.png")), loss_picture)
    return demo.stdout


def last_screen(output: str) -> Iterator[Text]:
    """The lines to draw: the curves and the comparison, one row fixed and one broken, and the verdict."""
    lines = [Text.from_ansi(line) for line in output.splitlines()]
    labels = next(i for i, line in enumerate(lines) if re.match(r"label +precision", line.plain))
    total = next(i for i, line in enumerate(lines) if re.match(r"\d+ fixed, \d+ broken", line.plain))
    yield Text.assemble(("$ ", "bold green"), ("finetune demo", "bold"))
    yield from lines[:labels]
    yield LEFT_OUT
    for kind in ("fixed ", "broken"):
        first = next(i for i in range(labels, total) if lines[i].plain.startswith(kind))
        yield lines[first]
        for line in lines[first + 1 : total]:
            if not line.plain.startswith(" "):
                break
            yield line
    yield from lines[total:]


def picture(output: str) -> str:
    """The end of the demo."""
    console = recording()
    for line in last_screen(output):
        line.rstrip()
        console.print(line, highlight=False)
    return drawn(console, "demo", "The end of finetune demo: both models on the same 200 rows")


def live_picture(timed: TimedEvents) -> str:
    """The live screen where SHOWN of the steps are done."""
    now = [timed[0][0]]
    status, notes = Status(clock=lambda: now[0]), [""]
    for now[0], event in timed:
        status.update(event)
        notes = [text] if (text := sentence(event)) else notes
        if isinstance(event, StepDone) and event.step >= SHOWN * status.steps:
            break
    console = recording()
    console.print(Frame(status, notes, HEIGHT), end="")
    return drawn(console, "live", "The screen of finetune demo while it trains")


def recording() -> Console:
    colours: Any = {"force_terminal": True, "color_system": "truecolor", "legacy_windows": False}
    return Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), **colours)


def drawn(console: Console, name: str, title: str) -> str:
    code_format = FORMAT.replace("{title}", title)
    shown = console.export_svg(title="finetune demo", code_format=code_format, unique_id=name)
    return "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"


def read_events(file: Path) -> TimedEvents:
    """A file that RECORDER wrote."""
    timed = []
    with file.open("rb") as opened, suppress(EOFError):
        while True:
            timed.append(pickle.load(opened))
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recorded", type=Path, help="an output recorded before, or where to keep the new one")
    parser.add_argument("--out", type=Path, default=HERE / "demo.svg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recorded = options.recorded or Path(folder, "demo.txt")
        events = recorded.with_name(f"{recorded.name}.events")
        if not recorded.exists():
            recorded.write_text(recorded_demo(options.out.with_name("loss.png"), events), encoding="utf-8")
        pictures = {options.out: picture(recorded.read_text(encoding="utf-8"))}
        if events.exists():
            pictures[options.out.with_name("live.svg")] = live_picture(read_events(events))
    for file, svg in pictures.items():
        file.write_text(svg, encoding="utf-8")
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

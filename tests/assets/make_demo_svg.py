"""Draw the end of a real `finetune demo` as an SVG for the README.

    python tests/assets/make_demo_svg.py [--recorded FILE] [--out FILE]

It runs the demo offline in a temporary folder (3 minutes on two cores), reads its standard output with the colours,
and lets rich draw it. FILE: draw an output that was recorded before, or keep the new one there. The picture
names only fonts that a computer has; it loads nothing from elsewhere. loss.png of the run is copied beside it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from finetune.console import Console

HERE = Path(__file__).resolve().parent
WIDTH = 100  # columns
LEFT_OUT = Text("... each label, the confusion matrix, more rows ...", style="dim italic")
FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
    <title>The end of finetune demo: both models on the same 200 rows</title>
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


def recorded_demo(loss_picture: Path) -> str:
    """The standard output of a run of the demo, with escape codes; keeps the picture of its losses."""
    colours = {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    surroundings = os.environ | colours | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])}
    surroundings.pop("NO_COLOR", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "finetune", "demo"]
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
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    for line in last_screen(output):
        line.rstrip()
        console.print(line, highlight=False)
    drawn = console.export_svg(title="finetune demo", code_format=FORMAT, unique_id="demo")
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recorded", type=Path, help="an output recorded before, or where to keep the new one")
    parser.add_argument("--out", type=Path, default=HERE / "demo.svg")
    options = parser.parse_args()
    if options.recorded and options.recorded.exists():
        output = options.recorded.read_text(encoding="utf-8")
    else:
        output = recorded_demo(options.out.with_name("loss.png"))
        if options.recorded:
            options.recorded.write_text(output, encoding="utf-8")
    options.out.write_text(picture(output), encoding="utf-8")
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

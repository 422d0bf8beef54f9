"""A finished run in every form of `finetune export`, each with its size, its seconds and what its verification found.

    python tests/real/exports.py RUN [--rows 100] [--forms gguf-f16,gguf-q8_0,gguf-q4_k_m,gguf-adapter,mlx-4bit]

The base and the run's model are measured once for all of them. A form that fails stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from finetune.commands.export import check_options, made_ready, precision, ready, run_measured, target_of, verified
from finetune.console import Console
from finetune.disk.run_folder import open_existing
from finetune.export.measure import chosen
from finetune.export.prompt import Prompts
from finetune.export.verify import sentence

FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "gguf-adapter", "mlx-4bit")
SHOWN = (
    "change of the weights", "log-probabilities", "most probable tokens", "tuning that is kept", "accuracy",
    "exact match", "answers",
)  # fmt: skip


def options(form: str) -> tuple[str, str | None, int | None, bool]:
    to, _, kind = form.partition("-")
    bits = int(kind.removesuffix("bit")) if kind.endswith("bit") else None
    return to, None if bits or kind == "adapter" else kind or None, bits, kind == "adapter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--forms", default=",".join(FORMS))
    asked = parser.parse_args()
    opened, recipe = open_existing(asked.run)
    job = ready(opened, recipe, None)
    prompts = Prompts(job.prepared, opened.always() or {})
    template, _ = prompts.template(job.tokenizer, opened.path.name)
    making = made_ready(opened, job, prompts, template)
    rows = chosen(job.prepared.held_out, asked.rows)
    started = time.monotonic()
    measures = run_measured(making, rows)
    print(f"base and run measured on {len(rows.examples)} rows: {time.monotonic() - started:.0f} s", file=sys.stderr)
    table = Table("form", "MB", "written, s", "verified, s", *SHOWN, "verdict")
    for form in asked.forms.split(","):
        check_options(recipe, *options(form))
        target = target_of(*options(form), job, template)
        with tempfile.TemporaryDirectory() as place:
            started = time.monotonic()
            checks = target.write(Path(place), making)
            written = time.monotonic()
            files = [file for file in Path(place).rglob("*") if file.is_file() and file.name != "base.gguf"]
            size = sum(file.stat().st_size for file in files) / 1e6
            nearest = precision(target, job, making.session)
            checks += verified(target, Path(place), job, prompts, measures, rows, nearest)
            ended = time.monotonic()
        found = {check.name: check.result for check in checks}
        told = [found.get(name, "-") for name in SHOWN]
        verdict = sentence(checks, form, target.finer) or "holds"
        table.add_row(form, f"{size:.1f}", f"{written - started:.0f}", f"{ended - written:.0f}", *told, verdict)
        seconds = f"{written - started:.0f} + {ended - written:.0f} s"
        print(form, f"{size:.1f} MB", seconds, *told, verdict, sep=" | ", file=sys.stderr, flush=True)
    Console(width=240).print(table)


if __name__ == "__main__":
    main()

"""`predict`: the labels or answers of a run's model to the rows of a file, beside the row's own columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.problems import listed
from finetune.data.read import read
from finetune.data.rows import Row
from finetune.disk.atomic import write_file
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import DataError
from finetune.evaluation.predict import Prediction, predict
from finetune.recipe.names import local
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.row_files import as_text, check_output, is_table
from finetune.training.reopen import ready_to_answer

PREDICTED, PROBABILITY = "predicted", "probability"  # the columns that are added


def run(
    opened: RunFolder,
    recipe: Recipe,
    data: str,
    output: Path,
    force: bool,
    max_tokens: int | None,
    backend: str | None,
) -> None:
    """Writes `output`, whole or not at all."""
    path = local(data, Path.cwd())
    check_output(output, force, path)
    adapter = read_trained(opened)
    source = read(str(path or data), Path.cwd(), "test", recipe.data.encoding)
    _check_columns(source.rows)
    job, rows = with_progress(ready_to_answer(recipe, backend, opened, source))
    check_run_base(opened, job.folder)
    session = job.open(adapter)
    longest = max_tokens or recipe.evaluate.max_tokens
    made = with_progress(predict(session, job.recipe, job.prepared, job.tokenizer, longest))
    lines = [_line(row.fields, one, job.prepared.labels, output) for row, one in zip(rows, made, strict=True)]
    added = [name for line in lines[:1] for name in line if name == PREDICTED or name.startswith(f"{PROBABILITY} ")]
    write_file(output, as_text(output, lines, added))
    split = job.prepared.held_out
    if left_out := [*split.left_out, *split.too_long]:
        print(*listed(left_out), f"{len(left_out)} rows left out (data.on_error: skip)", sep="\n", file=sys.stderr)
    if split.shortened:
        print(f"{len(split.shortened)} rows with a shortened prompt (train.max_length)", file=sys.stderr)
    print(f"{len(rows)} rows: {output}")


def _check_columns(rows: Sequence[Row]) -> None:
    for row in rows:
        for name in row.fields:
            if name in (PREDICTED, PROBABILITY) or name.startswith(f"{PROBABILITY} "):
                raise DataError(f"{row.file}: has a column {name} already, which predict writes; rename it")


def _line(fields: Mapping[str, Any], made: Prediction, labels: Sequence[str], output: Path) -> dict[str, Any]:
    """The row's own columns, and what is added."""
    line = {**fields, PREDICTED: made.predicted}
    shares = {label: round(share, 6) for label, share in zip(labels, made.probabilities, strict=False)}
    if not shares:
        return line
    if is_table(output):
        return line | {f"{PROBABILITY} {label}": share for label, share in shares.items()}
    return line | {PROBABILITY: shares}

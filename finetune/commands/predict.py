"""`predict`: the labels or answers of a run's model to the rows of a file, beside the row's own columns."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.problems import listed
from finetune.data.read import read
from finetune.data.rows import Row
from finetune.disk.adapter import check_base, read_adapter
from finetune.disk.atomic import write_file
from finetune.disk.run_folder import RunFolder
from finetune.errors import DataError, RecipeError
from finetune.evaluation.predict import Prediction, predict
from finetune.recipe.names import local
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.training.again import ready_to_answer

PREDICTED, PROBABILITY = "predicted", "probability"  # the columns that are added
_ENDINGS = (".jsonl", ".csv")


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
    _check_output(output, force, path)
    adapter = read_adapter(opened.adapter)
    source = read(str(path or data), Path.cwd(), "test", recipe.data.encoding)
    _check_columns(source.rows)
    job, rows = with_progress(ready_to_answer(recipe, backend, opened, source))
    check_base(opened.adapter, job.folder)
    session = job.open(adapter)
    longest = max_tokens or recipe.evaluate.max_tokens
    made = with_progress(predict(session, job.recipe, job.prepared, job.tokenizer, longest))
    lines = [_line(row.fields, one, job.prepared.labels, output) for row, one in zip(rows, made, strict=True)]
    write_file(output, _as_csv(lines) if output.suffix.lower() == ".csv" else _as_json_lines(lines))
    split = job.prepared.held_out
    if left_out := [*split.left_out, *split.too_long]:
        print(f"{listed(left_out)}\n{len(left_out)} rows left out (data.on_error: skip)", file=sys.stderr)
    if split.shortened:
        print(f"{len(split.shortened)} rows with a shortened prompt (train.max_length)", file=sys.stderr)
    print(f"{len(rows)} rows: {output}")


def _check_output(output: Path, force: bool, source: Path | None) -> None:
    """Raises RecipeError where it cannot be, or may not be, written."""
    if output.suffix.lower() not in _ENDINGS:
        raise RecipeError(f"--output {output}: the ending must be {' or '.join(_ENDINGS)}")
    if output.is_dir():
        raise RecipeError(f"--output {output}: is a folder; name a file")
    if source is not None and output.exists() and source.exists() and output.samefile(source):
        raise RecipeError(f"--output {output}: is the file whose rows are read; give another name")
    if output.exists() and not force:
        raise RecipeError(f"{output}: exists already; give another name with --output, or --force to replace it")


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
    if output.suffix.lower() == ".csv":
        return line | {f"{PROBABILITY} {label}": share for label, share in shares.items()}
    return line | {PROBABILITY: shares}


def _as_json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)


def _as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Cells as they are; a list or an object is JSON in its cell."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    added = [name for name in names if name == PREDICTED or name.startswith(f"{PROBABILITY} ")]
    names = [*(name for name in names if name not in added), *added]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows([_cell(line.get(name)) for name in names] for line in lines)
    return text.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, str) or value is None:
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)

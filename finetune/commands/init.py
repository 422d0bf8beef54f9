"""`init`: look at a data file and write a starter recipe that fits it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.data.formats import recognise
from finetune.data.problems import refuse_rows
from finetune.data.read import read
from finetune.disk.atomic import write_file
from finetune.errors import RecipeError

_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~", ".inf", ".nan")  # not text to YAML
TEMPLATE = """\
# A starter recipe for {name}: {rows} rows, read as {format}.{seen}
# `finetune plan {output}` shows what will happen; `finetune train {output}` does it.
# Every key and its default: `finetune plan`; for editors: `finetune schema > schema.json`.

model:
  path: {model}          # a model folder, a hub id (org/name), or builtin:reviews-base

data:
  train: {train}
  # valid: valid.jsonl      # without it, a tenth of train is set apart (seeded{stratified})
  # test: test.jsonl        # rows for the final figures; without it the validation rows serve
  format: {format}
{columns}
prompt:
  template: {template}

lora:
  rank: 16
  alpha: 32                 # the adapter's weight is alpha / rank
  dropout: 0.05

quantize: 4bit              # none | 4bit

train:
  epochs: 3
  batch_size: 16            # examples in one optimiser step, on every machine
  learning_rate: 2e-4{rate}
  max_length: {max_length:<13} # the longest row has about {longest} words
  early_stopping: 2         # stop after two validations without a better loss
"""


def run(data: Path, output: Path, model: str) -> None:
    """Writes `output`; never over an existing file."""
    if output.exists():
        raise RecipeError(f"{output}: exists already; give another name with --output")
    source = read(str(data.resolve()), base=Path.cwd())
    refuse_rows(source.bad)
    rows = source.rows
    found = recognise(rows)
    words = max(len(str(row.fields).split()) for row in rows)
    labels = Counter(str(row.fields[found.columns["label"]]) for row in rows) if found.name == "classification" else {}
    renamed = {standard: own for standard, own in found.columns.items() if standard != own}
    text = TEMPLATE.format(
        name=data.name,
        rows=len(rows),
        format=found.name,
        seen=_labels(labels),
        output=output,
        model=_written(model),
        train=_written(os.path.relpath(data.resolve(), output.resolve().parent)),
        stratified=", stratified by label" if labels else "",
        columns=_columns(renamed),
        template="chat" if found.name in ("chat", "sharegpt") else "auto",
        rate="       # for small models 1e-3 is a better start" if model.startswith("builtin:") else "",
        max_length=next((size for size in (128, 256, 512, 1024, 2048) if 2 * words < size), 4096),
        longest=words,
    )
    write_file(output, text)
    print(f"{output}: a recipe for {len(rows)} rows of {found.name}; look at it, then: finetune plan {output}")


def _written(text: str) -> str:
    """The text as a YAML scalar: plain where that is safe, quoted as JSON (which YAML reads) elsewhere."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./:-]*", text) and not text.endswith(":")
    return text if plain and text.lower() not in _WORDS else json.dumps(text, ensure_ascii=False)


def _labels(labels: Any) -> str:
    if not labels:
        return ""
    shown = ", ".join(f"{' '.join(label.split())} ({count})" for label, count in labels.most_common(8))
    return f"\n# Labels: {shown}{', ...' if len(labels) > 8 else ''}"


def _columns(renamed: dict[str, str]) -> str:
    if not renamed:
        return ""
    return "  columns:\n" + "".join(f"    {standard}: {_written(own)}\n" for standard, own in renamed.items())

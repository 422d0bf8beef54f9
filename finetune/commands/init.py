"""`init`: look at a data source and write a starter recipe that fits it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.data.column_guess import by_content, headerless
from finetune.data.column_template import PLAIN
from finetune.data.formats import REQUIRED, STANDARD, recognise
from finetune.data.label_names import Spellings, find_labels, labels_in, refuse_many, respelt
from finetune.data.preference_files import better_columns, refuse_preferences
from finetune.data.preference_rows import compared
from finetune.data.problems import BadSource, refuse_rows
from finetune.data.read import read
from finetune.data.records import read_records
from finetune.data.rows import Row, Rows
from finetune.data.sources import SplitName, files_of, held_out_sources
from finetune.disk.atomic import write_file
from finetune.errors import RecipeError
from finetune.recipe.load import parse_recipe
from finetune.recipe.names import BUILTIN, local
from finetune.recipe.schema import Data
from finetune.text import command_line, shorten

TITLES = ("title", "headline", "heading", "subject")  # of a text in the column beside
MANY_LABELS = 20
_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~", ".inf", ".nan")  # not text to YAML
TEMPLATE = """\
# A starter recipe for {name}: {rows} rows, read as {read}.{seen}
# `finetune plan {output}` shows what will happen; `finetune train {output}` does it.
# Every key and its default: `finetune plan`; for editors: `finetune schema > schema.json`.

model:
  path: {model}          # a model folder, a hub id (org/name), or builtin:reviews-base

data:
  train: {train}
{held_out}  format: {format}
{columns}
prompt:
  template: {template}

{head}lora:
  rank: 16
  alpha: 32                 # the adapter's weight is alpha / rank
  dropout: {dropout}

quantize: 4bit              # none | 4bit
# method: full              # in the place of lora and quantize: every weight trains, for about 30 bytes of memory each

train:
  epochs: auto              # as many as lower the validation loss, 6 at most; or a number
  batch_size: 16            # examples in one optimiser step, on every machine
  learning_rate: auto       # by rule, and a short race of four before the run; or a number, such as 2e-4
  max_length: {max_length:<13} # the longest row has about {longest} words
  early_stopping: 2         # stop after two validations without a better loss
"""


class Look(NamedTuple):
    """What the rows are."""

    format: str  # auto where it is not known
    columns: Mapping[str, str]  # those that the recipe names: standard name -> the file's column
    labels: Mapping[str, int]  # how often each occurs
    guessed: bool  # the columns were told by what they hold
    pairs: bool = False  # two answers to a prompt, chosen and rejected


def run(data: str, output: Path, model: str, columns: Mapping[str, str]) -> None:
    """Writes `output`; never over an existing file. columns: standard name -> the file's, as the command line says."""
    if output.exists():
        raise RecipeError(f"{output}: exists already; give another name with --output")
    source = read(data, base=Path.cwd())
    refuse_rows(source.bad)
    look = _look(source, columns)
    folder, path = output.resolve().parent, local(data, Path.cwd())
    train = _from(folder, path) if path else data
    named = None if model.startswith(BUILTIN) else local(model, Path.cwd())
    base = _from(folder, named) if named and named.exists() else model
    text = _recipe(source.rows, look, data, output, base, train)
    try:
        text.encode()
        recipe = parse_recipe(text, output)
    except UnicodeEncodeError:
        raise RecipeError(f"{data}: a name is not UTF-8, and cannot stand in a recipe; rename it") from None
    if (recipe.data.train, recipe.data.columns) != (str(path or data), look.columns):
        raise RecipeError(f"{data}: a name cannot be written so that it is read back the same; rename it")
    write_file(output, text)
    print(_summary(source.rows, look, command_line(shorten(str(output), 200))))


def _look(source: Rows, given: Mapping[str, str]) -> Look:
    """Raises DataError for rows that cannot be trained on, as `check` does."""
    guessed = dict(given)
    if not given and better_columns(_names(source.rows)):
        pairs = compared(source, {})
        refuse_rows(pairs.bad)
        refuse_rows(read_records(pairs.rows, recognise(pairs.rows))[1])
        return Look("auto", {}, {}, False, pairs=True)
    try:
        layout = recognise(source.rows, "auto", given)
    except BadSource:
        names = _names(source.rows)
        refuse_preferences(source.rows, names, "auto", given, source.bad)
        guessed = {} if given or headerless(source.rows) else by_content(source.rows)
        if given or headerless(source.rows):
            raise
        if not guessed:
            return Look("auto", {}, {}, False)
        layout = recognise(source.rows, "auto", guessed)
    labels: Mapping[str, int] = {}
    if layout.name == "classification":
        column = layout.columns["label"]
        refuse_many(source.rows, column)
        source = respelt(source, column, Spellings(labels_in(source.rows, column)))
    records, bad = read_records(source.rows, layout)
    refuse_rows(bad)
    if layout.name == "classification":
        find_labels(records, None)
        labels = Counter(record.answer or "" for record in records)
    renamed = {standard: column for standard, column in layout.columns.items() if standard != column}
    return Look(layout.name, renamed, labels, guessed != dict(given))


def _from(folder: Path, path: Path) -> str:
    """A path relative to the recipe's folder, as a recipe means it."""
    relative = os.path.relpath(path, folder)
    return relative if local(relative, folder) == path else f"./{relative}"


def _recipe(rows: Sequence[Row], look: Look, data: str, output: Path, model: str, train: str) -> str:
    words = max(len(str(row.fields).split()) for row in rows)
    return TEMPLATE.format(
        name=shorten(Path(data).name, 100),
        rows=len(rows),
        format=look.format,
        read="pairs of answers" if look.pairs else look.format,
        seen=_labels(look.labels),
        output=command_line(shorten(str(output), 200)),
        model=_written(model),
        train=_written(train),
        held_out=_held_out(data, bool(look.labels)),
        columns=_columns(rows, look),
        template=_written(_template(rows, look)),
        head="preferences: {}             # learn to prefer chosen to rejected, by DPO\n\n" * look.pairs
        or _head(look.labels),
        dropout=0 if look.pairs else 0.05,
        max_length=next((size for size in (128, 256, 512, 1024, 2048) if 2 * words < size), 4096),
        longest=words,
    )


def _template(rows: Sequence[Row], look: Look) -> str:
    """How a row asks: for texts with a title of their own, both."""
    if look.format in ("chat", "sharegpt"):
        return "chat"
    title = _title(rows, look)
    return PLAIN["classification"].replace("{text}", f"{{{title}}}\n{{text}}") if title else "auto"


def _title(rows: Sequence[Row], look: Look) -> str | None:
    """The column of the texts' titles."""
    titles = [name for name in _names(rows) if name.lower() in TITLES and name not in look.columns.values()]
    return titles[0] if look.format == "classification" and len(titles) == 1 else None


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.fields))


def _held_out(data: str, stratified: bool) -> str:
    """What validation and test will be: a folder's own files, or what their keys change."""
    how = "seeded, stratified by label" if stratified else "seeded"
    lines: dict[SplitName, str] = {
        "valid": f"valid: valid.jsonl      # without it, a tenth of train is set apart ({how})",
        "test": "test: test.jsonl        # rows for the final figures; without it the validation rows serve",
    }
    for split, source in held_out_sources(Data(train=data), Path.cwd()).items():
        files = files_of(source, Path.cwd(), split)
        names = ", ".join(shorten(file.name, 40) for file in files.paths[:3]) if files else source
        lines[split] = f"{split}: {names}, which the folder has; `{split}:` names another file"
    return "".join(f"  # {line}\n" for line in lines.values())


def _summary(rows: Sequence[Row], look: Look, output: str) -> str:
    if look.pairs:
        return f"{output}: a recipe for {len(rows)} pairs of answers; look at it, then: finetune plan {output}"
    if look.format == "auto":
        return (
            f"{output}: a recipe for {len(rows)} rows whose columns have names that say nothing here; fill in "
            f"data.columns in it, then: finetune plan {output}"
        )
    took = " and ".join(f"{shorten(column, 40)} as {part}" for part, column in look.columns.items())
    used = {*STANDARD, *look.columns.values(), _title(rows, look)}
    unused = ", ".join(shorten(name, 40) for name in _names(rows) if name not in used)
    said = [f"took {took}, by what they hold; data.columns changes that"] if look.guessed else []
    if unused and (look.guessed or look.format == "text"):
        label = "; --label names the column of a label" if look.format == "text" else ""
        said.append(f"nothing of {shorten(unused, 200)} is used{label}")
    guess = f" ({'; '.join(said)})" if said else ""
    return f"{output}: a recipe for {len(rows)} rows of {look.format}{guess}; look at it, then: finetune plan {output}"


def _written(text: str) -> str:
    """The text as a YAML scalar: plain where that is safe, in double quotes elsewhere."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./:-]*", text, re.ASCII) and not text.endswith(":")
    if plain and text.lower() not in _WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escaped(char) for char in quoted)


def _escaped(char: str) -> str:
    return (
        char
        if "\ud800" <= char <= "\udfff"
        else f"\\u{ord(char):04x}"
        if char < "\U00010000"
        else f"\\U{ord(char):08x}"
    )


def _labels(labels: Mapping[str, int]) -> str:
    if not labels:
        return ""
    shown = ", ".join(f"{shorten(label, 40)} ({count})" for label, count in Counter(labels).most_common(8))
    return f"\n# Labels: {shown}{', ...' if len(labels) > 8 else ''}"


def _head(labels: Mapping[str, int]) -> str:
    """A head chooses among many labels many times as fast as their tokens are scored."""
    if not labels:
        return ""
    line = "head: {}                    # a layer that chooses the label, head first; without it its tokens are scored"
    return f"{line if len(labels) >= MANY_LABELS else f'# {line}'}\n\n"


def _columns(rows: Sequence[Row], look: Look) -> str:
    if look.format != "auto" or look.pairs:
        lines = [f"    {standard}: {_written(column)}\n" for standard, column in look.columns.items()]
        return "  columns:\n" + "".join(lines) if lines else ""
    names = ", ".join(shorten(column, 40) for column in _names(rows)[:20])
    needs = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in REQUIRED.items())
    return (
        f"  # Fill in which column holds what. There are: {names}\n"
        f"  # What each format needs: {needs}\n"
        "  columns: {}               # such as {text: body, label: topic}\n"
    )

"""From a recipe's data to everything training and evaluation take from it, with every problem gathered on the way.

One pipeline for `train`, `eval`, `plan` and `check`: each source is read once, and each row is tokenised once.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from finetune.data.examples import Writer
from finetune.data.formats import Layout, recognise
from finetune.data.grouped_split import WORDS, part
from finetune.data.label_names import Labels, Spellings, find_labels, labels_in, refuse_many, respelt, unknown_labels
from finetune.data.limit import limited
from finetune.data.preference_rows import compared, others, pair_notes
from finetune.data.problems import BadSource, named_by, refuse_rows
from finetune.data.read import read
from finetune.data.records import read_records
from finetune.data.renderers import make_renderer
from finetune.data.rows import Prepared, Problem, Rows, Split, Task
from finetune.data.sources import SplitName, held_out_sources
from finetune.data.split import set_apart
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.errors import RecipeError
from finetune.events import Progress
from finetune.recipe.schema import Recipe

Broken = list[tuple[str, Problem]]  # (split, why it is not as the recipe asks)


def prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    base: Path | None,
    clock: datetime | None = None,
    labels: Labels | None = None,
    parting: str | None = WORDS,
) -> Generator[Progress, None, Prepared]:
    """Read, check, render, tokenise and fit all rows of a recipe. `problems.refuse` says whether they are sound.

    base: the folder that relative paths start from; None where all are absolute. clock: the time of the run, for chat
    templates that write it; without one they ask the machine. labels: those of a run, empty where it has none; then
    only the rows of data.test are read, to be measured. parting: how validation rows are set apart; None: as in runs
    that do not say. Raises DataError only where the training file as a whole cannot
    be understood, and RecipeError for settings that do not fit the rows.
    """
    yield Progress(0, "data: reading", 0, 1)
    records = yield from _gather(recipe, tokenizer, base, clock, labels, parting)
    yield Progress(0, "data: reading", 1, 1)
    writer = Writer(recipe, tokenizer, records)
    train = yield from writer.write(records.train)
    valid = yield from writer.write(records.valid)
    test = (yield from writer.write(records.test)) if records.test else None
    tokens, stop = writer.labels.scored, stop_tokens(tokenizer)
    return replace(records, train=train, valid=valid, test=test, label_tokens=tokens, stop_tokens=stop)


def _gather(
    recipe: Recipe,
    tokenizer: Tokenizer,
    base: Path | None,
    clock: datetime | None,
    known: Labels | None,
    parting: str | None,
) -> Generator[Progress, None, Prepared]:
    """The rows of every split as records, without an example yet, and how they will be written."""
    data = recipe.data
    alone = known is not None
    source = _read(recipe, (alone and data.test) or data.train, base, "test" if alone else "train", alone)
    if not source.rows:
        refuse_rows(source.bad)
    layout, records, reads = _understood(recipe, source, tokenizer, clock)
    classified = records.task == "classification"
    spellings = _spellings(source, layout, known or data.labels) if classified else None
    if known is not None:
        return replace(records, labels=known, test=_split("test", source, layout, recipe, reads, spellings, known))
    train = _split("train", source, layout, recipe, reads, spellings)
    broken: Broken = []
    labels = _labels(train, recipe, broken) if classified else ()
    held_out: dict[str, Split] = {}
    for name, held in held_out_sources(data, base).items():
        try:
            held_out[name] = _split(name, _read(recipe, held, base, name), layout, recipe, reads, spellings, labels)
        except BadSource as error:
            broken.append((name, error.problem))
    if "valid" not in held_out:
        records = replace(records, parted=True, parting=parting)
        train, held_out["valid"] = yield from _set_apart(train, recipe, labels, parting, broken)
    fewer = {split.name: _fewer(split, recipe) for split in (train, *held_out.values())}
    return replace(
        records, labels=labels, train=fewer["train"], valid=fewer["valid"], test=fewer.get("test"), broken=tuple(broken)
    )


def _understood(
    recipe: Recipe, source: Rows, tokenizer: Tokenizer, clock: datetime | None
) -> tuple[Layout, Prepared, set[str]]:
    """How the rows are read and written, as a Prepared without rows; and the columns that are read of each.

    Raises BadSource, and RecipeError for settings that do not fit the rows.
    """
    data = recipe.data
    columns = data.columns if recipe.preferences is None else others(data.columns)
    layout = recognise(source.rows, data.format, columns, source.bad)
    task = _task(recipe, layout)
    if data.long_rows == "split" and layout.name != "text":
        raise RecipeError(f"data.long_rows: only plain text can be split, and the rows are {layout.name}; remove it")
    names = {*layout.columns, *(column for row in source.rows for column in row.fields)}
    renderer = make_renderer(recipe.prompt, layout.name, names, tokenizer, clock)
    reads = {*renderer.reads, *([data.groups] if isinstance(data.groups, str) else [])}
    train, valid = Split("train", 0), Split("valid", 0)
    return layout, Prepared(task, layout.name, renderer.name, train, valid, renderer=renderer), reads


def _read(recipe: Recipe, source: str, base: Path | None, name: SplitName, alone: bool = False) -> Rows:
    """The rows of a source; with preferences each with its worse answer too. alone: the recipe does not name it."""
    key = name if getattr(recipe.data, name) == source else "train"  # whose folder may hold the other splits
    with named_by("" if alone else f"data.{key}", source):
        rows = read(source, base, name, recipe.data.encoding)
    return rows if recipe.preferences is None else compared(rows, recipe.data.columns)


def _spellings(source: Rows, layout: Layout, given: Sequence[str] | None) -> Spellings:
    """Of the labels of some rows. Raises BadSource where there are too many, and the recipe names none."""
    column = layout.columns["label"]
    if given is None:
        refuse_many(source.rows, column)
    return Spellings(labels_in(source.rows, column), given)


def _task(recipe: Recipe, layout: Layout) -> Task:
    if recipe.head is not None and layout.name != "classification":
        raise RecipeError(f"head: it chooses among labels, and the rows are {layout.name} and have none; remove it")
    if recipe.data.labels is not None and layout.name != "classification":
        raise RecipeError(f"data.labels: the rows are {layout.name} and have no label; remove it")
    if recipe.preferences is not None:
        return "preference"
    fits: dict[str, Task] = {"classification": "classification", "text": "text"}
    if recipe.task == "auto":
        return fits.get(layout.name, "generation")
    if recipe.task == "classification" and layout.name != "classification":
        raise RecipeError(f"task: classification needs rows of text and label, and the rows are {layout.name}")
    if recipe.task == "generation" and layout.name == "text":
        raise RecipeError("task: generation needs rows with an answer, and the rows are plain text; use text")
    return recipe.task


def _split(
    name: str,
    source: Rows,
    layout: Layout,
    recipe: Recipe,
    reads: Collection[str],
    spellings: Spellings | None,
    labels: Labels = (),
) -> Split:
    """The records of one source, and its bad rows. spellings: of labels. labels: of train, where that is another
    source.
    """
    if spellings is not None:
        source = respelt(source, layout.columns["label"], spellings)
    allowed = recipe.data.labels if recipe.task in ("auto", "classification") else None
    records, bad = read_records(source.rows, layout, allowed, reads)
    if labels:
        unknown = unknown_labels(records, labels)
        bad += unknown
        locations = {location for location, _ in unknown}
        records = [record for record in records if record.location not in locations]
    bad = [*source.bad, *bad]
    notes = (*layout.notes, *source.notes)
    return Split(name=name, rows=len(records) + len(bad), bad=tuple(bad), notes=notes, records=records)


def _fewer(split: Split, recipe: Recipe) -> Split:
    """As many as the recipe's limit allows, with what is to be said of the pairs that are left."""
    split = limited(split, recipe.data.limit, recipe.seed)
    return replace(split, notes=(*split.notes, *pair_notes(split.records)))


def _labels(train: Split, recipe: Recipe, broken: Broken) -> Labels:
    try:
        return find_labels(train.records, recipe.data.labels)
    except BadSource as error:
        broken.append(("train", error.problem))
        return ()


def _set_apart(
    train: Split, recipe: Recipe, labels: Labels, parting: str | None, broken: Broken
) -> Generator[Progress, None, tuple[Split, Split]]:
    """(train, valid); a validation split without rows where none can be set apart."""
    data, count, alike = recipe.data, len(train.records), 0
    how = train.records, data.valid_fraction, recipe.seed, bool(labels)
    try:
        records, apart, alike = (yield from part(*how)) if parting else (*set_apart(*how), 0)
    except BadSource as error:
        broken.append(("valid", error.problem))
        return train, Split(name="valid", rows=0)
    note = f"{len(apart)} of {count} rows of {data.train} set apart for validation (seed {recipe.seed})"
    notes = [note + (", stratified by label" if labels else "")]
    if alike:
        notes.append(f"{alike} of them are nearly the same as training rows: so many rows are alike that they part")
    valid = Split(name="valid", rows=len(apart), notes=tuple(notes), records=apart)
    return replace(train, rows=train.rows - len(apart), records=records), valid

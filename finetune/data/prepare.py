"""From a recipe's data to everything training and evaluation take from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from finetune.data import split as parting
from finetune.data.formats import Layout, recognise
from finetune.data.labels import Labels, LabelTokens, find_labels, label_tokens, same_label_tokens, unknown_labels
from finetune.data.loss_mask import Tokenised, tokenise
from finetune.data.problems import Problem, listed, naming, settle, skipping, too_many
from finetune.data.read import Rows, read
from finetune.data.records import read_records
from finetune.data.renderers import make_renderer
from finetune.data.rows import Dataset, Example, Prepared, Record, Rendered, Renderer
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.data.truncate import Fitted, fit
from finetune.errors import DataError, RecipeError
from finetune.recipe.schema import Data, Recipe

Task = Literal["classification", "generation", "text"]
TOGETHER = 2000  # rows between two reports of progress
Report = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Source:
    """One split on its way: its records, and what became of the other rows."""

    name: str
    records: list[Record]
    bad: list[Problem]
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.records) + len(self.bad)


@dataclass(frozen=True)
class Gathered:
    """All rows of a recipe, read and checked, and how they will be written; not yet tokens."""

    task: Task
    layout: Layout
    renderer: Renderer
    labels: Labels
    sources: tuple[Source, ...]  # train, valid, and test where there is one


def prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    base: Path,
    progress: Report = lambda what, done, total: None,
) -> Prepared:
    """Read, check, render, tokenise and fit all rows of a recipe.

    base: the folder that relative paths start from. Raises DataError for rows, with file and line, and
    RecipeError for settings that do not fit them.
    """
    found = gather(recipe, tokenizer, base)
    labels = found.labels
    fitted = {one.name: _fit(recipe, tokenizer, found.renderer, one, progress) for one in found.sources}
    scored: LabelTokens = ()
    if labels:
        scored, alone = label_tokens(tokenizer, found.renderer, fitted["train"][0].kept[0].rendered.record, labels)
        for one, _ in fitted.values():
            one.kept = [same_label_tokens(row, alone[labels.index(_answer(row))]) for row in one.kept]
    sets = {one.name: _dataset(one, *fitted[one.name]) for one in found.sources}
    return Prepared(
        found.task,
        found.layout.name,
        found.renderer.name,
        sets["train"],
        sets["valid"],
        sets.get("test"),
        labels,
        scored,
        stop_tokens(tokenizer),
    )


def gather(recipe: Recipe, tokenizer: Tokenizer, base: Path, set_apart: bool = True) -> Gathered:
    """Read and check the rows of every split. Raises as `prepare` does.

    set_apart: take validation rows from the training rows where no file has them; else there are none.
    """
    data = recipe.data
    opened = read(data.train, base)
    if not opened.rows:
        settle(opened.bad, "stop")
    layout = _layout(opened, data)
    task = _task(recipe, layout)
    columns = {*layout.columns, *(column for row in opened.rows for column in row.fields)}
    renderer = make_renderer(recipe.prompt, layout.name, columns, tokenizer)
    train = _source("train", opened, layout, recipe)
    labels = _labels(train, data) if task == "classification" else ()
    sources = [train]
    if data.valid is not None:
        sources.append(_source("valid", read(data.valid, base), layout, recipe, labels))
    elif set_apart:
        sources = [*_set_apart(train, recipe, labels)]
    if data.test is not None:
        sources.append(_source("test", read(data.test, base), layout, recipe, labels))
    return Gathered(task, layout, renderer, labels, tuple(sources))


def _layout(opened: Rows, data: Data) -> Layout:
    with naming(opened.bad):
        return recognise(opened.rows, data.format, data.columns)


def _labels(train: Source, data: Data) -> Labels:
    with naming(train.bad):
        return find_labels(train.records, data.labels)


def _task(recipe: Recipe, layout: Layout) -> Task:
    if recipe.data.labels is not None and layout.name != "classification":
        raise RecipeError(f"data.labels: the rows are {layout.name} and have no label; remove it")
    fits: dict[str, Task] = {"classification": "classification", "text": "text"}
    if recipe.task == "auto":
        return fits.get(layout.name, "generation")
    if recipe.task == "classification" and layout.name != "classification":
        raise RecipeError(f"task: classification needs rows of text and label, and the rows are {layout.name}")
    if recipe.task == "generation" and layout.name == "text":
        raise RecipeError("task: generation needs rows with an answer, and the rows are plain text; use text")
    return recipe.task


def _source(name: str, found: Rows, layout: Layout, recipe: Recipe, labels: Labels = ()) -> Source:
    """The records of one file. Raises DataError for its bad rows, unless they are to be skipped."""
    allowed = recipe.data.labels if recipe.task in ("auto", "classification") else None
    records, bad = read_records(found.rows, layout, allowed)
    if labels:
        unknown = unknown_labels(records, labels)
        bad += unknown
        places = {place for place, _ in unknown}
        records = [record for record in records if record.place not in places]
    bad = [*found.bad, *bad]
    settle(bad, recipe.data.on_error, skipping(bad, len(records) + len(bad), recipe))
    return Source(name, records, bad, (*layout.notes, *found.notes))


def _set_apart(train: Source, recipe: Recipe, labels: Labels) -> tuple[Source, Source]:
    data = recipe.data
    kept, apart = parting.split(train.records, data.valid_fraction, recipe.seed, stratified=bool(labels))
    how = f"{len(apart)} of {len(train.records)} rows of {data.train} set apart for validation (seed {recipe.seed})"
    valid = Source("valid", apart, [], (how + (", stratified by label" if labels else ""),))
    return replace(train, records=kept), valid


def _fit(
    recipe: Recipe, tokenizer: Tokenizer, renderer: Renderer, source: Source, progress: Report
) -> tuple[Fitted, tuple[str, ...]]:
    """The rows of one split as tokens within max_length, and notes on them."""
    rows: list[Tokenised] = []
    bad: list[Problem] = []
    unrolled = 0
    for chunk in tokenised(tokenizer, renderer, source, progress):
        rows += chunk.rows
        bad += chunk.bad
        unrolled += chunk.unrolled
    settle(bad, recipe.data.on_error, skipping(bad, source.rows, recipe))
    fitted = fit(tokenizer, renderer, rows, recipe.train.max_length, recipe.train.truncation)
    fitted.dropped = [*source.bad, *bad, *fitted.dropped]
    if not fitted.kept:
        why = f": {fitted.dropped[0][0]}: {fitted.dropped[0][1]}" if fitted.dropped else ""
        raise DataError(f"data.{source.name}: no row is left{why}; mend the rows, or raise train.max_length")
    if problem := too_many(source.name, source.rows, fitted.dropped, recipe):
        raise DataError(f"{listed(fitted.dropped)}\n{': '.join(problem)}")
    notes = []
    if unrolled:
        notes.append(f"{unrolled} conversations unrolled: the chat template rewrites earlier turns")
    return fitted, tuple(notes)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a split as tokens, of any length yet."""

    rows: list[Tokenised]
    bad: list[Problem]  # records that the template refuses
    unrolled: int  # conversations that became several rows


def tokenised(
    tokenizer: Tokenizer,
    renderer: Renderer,
    source: Source,
    progress: Report = lambda what, done, total: None,
) -> Iterator[Chunk]:
    """The rows of one split in order, so many at a time that memory stays small."""
    for start in range(0, len(source.records), TOGETHER):
        bad: list[Problem] = []
        rendered, unrolled = _render(renderer, source.records[start : start + TOGETHER], bad)
        yield Chunk(list(tokenise(tokenizer, rendered)), bad, unrolled)
        progress(f"preparing {source.name}", min(start + TOGETHER, len(source.records)), len(source.records))


def _render(renderer: Renderer, records: Sequence[Record], bad: list[Problem]) -> tuple[list[Rendered], int]:
    """Rendered rows, and how many conversations were unrolled; rows that cannot be written go to `bad`."""
    found: list[Rendered] = []
    unrolled = 0
    for record in records:
        try:
            written = renderer.render(record)
        except ValueError as error:
            bad.append((record.place, str(error)))
            continue
        unrolled += len(written) > 1
        found += written
    return found, unrolled


def _answer(row: Tokenised) -> str:
    """The label, or the words of the last answer."""
    rendered = row.rendered
    if rendered.answer is None:
        return ""
    return rendered.record.answer if rendered.record.answer is not None else rendered.text[slice(*rendered.answer)]


def _dataset(source: Source, fitted: Fitted, notes: tuple[str, ...]) -> Dataset:
    apart = sum(row.split for row in fitted.kept)
    cut = sum(row.cut for row in fitted.kept)
    more = list(notes)
    if apart:
        more.append(f"{apart} rows: a token lay across the border of an answer; prompt and answer were encoded apart")
    if cut:
        more.append(f"{cut} rows lost their end, and with it their end token")
    examples = tuple(example(row) for row in fitted.kept)
    return Dataset(examples, source.rows, tuple(fitted.shortened), tuple(fitted.dropped), (*source.notes, *more))


def example(row: Tokenised) -> Example:
    """The row as it is trained on."""
    rendered = row.rendered
    return Example(
        np.asarray(row.tokens, np.int32),
        np.asarray(row.weights, np.float32),
        rendered.record.place,
        _answer(row).strip() if rendered.answer else None,
        rendered.prompt,
        row.answer[0] if row.answer else None,
    )

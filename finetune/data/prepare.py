"""From a recipe's data to everything training and evaluation take from it, with every problem gathered on the way.

One pipeline for `train`, `eval`, `plan` and `check`: each source is read once, and each row is tokenised once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

from finetune.data.formats import Layout, recognise
from finetune.data.label_names import Labels, Spellings, find_labels, labels_in, respelt, unknown_labels
from finetune.data.labels import LabelWriter
from finetune.data.loss_mask import tokenise
from finetune.data.problems import BadSource, refuse_rows
from finetune.data.read import read
from finetune.data.records import read_records
from finetune.data.renderers import make_renderer
from finetune.data.rows import Example, Prepared, Problem, Record, Rendered, Renderer, Rows, Split, Task
from finetune.data.sources import held_out_sources
from finetune.data.split import set_apart
from finetune.data.tokenizer import Tokenizer, stop_tokens
from finetune.data.truncate import Pair, fit
from finetune.errors import RecipeError
from finetune.events import Progress
from finetune.recipe.schema import Recipe

TOGETHER = 2000  # rows that are text and tokens at the same time; what is kept of them is smaller
Broken = list[tuple[str, Problem]]  # (split, why it is not as the recipe asks)


def prepare(recipe: Recipe, tokenizer: Tokenizer, base: Path | None) -> Generator[Progress, None, Prepared]:
    """Read, check, render, tokenise and fit all rows of a recipe. `problems.refuse` says whether they are sound.

    base: the folder that relative paths start from; None where all are absolute. Raises DataError
    only where the training file as a whole cannot be understood, and RecipeError for settings that do not fit the rows.
    """
    yield Progress(0, "data: reading", 0, 1)
    records = _gather(recipe, tokenizer, base)
    yield Progress(0, "data: reading", 1, 1)
    writer = _Writer(recipe, tokenizer, records)
    train = yield from writer.write(records.train)
    valid = yield from writer.write(records.valid)
    test = (yield from writer.write(records.test)) if records.test else None
    tokens, stop = writer.labels.scored, stop_tokens(tokenizer)
    return replace(records, train=train, valid=valid, test=test, label_tokens=tokens, stop_tokens=stop)


def _gather(recipe: Recipe, tokenizer: Tokenizer, base: Path | None) -> Prepared:
    """The rows of every split as records, without an example yet, and how they will be written."""
    data = recipe.data
    source = read(data.train, base)
    if not source.rows:
        refuse_rows(source.bad)
    layout = recognise(source.rows, data.format, data.columns, source.bad)
    task = _task(recipe, layout)
    columns = {*layout.columns, *(column for row in source.rows for column in row.fields)}
    renderer = make_renderer(recipe.prompt, layout.name, columns, tokenizer)
    spellings = (
        Spellings(labels_in(source.rows, layout.columns["label"]), data.labels) if task == "classification" else None
    )
    train = _split("train", source, layout, recipe, spellings)
    broken: Broken = []
    labels = _labels(train, recipe, broken) if task == "classification" else ()
    held_out: dict[str, Split] = {}
    for name, named in held_out_sources(data, base).items():
        try:
            held_out[name] = _split(name, read(named, base, name), layout, recipe, spellings, labels)
        except BadSource as error:
            broken.append((name, error.problem))
    if "valid" not in held_out:
        train, held_out["valid"] = _set_apart(train, recipe, labels, broken)
    return Prepared(
        task=task,
        format=layout.name,
        template=renderer.name,
        renderer=renderer,
        labels=labels,
        train=train,
        valid=held_out["valid"],
        test=held_out.get("test"),
        broken=tuple(broken),
    )


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


def _split(
    name: str, source: Rows, layout: Layout, recipe: Recipe, spellings: Spellings | None, labels: Labels = ()
) -> Split:
    """The records of one source, and its bad rows. spellings: of labels. labels: of train, where that is another
    source.
    """
    if spellings is not None:
        source = respelt(source, layout.columns["label"], spellings)
    allowed = recipe.data.labels if recipe.task in ("auto", "classification") else None
    records, bad = read_records(source.rows, layout, allowed)
    if labels:
        unknown = unknown_labels(records, labels)
        bad += unknown
        locations = {location for location, _ in unknown}
        records = [record for record in records if record.location not in locations]
    bad = [*source.bad, *bad]
    notes = (*layout.notes, *source.notes)
    return Split(name=name, rows=len(records) + len(bad), bad=tuple(bad), notes=notes, records=records)


def _labels(train: Split, recipe: Recipe, broken: Broken) -> Labels:
    try:
        return find_labels(train.records, recipe.data.labels)
    except BadSource as error:
        broken.append(("train", error.problem))
        return ()


def _set_apart(train: Split, recipe: Recipe, labels: Labels, broken: Broken) -> tuple[Split, Split]:
    """(train, valid); a validation split without rows where none can be set apart."""
    data, count = recipe.data, len(train.records)
    try:
        records, apart = set_apart(train.records, data.valid_fraction, recipe.seed, stratified=bool(labels))
    except BadSource as error:
        broken.append(("valid", error.problem))
        return train, Split(name="valid", rows=0)
    how = f"{len(apart)} of {count} rows of {data.train} set apart for validation (seed {recipe.seed})"
    notes = (how + (", stratified by label" if labels else ""),)
    valid = Split(name="valid", rows=len(apart), notes=notes, records=apart)
    return replace(train, rows=train.rows - len(apart), records=records), valid


class _Writer:
    """Splits of records to splits of examples."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, prepared: Prepared) -> None:
        assert prepared.renderer is not None
        self._settings, self._tokenizer, self._renderer = recipe.train, tokenizer, prepared.renderer
        self.labels = LabelWriter(tokenizer, self._renderer, prepared.labels)

    def write(self, split: Split) -> Generator[Progress, None, Split]:
        """The split with its rows as tokens within max_length; some rows at a time, so that memory stays small."""
        fate, total = _Fate(), len(split.records)
        for start in range(0, total, TOGETHER):
            rendered = _render(self._renderer, split.records[start : start + TOGETHER], fate)
            self._fit(list(zip(rendered, tokenise(self._tokenizer, rendered), strict=True)), fate)
            yield Progress(0, f"data: preparing {split.name}", min(start + TOGETHER, total), total)
        return replace(
            split,
            examples=tuple(fate.examples),
            lengths=tuple(fate.lengths),
            shortened=tuple(fate.shortened),
            dropped=tuple(fate.dropped),
            refused=tuple(fate.refused),
            too_long=tuple(fate.too_long),
            notes=(*split.notes, *_notes(fate)),
        )

    def _fit(self, pairs: Sequence[Pair], fate: _Fate) -> None:
        max_length, policy = self._settings.max_length, self._settings.truncation
        fitted = fit(self._tokenizer, self._renderer, pairs, max_length, policy)
        for (_, whole), row in zip(pairs, fitted, strict=True):
            fate.lengths.append(len(whole))
            long = len(whole) > max_length
            if isinstance(row, str):
                (fate.too_long if long and policy == "error" else fate.dropped).append((whole.location, row))
                continue
            if long:
                fate.shortened.append(whole.location)
            text, example = row
            fate.examples.append(self.labels.write(text.record, example))


@dataclass
class _Fate:
    """What becomes of a split's rows, as in `Split`."""

    examples: list[Example] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)
    dropped: list[Problem] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    too_long: list[Problem] = field(default_factory=list)
    unrolled: int = 0  # conversations


def _render(renderer: Renderer, records: Sequence[Record], fate: _Fate) -> list[Rendered]:
    texts: list[Rendered] = []
    for record, written in zip(records, renderer.render_all(records), strict=True):
        if isinstance(written, ValueError):
            fate.refused.append((record.location, str(written)))
            continue
        fate.unrolled += len(written) > 1
        texts += written
    return texts


def _notes(fate: _Fate) -> Iterator[str]:
    apart, cut = (sum(map(attrgetter(name), fate.examples)) for name in ("apart", "cut"))
    if fate.unrolled:
        yield f"{fate.unrolled} conversations unrolled: the chat template rewrites earlier turns"
    if apart:
        yield f"{apart} rows: a token lay across the border of an answer; prompt and answer were encoded apart"
    if cut:
        yield f"{cut} rows lost their end, and with it their end token"

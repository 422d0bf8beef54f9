"""Rows to predict: read and rendered like training rows, without using an answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from finetune.data.calls import parsed
from finetune.data.column_template import placeholders
from finetune.data.examples import Writer
from finetune.data.formats import ANSWER, Layout, question_layout
from finetune.data.label_names import Labels
from finetune.data.messages import is_answer
from finetune.data.problems import BadSource, refuse_rows
from finetune.data.prompt_parts import Always
from finetune.data.records import read_records
from finetune.data.renderers import CONVERSATIONS, make_renderer, needed
from finetune.data.rows import Example, Prepared, Problem, Record, Renderer, Row, Rows, Split
from finetune.data.tokenizer import Tokenizer, begin_tokens, encode_prompts, stop_tokens
from finetune.events import Progress
from finetune.recipe.schema import Recipe
from finetune.text import harmless

_ANSWER = "\0answer"  # the column of the word that stands where an answer will; no file has it
_WORD = "x"


def unanswered(
    recipe: Recipe, tokenizer: Tokenizer, source: Rows, labels: Labels, always: Always | None, clock: datetime | None
) -> Generator[Progress, None, tuple[Prepared, list[Row]]]:
    """The rows in `test`, with a word in place of each answer, and the row of each example.

    recipe: that of a run. labels, always: what it recorded. Raises BadSource where what its prompts hold is missing.
    """
    if not source.rows:
        refuse_rows(source.bad)
    layout = question_layout(source.rows, recipe.data.format, recipe.data.columns, source.bad)  # type: ignore[arg-type]
    has = {column for row in source.rows for column in row.fields}
    columns = {*layout.columns, *has, *placeholders(recipe.prompt.template)}
    renderer = make_renderer(recipe.prompt, layout.name, columns, tokenizer, clock)
    word = max(labels, key=len) if recipe.task == "classification" else _WORD
    records, bad = _records(source.rows, layout, word, renderer.reads)
    records = _completed(records, needed(recipe) if always is None else always, source.rows[0].file)
    prepared = Prepared(
        task=recipe.task if recipe.task == "classification" else "generation",
        format=layout.name,
        template=renderer.name,
        train=Split("train", 0),
        valid=Split("valid", 0),
        labels=labels if recipe.task == "classification" else (),
        renderer=renderer,
    )
    split = Split("test", len(records) + len(bad), bad=tuple(bad), notes=source.notes, records=records)
    writer = Writer(recipe, tokenizer, prepared)
    if layout.name == "text":
        split = replace(split, examples=tuple(_openings(records, renderer, tokenizer, recipe.train.max_length)))
    else:
        split = yield from writer.write(split)
    rows = [source.rows[_number(example.location)] for example in split.examples]
    split = replace(_located(split, source.rows), bad=(*source.bad, *_in_file(split.bad, source.rows)))
    tokens, stop = writer.labels.scored, stop_tokens(tokenizer)
    return replace(prepared, test=split, label_tokens=tokens, stop_tokens=stop), rows


def _records(
    rows: Sequence[Row], layout: Layout, word: str, reads: Collection[str]
) -> tuple[list[Record], list[Problem]]:
    """Each row's record, which has its number for a line, so that rows of one line stay apart."""
    answer, asked = ANSWER.get(layout.name), []
    bad: list[Problem] = []
    own = layout.columns.get(answer, "") if answer else ""
    for number, row in enumerate(rows):
        fields = {name: value for name, value in row.fields.items() if name != own}
        try:
            if layout.name in CONVERSATIONS:
                column = layout.columns["messages" if layout.name == "chat" else "conversations"]
                fields[column] = _to_be_answered(fields.get(column), column, word)
            elif answer:
                fields[_ANSWER] = word
        except ValueError as error:
            bad.append((f":{number}", str(error)))
            continue
        asked.append(Row(fields, "", number))
    parts = {**layout.columns, **({answer: _ANSWER} if answer else {})}
    records, others = read_records(asked, replace(layout, columns=parts), None, reads)
    return [replace(record, last_only=bool(record.messages), left_out=()) for record in records], [*bad, *others]


def _to_be_answered(value: Any, column: str, word: str) -> list[Any]:
    """The conversation up to the turn that is to be written, and the word in place of that."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [{"role": "user", "content": value}]
    turns = list(parsed(value, column) if isinstance(value, str) else value or ())
    while turns and is_answer(turns[-1]):
        turns.pop()
    if not turns:
        raise ValueError(f"{column}: no turn of a user to answer; add one, or remove the row")
    return [*turns, {"role": "assistant", "content": word}]


def _completed(records: list[Record], always: Always, file: str) -> list[Record]:
    """With what all training rows shared and no row here has. Raises BadSource for what they had each its own of."""
    for name, text in always.items():
        if any(_has(record, name) for record in records):
            continue
        if text is None and records:
            raise BadSource(
                f"{file}:1", f"every training row had {harmless(name)}, and no row here has it; add the column"
            )
        records = [_with(record, name, text or "") for record in records]
    return records


def _has(record: Record, name: str) -> bool:
    if name == "tools":
        return bool(record.tools)
    if name == "system":
        return bool(record.system or (record.messages and record.messages[0]["role"] == "system"))
    return bool(record.values.get(name, "").strip())


def _with(record: Record, name: str, text: str) -> Record:
    if name == "tools":
        return replace(record, tools=tuple(json.loads(text)))
    if name == "system" and record.messages:
        return replace(record, messages=({"role": "system", "content": text}, *record.messages))
    if name == "system":
        return replace(record, system=text, values={**record.values, "system": text})
    return replace(record, values={**record.values, name: text})


def _openings(
    records: Sequence[Record], renderer: Renderer, tokenizer: Tokenizer, max_length: int
) -> Iterable[Example]:
    """Plain texts that are to go on: of a long one the end is what the model goes on from."""
    begin = begin_tokens(tokenizer)
    texts = [renderer.question(record) for record in records]
    for record, text, tokens in zip(records, texts, encode_prompts(tokenizer, texts), strict=True):
        fits = tokens if len(tokens) <= max_length else [*begin, *tokens[len(begin) - max_length :]]
        count = len(fits)
        yield Example(np.array(fits, np.int32), np.zeros(count, np.float32), record.location, None, text, count, count)


def _number(location: str) -> int:
    return int(location.removeprefix(":"))


def _in_file(problems: Iterable[Problem], rows: Sequence[Row]) -> tuple[Problem, ...]:
    return tuple((rows[_number(location)].location, reason) for location, reason in problems)


def _located(split: Split, rows: Sequence[Row]) -> Split:
    """With each row's own file and line."""
    problems: Mapping[str, Any] = {
        name: _in_file(getattr(split, name), rows) for name in ("dropped", "refused", "too_long")
    }
    examples = tuple(replace(one, location=rows[_number(one.location)].location) for one in split.examples)
    shortened = tuple(rows[_number(location)].location for location in split.shortened)
    return replace(split, examples=examples, shortened=shortened, **problems)

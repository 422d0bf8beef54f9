"""Preference rows in TRL's and Anthropic's forms, read as a chosen and a rejected row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.preference_files import better_columns
from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Record, Row, Rows
from finetune.text import harmless

_BESIDE = ("system", "tools", "functions")
_PROMPTS = ("prompt", "question", "instruction", "query", "input")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # Anthropic's transcripts
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TAKEN = ("prompt", "completion", "messages", "conversations", "text", "label", "instruction", "output", "input")

Sides = tuple[Any, Any]  # (better, worse): two texts, or two lists of messages


def compared(source: Rows, mapping: Mapping[str, str]) -> Rows:
    """Each row with its better answer, and the same with the worse one in `Row.rejected`.

    Both have prompt and completion, or where any row is a conversation all have messages. mapping: standard name -> the
    file's column. Raises BadSource where no two columns are compared.
    """
    if not source.rows:
        return source
    columns = list(dict.fromkeys(column for row in source.rows for column in row.fields))
    better, worse = _answers(source, columns, mapping)
    prompt = mapping.get("prompt") or next((name for name in _PROMPTS if name in columns), None)
    read: list[tuple[Row, Any, Sides]] = []
    bad: list[Problem] = []
    for row in source.rows:
        asked = row.fields.get(prompt) if prompt else None
        try:
            read.append((row, *_sides(asked, row.fields.get(better), row.fields.get(worse), (better, worse))))
        except ValueError as error:
            bad.append((row.location, str(error)))
    talks = any(not isinstance(asked, str) for _, asked, _ in read)
    taken = {better, worse, prompt or better, *(name for names in better_columns(columns) for name in names)}
    rows = [_both(row, asked, sides, talks, taken) for row, asked, sides in read]
    return Rows(rows, [*source.bad, *bad], source.notes)


def others(mapping: Mapping[str, str]) -> dict[str, str]:
    """Of the recipe's columns those that stand beside prompt and answers."""
    return {part: column for part, column in mapping.items() if part in _BESIDE}


def _answers(source: Rows, columns: Sequence[str], mapping: Mapping[str, str]) -> tuple[str, str]:
    if "chosen" in mapping and "rejected" in mapping:
        return mapping["chosen"], mapping["rejected"]
    first = source.rows[0].fields
    pairs = [pair for pair in better_columns(columns) if not isinstance(first.get(pair[0]), (int, float, bool))]
    exact = [pair for pair in pairs if pair[0].casefold() in ("chosen", "accepted", "preferred")]
    if len(pairs) == 1 or len(exact) == 1:
        return (exact or pairs)[0]
    shown = harmless(", ".join(columns[:20]))
    raise BadSource(
        source.rows[0].location,
        f"preferences need two answers, chosen and rejected, and the columns are {shown}; name them with data.columns "
        "(chosen: ..., rejected: ..., prompt: ...)",
        source.bad,
    )


def _sides(asked: Any, better: Any, worse: Any, names: tuple[str, str]) -> tuple[Any, Sides]:
    """What is asked (text, or messages), and both answers: texts, or messages. Raises ValueError."""
    if better is None or worse is None:
        raise ValueError(f"{names[0] if better is None else names[1]} is missing; add it, or remove the row")
    better, worse = (_messages(side) for side in (better, worse))
    if isinstance(better, str) != isinstance(worse, str):
        raise ValueError(f"{names[0]} and {names[1]} must both be text, or both lists of messages; fix them")
    if isinstance(better, list) and (asked is None or _begins(better)):
        if better[:-1] != worse[:-1]:
            raise ValueError(f"{names[0]} and {names[1]} differ before their last answers; remove the row")
        asked, better, worse = better[:-1], better[-1:], worse[-1:]
    if not asked:
        raise ValueError("has no prompt; name its column with data.columns (prompt: ...), or remove the row")
    if better == worse:
        raise ValueError(f"{names[0]} and {names[1]} are the same, so nothing can be learned; remove the row")
    return asked, (better, worse)


def _messages(side: Any) -> Any:
    """A transcript as messages; a single message as a list."""
    if isinstance(side, Mapping):
        return [side]
    if isinstance(side, str) and (turns := _TURN.split(side)) and len(turns) > 1 and not turns[0].strip():
        return [{"role": _ROLES[turns[i]], "content": turns[i + 1].strip()} for i in range(1, len(turns), 2)]
    return list(side) if isinstance(side, tuple) else side


def _begins(messages: Sequence[Any]) -> bool:
    """Whether they are a whole conversation, and not an answer alone."""
    first = messages[0] if messages else None
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else None
    return role in ("system", "user", "human", "developer") or len(messages) > 1


def _both(row: Row, asked: Any, sides: Sides, talks: bool, taken: set[str]) -> Row:
    beside = {name: value for name, value in row.fields.items() if name not in taken and name not in _TAKEN}
    better, worse = (_fields(asked, side, talks) | beside for side in sides)
    return replace(row, fields=better, rejected=worse)


def _fields(asked: Any, answer: Any, talks: bool) -> dict[str, Any]:
    if not talks and isinstance(answer, str):
        return {"prompt": asked, "completion": answer}
    before = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    return {"messages": [*before, *after]}


def pair_notes(records: Sequence[Record]) -> tuple[str, ...]:
    """How often the longer answer is the better one, and which of these pairs say the opposite of others."""
    pairs = [(record, record.rejected) for record in records if record.rejected is not None]
    if not pairs:
        return ()
    sizes = [(len(_answer(better)), len(_answer(worse))) for better, worse in pairs]
    longer, unequal = sum(one > two for one, two in sizes), sum(one != two for one, two in sizes)
    length = f"the longer answer is the better one in {longer:,} of {unequal:,} pairs of unequal length"
    if unequal >= 50 and not 0.25 <= longer / unequal <= 0.75:
        length += ": a model may learn length alone"
    said = {(_whole(better), _whole(worse)) for better, worse in pairs}
    against = [better.location for better, worse in pairs if (_whole(worse), _whole(better)) in said]
    if not against:
        return (length,)
    return length, f"{len(against):,} pairs say the opposite of another one: {', '.join(against[:5])}"


def _answer(record: Record) -> str:
    return str(record.messages[-1]["content"]) if record.messages else record.answer or ""


def _whole(record: Record) -> str:
    """Its prompt and its answer; a conversation's key holds both."""
    return record.key if record.messages else repr((record.key, record.answer))

"""Other parts of a prompt than the question (columns, system text, tools): what training had, and what a user gives.

A run records which of them every training row had, so that a question is not asked without them unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.data.formats import ANSWER, QUESTION
from finetune.data.rows import Record, Renderer
from finetune.errors import DataError, RecipeError
from finetune.text import harmless

Always = Mapping[str, str | None]  # part -> its text where all training rows have the same, else None

_NO_TEXT = ("history", "tools", "functions", "messages", "conversations")  # parts that are no single text


@dataclass(frozen=True)
class Beside:
    """What is given with a question."""

    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    tools: tuple[Any, ...] = ()


NOTHING = Beside()


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """name=text, as the command line has them. Raises RecipeError."""
    for one in given:
        if "=" not in one:
            raise RecipeError(f"--column {harmless(one)}: write NAME=TEXT, such as --column input=...")
    return dict(one.split("=", 1) for one in given)


def asked_part(renderer: Renderer, layout: str) -> str:
    """The part that takes the question: the format's own, or the first of the recipe's template."""
    names = [name for _, name in getattr(renderer, "pieces", ()) if name]
    part = QUESTION.get(layout, "")
    return part if part in names or not names else names[0]


def column_names(renderer: Renderer, layout: str) -> list[str]:
    """The texts beside the question and the system text that the renderer writes."""
    others = {asked_part(renderer, layout), ANSWER.get(layout), "system", *_NO_TEXT}
    return sorted(set(renderer.reads) - others) if QUESTION.get(layout) else []


def always_filled(renderer: Renderer | None, layout: str, records: Sequence[Record]) -> dict[str, str | None]:
    """What every record has beside its question, and its text where it is the same in all of them."""
    if renderer is None or not records or layout == "text":
        return {}
    names = column_names(renderer, layout)
    filled: dict[str, str | None] = dict(_texts(records[0], names))
    for record in records[1:]:
        texts = dict(_texts(record, names))
        filled = {name: text if text == texts[name] else None for name, text in filled.items() if name in texts}
    reads = {"system", "tools"} & set(renderer.reads) if QUESTION.get(layout) else {"system", "tools"}
    return {name: text for name, text in filled.items() if name in names or name in reads}


def _texts(record: Record, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    first = record.messages[0] if record.messages else {}
    system = record.system or (first["content"] if first.get("role") == "system" else "")
    yield from ((name, record.values[name]) for name in names if record.values.get(name, "").strip())
    if system.strip():
        yield "system", system
    if record.tools:
        yield "tools", json.dumps(record.tools, ensure_ascii=False)


def completed(given: Beside, always: Always) -> tuple[Beside, list[str]]:
    """`given` with what all training rows share, and the names of that.

    Raises DataError, which names what every training row had and nobody gives.
    """
    has = {*given.columns, *(["system"] if given.system is not None else []), *(["tools"] if given.tools else [])}
    shared = {name: text for name, text in always.items() if name not in has and text is not None}
    if missing := sorted(name for name in always if name not in has and name not in shared):
        options = {"system": "--system TEXT", "tools": "--tools FILE"}
        ways = ", ".join(options.get(name, f"--column {harmless(name)}=TEXT") for name in missing)
        raise DataError(
            f"every training row had {harmless(', '.join(missing))}, and this question has none; give {ways} "
            "(an empty TEXT asks without it)"
        )
    tools = tuple(json.loads(shared["tools"])) if "tools" in shared else given.tools
    columns = {**given.columns, **{name: text for name, text in shared.items() if name not in ("system", "tools")}}
    return replace(given, columns=columns, system=shared.get("system", given.system), tools=tools), sorted(shared)


def with_both_names(columns: Mapping[str, str], mapping: Mapping[str, str]) -> dict[str, str]:
    """The columns by standard name and by the file's own. mapping: standard name -> the file's column."""
    both = dict(columns)
    for standard, own in mapping.items():
        for name, other in ((standard, own), (own, standard)):
            if name in columns:
                both[other] = columns[name]
    return both


def refuse_unknown(given: Beside, renderer: Renderer, layout: str, mapping: Mapping[str, str]) -> None:
    """Raises RecipeError for what the run's prompts have no room for."""
    known = with_both_names(dict.fromkeys(column_names(renderer, layout), ""), mapping)
    if unknown := [name for name in given.columns if name not in known]:
        there = harmless(", ".join(sorted(known))) or "none beside the question"
        raise RecipeError(f"--column {harmless(unknown[0])}: not in the prompts of this run; there are {there}")
    conversation = not QUESTION.get(layout)
    if given.system and not conversation and "system" not in renderer.reads:
        raise RecipeError("--system: the prompts of this run have no system text")
    if given.tools and not conversation:
        raise RecipeError("--tools: the prompts of this run have no tools; only conversations have")

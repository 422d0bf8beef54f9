"""Recognises the format of the rows from their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.data.column_guess import headerless
from finetune.data.preference_files import refuse_preferences
from finetune.data.problems import BadSource
from finetune.data.rows import Problem, Row
from finetune.errors import RecipeError
from finetune.text import harmless

Format = Literal["classification", "prompt", "alpaca", "chat", "sharegpt", "text"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "alpaca": ("input", "system", "history"),
    "prompt": ("system", "history"),
    "chat": ("tools", "functions", "system"),
    "sharegpt": ("tools", "system", "history"),
}
COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "review", "content"),
    "label": ("category", "sentiment", "class"),
    "prompt": ("question", "input"),
    "completion": ("answer", "response", "output"),
    "input": ("context",),
    "output": ("response",),
    "system": ("system_prompt", "system_message"),
}
ANSWER = {"classification": "label", "prompt": "completion", "alpaca": "output"}
QUESTION = {"classification": "text", "prompt": "prompt", "alpaca": "instruction", "text": "text"}
STANDARD = tuple(dict.fromkeys(name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names))


@dataclass(frozen=True)
class Layout:
    """A format and which column of the file holds each of its parts."""

    name: Format
    columns: Mapping[str, str]  # standard name -> the file's column
    notes: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The parts that every row has. A chat may stand in two columns, as prompt and completion."""
        return REQUIRED["prompt" if self.name == "chat" and "messages" not in self.columns else self.name]


def recognise(
    rows: Sequence[Row],
    wanted: str = "auto",
    mapping: Mapping[str, str] | None = None,
    bad: Sequence[Problem] = (),
) -> Layout:
    """The format of the rows, from the columns of all of them.

    wanted: a format's name, or auto. mapping: standard name -> the file's column, as the recipe has it. bad: rows
    that could not be read, to be named beside these. Raises BadSource where no format, or more than one, fits;
    RecipeError for a mapping of unknown names.
    """
    mapping = mapping or {}
    columns = _columns(rows)
    _check_mapping(mapping, columns, rows[0].file)
    refuse_preferences(rows, columns, wanted, mapping, bad)
    tried = [name for name in REQUIRED if wanted in ("auto", name) or (wanted, name) == ("chat", "prompt")]
    layouts = {name: _resolve(name, columns, mapping) for name in tried}
    fitting = {name: found for name, found in layouts.items() if all(part in found for part in REQUIRED[name])}
    counts = {name: _fitting_rows(name, found, rows) for name, found in fitting.items()}
    chosen = _choose({name: count for name, count in counts.items() if count}, fitting)
    if "prompt" in chosen and _holds_messages(rows, fitting["prompt"]):
        parts = _resolve("chat", columns, mapping) | {part: fitting["prompt"][part] for part in REQUIRED["prompt"]}
        if wanted == "chat" or chosen == ["prompt"]:
            return Layout("chat", parts, ("rows are chat, in prompt and completion; the completion is learned",))
    chosen = [name for name in chosen if wanted in ("auto", name)]
    if not chosen:
        reason = headerless(rows) or _no_format(columns, wanted)
        raise BadSource(f"{rows[0].file}:1", reason, bad)
    if len(chosen) > 1:
        names = " and ".join(chosen)
        reason = f"the columns {harmless(', '.join(columns))} fit {names}; say which with data.format"
        raise BadSource(rows[0].location, reason, bad)
    name = chosen[0]
    return Layout(name, fitting[name], _renamed(name, fitting[name], mapping))


def question_layout(rows: Sequence[Row], name: Format, mapping: Mapping[str, str], bad: Sequence[Problem]) -> Layout:
    """The columns of rows to be answered, which need no answer; where they have one, its part names the column.

    name: the format of a run. mapping, bad: as for `recognise`. Raises BadSource where a part of the question is
    missing.
    """
    columns = _columns(rows)
    found = _resolve(name, columns, {part: own for part, own in mapping.items() if own in columns})
    if name == "chat" and "messages" not in found and "prompt" in columns:
        found["messages"] = "prompt"
    needed = [part for part in REQUIRED[name] if part not in (ANSWER.get(name), *found)]
    if needed:
        names = harmless(", ".join(mapping.get(part, part) for part in needed))
        there = harmless(", ".join(column[:40] for column in columns[:20]))
        reason = f"the run was trained on rows with {names}, and there is no such column ({there}); rename the one"
        raise BadSource(f"{rows[0].file}:1", f"{reason} that holds it", bad)
    return Layout(name, found)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.fields))


def _check_mapping(mapping: Mapping[str, str], columns: Sequence[str], file: str) -> None:
    for standard, own in mapping.items():
        if standard not in STANDARD:
            raise RecipeError(f"data.columns.{standard}: not a standard name; there are {', '.join(STANDARD)}")
        if own not in columns:
            raise RecipeError(
                f"data.columns.{standard}: {file} has no column {own}; it has {harmless(', '.join(columns))}"
            )


def _resolve(name: Format, columns: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Standard name -> column for every part of the format that was found without doubt."""
    taken = set(mapping.values())
    found: dict[str, str] = {}
    for part in (*REQUIRED[name], *OPTIONAL.get(name, ())):
        free = [column for column in columns if column not in taken]
        if part in mapping:
            found[part] = mapping[part]
        elif part in free:
            found[part] = part
        else:
            known = (part, *COMMON_NAMES.get(part, ()))
            alike = [column for column in free if column.strip().casefold() in known]
            if len(alike) == 1:
                found[part] = alike[0]
    return found


def _fitting_rows(name: Format, columns: Mapping[str, str], rows: Sequence[Row]) -> int:
    needed = [columns[part] for part in REQUIRED[name]]
    return sum(all(row.fields.get(column) is not None for column in needed) for row in rows)


def _holds_messages(rows: Sequence[Row], columns: Mapping[str, str]) -> bool:
    """Whether prompt and completion are lists of messages, as TRL has them."""
    return any(isinstance(row.fields.get(columns[part]), (list, tuple)) for row in rows for part in REQUIRED["prompt"])


def _choose(counts: Mapping[Format, int], layouts: Mapping[Format, Mapping[str, str]]) -> list[Format]:
    """The formats that fit best: by standard names before common ones, by most rows; text only when alone."""
    if not counts:
        return []
    pool: list[Format] = [name for name in counts if name != "text"] or ["text"]
    exact = [name for name in pool if all(layouts[name][part] == part for part in REQUIRED[name])]
    most = max(counts[name] for name in exact or pool)
    return [name for name in exact or pool if counts[name] == most]


def _renamed(name: Format, columns: Mapping[str, str], mapping: Mapping[str, str]) -> tuple[str, ...]:
    others = ((part, column) for part, column in columns.items() if column != part and part not in mapping)
    taken = [f"{harmless(column)} as {part}" for part, column in others]
    note = f"rows are {name}"
    return (f"{note}; took {', '.join(taken)}" if taken else note,)


def _no_format(columns: Sequence[str], wanted: str) -> str:
    shown = ", ".join(harmless(column[:40]) for column in columns[:20]) + (", ..." if len(columns) > 20 else "")
    needs = {name: "+".join(parts) for name, parts in REQUIRED.items() if wanted in ("auto", name)}
    listed = "; ".join(f"{name}: {parts}" for name, parts in needs.items())
    what = "fit no known format" if wanted == "auto" else f"do not fit data.format {wanted}"
    return (
        f"the columns ({shown}) {what} ({listed}); name the columns with data.columns "
        "(for example prompt: Question), and make sure a table's first line names its columns"
    )

"""Finds texts and flags of a row that are missing from its rendered prompt, and names them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from finetune.data.messages import THOUGHTS
from finetune.data.rows import Record, Rendered

Counts = Mapping[str, int]  # field -> rows

THINKING, TOOLS = "thoughts", "tools"
SHOWN = 12  # fields of a line
CHANCE = 8  # characters that hardly stand in a text by chance
_STRUCTURE = ("type", "function")  # key and value of OpenAI's form, which is ours


def lost_fields(record: Record, written: Sequence[Rendered], known: Collection[str]) -> list[str]:
    """The record's fields that stand in none of its texts: messages[].KEY, tools[].KEY..., or a column's name.

    known: the words of the chat template, among which are the fields that it reads.
    """
    lost = list(record.left_out)
    texts = [rendered.text for rendered in reversed(written)]  # the last holds most, of a conversation that is unrolled
    for message in record.messages:
        for key, value in message.items():
            if key == "role" or (key == "content" and value in texts[0]):
                continue
            if key == "weight":
                lost += [f"messages[].{key}"] * (message["role"] != "assistant")
            elif key == THOUGHTS[0]:
                lost += [THINKING] * (not _stands(value, texts))
            elif isinstance(value, (str, int, float)) and key != "content":
                lost += [f"messages[].{key}"] * (not _is_written(key, value, texts, known))
            else:
                lost += [name for name, found in _looked_for(value, f"messages[].{key}", texts) if not found]
    if record.tools:
        found = list(_looked_for(record.tools, "tools", texts))
        missing = [name for name, there in found if not there]
        lost += [TOOLS] if 2 * len(missing) > len(found) else missing
    return list(dict.fromkeys(lost))


def _is_written(key: str, value: str | float, texts: Sequence[str], known: Collection[str]) -> bool:
    """Whether a text holds a field of a message, and not something short that looks the same by chance."""
    named = key in known or any(f'"{key}"' in text for text in texts)
    if isinstance(value, bool):
        return named
    return (named or len(str(value)) >= CHANCE) and all(there for _, there in _looked_for(value, key, texts))


def _looked_for(value: Any, name: str, texts: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(name, whether it stands in a text) of every text, number and flag in it."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if (key, one) != _STRUCTURE:
                yield from _looked_for(one, f"{name}.{key}", texts)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _looked_for(one, f"{name}[]", texts)
    elif isinstance(value, str):
        yield name, _stands(value, texts)
    elif value is not None:
        yield name, any(form in text for form in (str(value), json.dumps(value)) for text in texts)


def _stands(value: str, texts: Sequence[str]) -> bool:
    """Templates strip a text, cut it into lines, or write it as JSON."""
    forms = (value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1])
    if any(form in text for form in forms for text in texts):
        return True
    lines = list(filter(None, map(str.strip, value.splitlines())))
    return len(lines) > 1 and any(all(line in text for line in lines) for text in texts)


def notes(counts: Counts, rows: int) -> Iterator[str]:
    """What a person should know of it; rows: of the split, as they were rendered."""
    if count := counts.get(THINKING):
        yield f"{_of(count, rows)}: the template writes no thoughts there, and the model learns to answer without them"
    if count := counts.get(TOOLS):
        yield f"{_of(count, rows)}: the template does not write the tools that are offered there"
    others = Counter({name: count for name, count in counts.items() if name not in (THINKING, TOOLS)})
    named = [name if count == rows else f"{name} ({count:,} rows)" for name, count in others.most_common(SHOWN)]
    if named:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        yield f"left out, since no part of the text holds it: {', '.join(named)}{more}"


def _of(count: int, rows: int) -> str:
    return "all rows" if count == rows else f"{count:,} of {rows:,} rows"

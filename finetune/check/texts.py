"""The words of a record, as people compare them."""

from __future__ import annotations

import re

from finetune.data.messages import THOUGHTS
from finetune.data.rows import Record, Renderer

_WORD = re.compile(r"\w+(?:'\w+)?")


def asked(record: Record) -> str:
    """What a model is given: without the answer, and without the system message that many rows share."""
    if not record.messages:
        return record.key.replace("\0", "\n")
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    return "\n".join(one["content"] for one in record.messages[:last] if one["role"] != "system")


def content(record: Record, labelled: bool) -> str:
    """The question and, unless it is a label, its answer."""
    if record.messages:
        return "\n".join(one["content"] for one in record.messages if one["role"] != "system")
    return asked(record) if labelled or record.answer is None else f"{asked(record)}\n{record.answer}"


def everything(record: Record) -> str:
    """All text that comes to the model's eyes, tool calls included."""
    if record.messages:
        keys = ("content", THOUGHTS[0], "tool_calls")
        return "\n".join(str(one[key]) for one in record.messages for key in keys if key in one)
    return "\n".join((*_before(record), content(record, labelled=False)))


def written(record: Record, renderer: Renderer) -> str:
    """All that is the row's own in its rendered text, whatever its columns and the template's placeholders."""
    if record.messages:
        return "\n".join(str(value) for one in (*record.messages, {"tools": record.tools}) for value in one.values())
    return "\n".join((everything(record), *renderer.parts(record).values()))


def _before(record: Record) -> list[str]:
    """The system text and the earlier turns beside a question."""
    return [text for text in (record.system, *(said for turn in record.history for said in turn)) if text]


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())

"""All texts of a record, for searches."""

from __future__ import annotations

from finetune.data.messages import THOUGHTS
from finetune.data.row_words import content
from finetune.data.rows import Record, Renderer


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

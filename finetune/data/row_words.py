"""A record's words in normalised form: equal words make equal rows."""

from __future__ import annotations

import hashlib
import re

from finetune.data.rows import Record

_WORD = re.compile(r"\w+(?:'\w+)?")


def asked(record: Record) -> str:
    """What a model is given: without the answer, and without the system message that many rows share."""
    if not record.messages:
        return record.key.replace("\0", "\n")
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    before = record.messages[:last]
    said = "\n".join(one["content"] for one in before if one["role"] != "system")
    return said if said.strip() else "\n".join(one["content"] for one in before)


def content(record: Record, labelled: bool) -> str:
    """The question and, unless it is a label, its answer."""
    if record.messages:
        return "\n".join(one["content"] for one in record.messages if one["role"] != "system")
    return asked(record) if labelled or record.answer is None else f"{asked(record)}\n{record.answer}"


def question(record: Record, labelled: bool) -> str:
    """What may not stand on two sides of a split."""
    return content(record, labelled) if labelled else asked(record)


def digest(text: str) -> bytes:
    """The same for texts of the same words, whatever their case and white space. [16]"""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())

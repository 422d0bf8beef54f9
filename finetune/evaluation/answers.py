"""The part of an open answer that is compared: all, first line, last number, or JSON value."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from finetune.recipe.schema import AnswerPart

# A sign after a word or a figure is a dash; commas part groups of three figures.
NUMBER = re.compile(r"(?:(?<![\w.])[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\w))?")
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_MOST_FIGURES = 1000


def part_of(answer: str, compared: AnswerPart) -> str | None:
    """The part as text, the same for equal values (1,000.0 and 1000; keys in another order); None: there is none."""
    whole = answer.strip()
    if compared == "all":
        return whole
    if compared == "first_line":
        return whole.splitlines()[0].strip() if whole else None
    return _last_number(whole) if compared == "last_number" else _json_value(whole)


def _last_number(text: str) -> str | None:
    found = NUMBER.findall(text)
    return plain_number(found[-1]) if found else None


def plain_number(written: str) -> str | None:
    """What `NUMBER` finds, in one way of writing: 1,000.0 and 1000 are the same."""
    try:
        number = Decimal(written.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None
    if abs(number.adjusted()) > _MOST_FIGURES:
        return str(number)
    plain = format(number, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain.removeprefix("+")


def _json_value(text: str) -> str | None:
    """Of the whole answer, or of its one block between fences."""
    blocks = _FENCE.findall(text)
    try:
        value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse)
        return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _plain(value: Any) -> Any:
    """With whole numbers written in one way."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value

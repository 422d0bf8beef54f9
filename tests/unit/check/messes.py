"""Damaged lines of JSON Lines: thirty ways in which real files go wrong, each of which ruins the row."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]


def good_row(draw: random.Random) -> dict[str, Any]:
    words = ["plain", "é\u2028film", 'a "quoted" word', "line\nbreak", "{brace", "tab\t", "comma,", "漢字", "end"]
    said = [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(2)]
    return {"messages": [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]}


def line_of(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _text(change: Callable[[str], str]) -> Damage:
    return lambda line, draw: change(line.decode()).encode()


def _row(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda line, draw: line_of(change(json.loads(line)))


def _turn(number: int, **changed: Any) -> Damage:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        turns = list(row["messages"])
        turns[number] = {key: value for key, value in (turns[number] | changed).items() if value is not ...}
        return {"messages": turns}

    return _row(change)


def _turns(change: Callable[[list[Any]], Any]) -> Damage:
    return _row(lambda row: {"messages": change(row["messages"])})


def _cut(line: bytes, draw: random.Random) -> bytes:
    return line[: draw.randrange(1, len(line))]


def _inserted(byte: bytes) -> Damage:
    """Into the first message's content."""

    def damage(line: bytes, draw: random.Random) -> bytes:
        at = line.index(b'"content": "') + len(b'"content": "')
        return line[:at] + byte + line[at:]

    return damage


DAMAGES: dict[str, Damage] = {
    "cut short": _cut,
    "comma at the end": lambda line, draw: line + b",",
    "brace missing": lambda line, draw: line[:-1],
    "brace doubled": lambda line, draw: line + b"}",
    "bracket missing": _text(lambda text: text.replace("]", "", 1)),
    "opening bracket": lambda line, draw: b"[" + line,
    "two rows on a line": lambda line, draw: line + b" " + line,
    "Python's quotes": _text(lambda text: repr(json.loads(text))),
    "comment": lambda line, draw: b"// " + line,
    "text": lambda line, draw: b"and so on",
    "single value": lambda line, draw: draw.choice([b"null", b"true", b"1", b'"x"', b"NaN", b"1" * 5000]),
    "array of the row": lambda line, draw: b"[" + line + b"]",
    "quote not escaped": _inserted(b'"'),
    "escape that is none": _inserted(b"\\q"),
    "tab in a string": _inserted(b"\t"),
    "NUL": _inserted(b"\x00"),
    "NUL escaped": _inserted(b"\\u0000"),
    "escape sequence": _inserted(b"\\u001b[31m"),
    "half a character": _inserted(b"\\ud83d"),
    "Latin-1": _inserted(b"caf\xe9 "),
    "broken UTF-8": _inserted(b"\xe2\x82"),
    "key twice": _text(lambda text: '{"messages": [], ' + text[1:]),
    "column missing": _row(lambda row: {"text": "other"}),
    "column null": _row(lambda row: {"messages": None}),
    "no turns": _turns(lambda turns: []),
    "turns no list": _turns(lambda turns: {"user": "a"}),
    "turn no object": _turns(lambda turns: [*turns, "a"]),
    "answer missing": _turns(lambda turns: turns[:1]),
    "roles doubled": _turns(lambda turns: [turns[0], *turns]),
    "answer first": _turns(lambda turns: turns[::-1]),
    "role unknown": _turn(1, role="narrator"),
    "role missing": _turn(0, role=...),
    "role no text": _turn(0, role=["user"]),
    "content empty": _turn(1, content="  "),
    "content null": _turn(0, content=None),
    "content number": _turn(1, content=3.5),
    "content object": _turn(0, content={"a": 1}),
    "picture": _turn(0, content=[{"type": "image_url", "image_url": "x"}]),
    "weight a half": _turn(1, weight=0.5),
    "nested deeply": lambda line, draw: b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}

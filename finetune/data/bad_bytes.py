"""Rows with bytes that are invalid in their file's encoding, and a remedy tried on the whole file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from finetune.data.encoding import conversion
from finetune.data.rows import Problem, Row
from finetune.text import shorten

_BAD = re.compile("[\udc80-\udcff]")  # how `finetune.data.encoding.decode` keeps them
_WIDE = re.compile("[^\x00-\x7f\udc80-\udcff]")  # characters that UTF-8 wrote in several bytes
_ONE_IN = 20  # characters of UTF-8 by chance, in a file of another encoding, for so many bytes that are none


class _Encoding(NamedTuple):
    """An encoding that files are met in, and what its text looks like."""

    name: str  # Python's and iconv's
    usual: re.Pattern[str]  # nine in ten of its characters beyond ASCII
    needed: re.Pattern[str]  # that share of them
    share: float


_CYRILLIC = "[\u0410-\u044f\u0401\u0451]"
_WESTERN, _WIDTHS = "[à-öø-ÿßœžšÀ-ÖØ-ÞŒŽŠŸ]", "\u3000-\u303f\uff00-\uffef"  # _WIDTHS: marks as wide as the letters
_MARKS = "[\u2018\u2019\u201c\u201d\u201e\u2013\u2014\u2026\xa0•€£§°©®«»¿¡½¼·\xd7àéèúôöäüÄÖÜÉÀ]"
_COMMON = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能很好没还都去看"  # of Chinese
_EASTERN = (
    _Encoding("shift_jis", re.compile(f"[\u3040-\u30ff\u4e00-\u9fff{_WIDTHS}]"), re.compile("[\u3041-\u30fa]"), 0.3),
    _Encoding("euc_kr", re.compile(f"[\uac00-\ud7a3{_WIDTHS}]"), re.compile("[\uac00-\ud7a3]"), 0.3),
    _Encoding("gb2312", re.compile(f"[\u4e00-\u9fff{_WIDTHS}]"), re.compile(f"[{_COMMON}]"), 0.1),
)
_SINGLE = (  # a byte for each character
    # Letters beside others of their alphabet. In words of Western languages they would stand alone.
    _Encoding(
        "cp1251",
        re.compile(f"(?<={_CYRILLIC}){_CYRILLIC}|{_CYRILLIC}(?={_CYRILLIC})|{_MARKS}"),
        re.compile("[\u043e\u0430\u0438]"),
        0.2,
    ),
    # A letter beside one of ASCII, or a mark of a word processor: words of other alphabets have the first nowhere.
    _Encoding(
        "cp1252",
        re.compile(f"(?<=[a-zA-Z]){_WESTERN}|{_WESTERN}(?=[a-zA-Z])|{_MARKS}"),
        re.compile("."),
        0.0,
    ),
)


def without_bad_bytes(rows: list[Row], text: str, file: str, encoding: str | None) -> tuple[list[Row], list[Problem]]:
    """The rows that are text, and the others with their first bad byte. text: the file, as `decode` reads it.

    encoding: as the recipe names it; UTF-8 without one. The first problem says what to do.
    """
    if text.isascii() or not _BAD.search(text):
        return rows, []
    whole: list[Row] = []
    bad: list[Problem] = []
    for row in rows:
        byte = next((found for piece in _texts(row.fields) if (found := _BAD.search(piece))), None)
        if byte is None:
            whole.append(row)
        else:
            bad.append((row.location, _reason(ord(byte[0]) - 0xDC00, encoding or "UTF-8")))
    if not bad:  # they stand in what is no row
        first = _BAD.search(text)
        assert first is not None
        line = text.count("\n", 0, first.start()) + 1
        bad.append((f"{file}:{line}", _reason(ord(first[0]) - 0xDC00, encoding or "UTF-8")))
    location, reason = bad[0]
    bad[0] = location, f"{reason}; {_remedy(text, file, len(bad)) if encoding is None else _OTHER}"
    return whole, bad


_OTHER = "correct it, name the file's own encoding with data.encoding, or leave the row out with data.on_error: skip"


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += (*value, *value.values())
        elif isinstance(value, list):
            left += value


def _reason(byte: int, encoding: str) -> str:
    """With the character that the byte is in Windows-1252, the superset of Latin-1 that files really hold."""
    char = bytes([byte]).decode("cp1252", "replace")
    meant = "" if char == "\ufffd" or encoding != "UTF-8" else f" (in Latin-1 or Windows-1252 it is {char})"
    return f"byte 0x{byte:02x} is not {encoding}{meant}"


def _remedy(text: str, file: str, rows: int) -> str:
    bad, wide = sum(1 for _ in _BAD.finditer(text)), sum(1 for _ in _WIDE.finditer(text))
    raw = text.encode("utf-8", "surrogateescape")
    mixed = _ONE_IN * wide > bad  # in the encodings of the East so many letters are UTF-8 by chance
    name = _encoding_of(raw, _EASTERN if mixed else (*_EASTERN, *_SINGLE))
    if mixed and name is None:
        those = "this byte" if bad == 1 else f"the {bad:,} bytes of {rows:,} row{'s' * (rows > 1)} that are not"
        remedy = f"{wide:,} characters of the file are UTF-8, and converting it would spoil them: correct {those}"
        return f"{remedy}, or leave such rows out with data.on_error: skip"
    if name is None:
        return "save the file as UTF-8, or name its encoding with data.encoding (such as cp1250)"
    word = re.search(r"\w*[^\x00-\x7f]+\w*", raw.decode(name))
    piece = f" ({shorten(word[0], 20)})" if word else ""
    return f"all of the file reads as {name}{piece}: set data.encoding: {name}, or {conversion(file, name.upper())}"


def _encoding_of(raw: bytes, encodings: Iterable[_Encoding]) -> str | None:
    """The first in which the whole file is text of the kind that people write in it."""
    for name, usual, needed, share in encodings:
        with suppress(UnicodeDecodeError):
            beyond = "".join(re.findall(r"[a-zA-Z]?[^\x00-\x7f]+[a-zA-Z]?", raw.decode(name)))
            count = len(_WIDE.findall(beyond))
            if len(usual.findall(beyond)) >= 0.9 * count and len(needed.findall(beyond)) >= share * count:
                return name
    return None

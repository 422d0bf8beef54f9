"""Decodes text files, and reports what is unusual about their bytes."""

from __future__ import annotations

import codecs
import re
from pathlib import PurePath

from finetune.data.problems import BadSource
from finetune.text import command_line

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UNFIT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
_MARKS = re.compile("^\ufeff+", re.MULTILINE)


def decode(raw: bytes, file: str, encoding: str | None = None) -> str:
    """The text without its byte order mark; invalid bytes are kept as lone surrogates, U+DC00 plus the byte.

    encoding: UTF-8 without one. Raises BadSource for UTF-16 that is not named, and for a file that is not `encoding`.
    """
    if encoding is not None:
        try:
            return raw.decode(encoding, "surrogateescape").removeprefix("\ufeff")
        except UnicodeError as error:
            raise BadSource(f"{file}:1", f"the file is not {encoding} ({error}); correct data.encoding") from None
    if raw.startswith(_UTF16) or (b"\x00" in raw[:64] and raw[:64].count(b"\x00") * 3 >= len(raw[:64])):
        name = "UTF-16" + ("" if raw.startswith(_UTF16) else "BE" if raw[0] == 0 else "LE")
        remedy = f"save it as UTF-8: {conversion(file, name)}, or set data.encoding: {name.lower()}"
        raise BadSource(f"{file}:1", f"the file is UTF-16; {remedy}")
    return raw.decode("utf-8-sig", "surrogateescape")


def conversion(file: str, encoding: str) -> str:
    """The command that writes the file anew as UTF-8, beside itself."""
    path = PurePath(file)
    to = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f"{command_line('iconv', '-f', encoding, '-t', 'UTF-8', file)} > {command_line(str(to))}"


def without_marks(text: str) -> tuple[str, list[str]]:
    """The text without byte order marks at the start of lines, where files were put together; and a note."""
    if "\ufeff" not in text:
        return text, []
    text, count = _MARKS.subn("", text)
    return text, [f"{count} byte order marks (U+FEFF) taken off the start of lines"] if count else []


def unusual(raw: bytes) -> list[str]:
    """What a person should know of the encoding and the line ends."""
    notes = []
    if raw.startswith(codecs.BOM_UTF8):
        notes.append("UTF-8 with a byte order mark")
    lines, crlf = raw.count(b"\n"), raw.count(b"\r\n")
    if crlf:
        notes.append("CRLF line ends" if crlf == lines else f"mixed line ends ({crlf} CRLF, {lines - crlf} LF)")
    return notes


def check_text(text: str, what: str) -> None:
    """Raises ValueError for text that no tokenizer should see: half characters, control characters but white space."""
    match = _UNFIT.search(text)
    if match is None:
        return
    char, at = ord(match[0]), match.start() + 1
    if char >= 0xD800:
        raise ValueError(f"{what} holds half a character (a lone surrogate, character {at}); remove it")
    raise ValueError(f"{what} holds the control character U+{char:04X} (character {at}); remove it")

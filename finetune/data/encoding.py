"""Bytes of a text file to text, with what is unusual about them."""

from __future__ import annotations

import codecs
import re
import shlex
from pathlib import PurePath

from finetune.data.problems import BadSource

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UNFIT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
_MARKS = re.compile("^\ufeff+", re.MULTILINE)
_ESCAPED = 0xDC00  # a byte that is not UTF-8 is held as this plus the byte, a lone surrogate


def decode(raw: bytes, file: str) -> str:
    """UTF-8 text without its byte order mark; invalid bytes are kept as lone surrogates.

    Raises BadSource for UTF-16.
    """
    if raw.startswith(_UTF16) or (b"\x00" in raw[:64] and raw[:64].count(b"\x00") * 3 >= len(raw[:64])):
        marked = "" if raw.startswith(_UTF16) else "BE" if raw[0] == 0 else "LE"
        raise BadSource(f"{file}:1", f"the file is UTF-16; save it as UTF-8: {_convert(file, f'UTF-16{marked}')}")
    return raw.decode("utf-8-sig", "surrogateescape")


def without_marks(text: str) -> tuple[str, list[str]]:
    """The text without byte order marks at the start of lines, where files were put together; and a note."""
    if "\ufeff" not in text:
        return text, []
    text, count = _MARKS.subn("", text)
    return text, [f"{count} byte order marks (U+FEFF) taken off the start of lines"] if count else []


def _convert(file: str, encoding: str) -> str:
    """The command that writes the file anew, beside itself."""
    path = PurePath(file)
    to = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(file)} > {shlex.quote(str(to))}"


def bad_byte(text: str, file: str) -> str | None:
    """What is wrong with the first byte that was not UTF-8; None where all were. Only for text from `decode`."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - _ESCAPED
        return (
            f"byte 0x{byte:02x} is not UTF-8{_meant(byte)}; "
            f"save the file as UTF-8; if all of it is Latin-1 or Windows-1252: {_convert(file, 'CP1252')}"
        )
    return None


def _meant(byte: int) -> str:
    """The character that the byte is in Windows-1252, the superset of Latin-1 that files really hold."""
    char = bytes([byte]).decode("cp1252", "replace")
    return "" if char == "\ufffd" else f" (in Latin-1 or Windows-1252 it is {char})"


def refuse_bad_bytes(text: str, file: str) -> None:
    """Raises BadSource at the first byte that is not UTF-8, in files whose rows are not lines."""
    if bad_byte(text, file) is None:
        return
    for number, line in enumerate(text.split("\n"), 1):
        if reason := bad_byte(line, file):
            raise BadSource(f"{file}:{number}", reason)


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

"""Personal data and secrets that people did not mean to train on; shown masked, never whole."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

SHOWN = 1000  # findings kept of each kind; the count is of all
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}(?![\w-]|\.\d)|\+\d{9,14}\b"
)
_DATE = re.compile(r"\d{1,4}[ .-]\d{1,2}[ .-]\d{1,4}")
_CARD = re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){12,18}(?![\w-])")
_KEY = re.compile(
    r"\b(?:sk-(?:proj-|ant-)?[\w-]{20,}|gh[pousr]_\w{30,}|github_pat_\w{22,}|hf_\w{20,}|glpat-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
)
_ASSIGNED = re.compile(r"""(?i)(?:password|passwd|secret|token|api[_-]?key)["']?\s*[:=]\s*["']?([^\s"',;]{12,})""")
_ENTROPY = 3.2  # bits a character from which an assigned value looks drawn at random


@dataclass
class Finding:
    """One kind of personal data."""

    count: int = 0
    rows: int = 0
    shown: list[tuple[str, str]] = field(default_factory=list)  # (location, masked)


@dataclass
class Personal:
    kinds: dict[str, Finding] = field(default_factory=dict)
    locations: set[str] = field(default_factory=set)

    def look(self, text: str, location: str) -> None:
        seen: set[str] = set()
        for kind, value in personal_data(text):
            finding = self.kinds.setdefault(kind, Finding())
            finding.count += 1
            finding.rows += kind not in seen
            seen.add(kind)
            if len(finding.shown) < SHOWN:
                finding.shown.append((location, masked(value)))
        if seen:
            self.locations.add(location)


def personal_data(text: str) -> Iterator[tuple[str, str]]:
    """(kind, value) of everything that looks like it."""
    if "@" in text:
        yield from (("e-mail address", found[0]) for found in _EMAIL.finditer(text))
    if _DIGITS.search(text):
        cards = [found for found in _CARD.finditer(text) if luhn(found[0])]
        yield from (("card number", found[0]) for found in cards)
        yield from (("phone number", found) for found in _phones(_without(text, cards)))
    yield from (("key or token", found[0]) for found in _KEY.finditer(text))
    for found in _ASSIGNED.finditer(text):
        if entropy(found[1]) > _ENTROPY and any(map(str.isdigit, found[1])) and not _KEY.search(found[1]):
            yield "key or token", found[1]


_DIGITS = re.compile(r"\d\d[ .)-]?\d\d|\d{4}|\(\d\d")


def _without(text: str, matches: list[re.Match[str]]) -> str:
    for match in reversed(matches):
        text = text[: match.start()] + " " + text[match.end() :]
    return text


def _phones(text: str) -> Iterator[str]:
    """Groups of 8 to 15 digits (E.164 allows 15) that are no date."""
    for found in _PHONE.finditer(text):
        digits = sum(map(str.isdigit, found[0]))
        if 8 <= digits <= 15 and not _DATE.fullmatch(found[0]):
            yield found[0]


def luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1); a run of one digit is none."""
    digits = [int(char) for char in number if char.isdigit()]
    doubled = (digit * 2 - 9 * (digit > 4) if i % 2 else digit for i, digit in enumerate(reversed(digits)))
    return digits[0] in (2, 3, 4, 5, 6) and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def entropy(text: str) -> float:
    """Shannon's, in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def masked(value: str) -> str:
    """The first character and the length: enough to find it, too little to use it."""
    return f"{value[0]}*** ({len(value)} characters)"

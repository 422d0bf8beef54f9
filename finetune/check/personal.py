"""Personal data and secrets in the rows; shown masked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.check.phones import phone_numbers
from finetune.text import secrets_in

SHOWN = 1000  # findings kept of each kind; the count is of all
# The lengths are bounded (64 before the @, RFC 5321), so that a long run of letters is not looked at anew from each.
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_CARD = re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){12,18}(?![\w-])")
_ASSIGNED = re.compile(r"""(?i)(?:password|passwd|secret|token|api[_-]?key)["']?\s*[:=]\s*["']?([^\s"',;]{12,})""")
_NAMES = ("password", "passwd", "secret", "token", "api")  # of which `_ASSIGNED` needs one
_ENTROPY = 3.2  # bits per character from which an assigned value looks drawn at random


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
        yield from (("e-mail address", match[0]) for match in _EMAIL.finditer(text))
    if _DIGITS.search(text):
        cards = [match for match in _CARD.finditer(text) if luhn(match[0])]
        yield from (("card number", match[0]) for match in cards)
        yield from (("phone number", number) for number in phone_numbers(_without(text, cards)))
    yield from (("key or token", secret) for secret in secrets_in(text))
    lowered = text.casefold()
    if any(name in lowered for name in _NAMES):
        for match in _ASSIGNED.finditer(text):
            value = match[1]
            if entropy(value) > _ENTROPY and any(map(str.isdigit, value)) and not secrets_in(value):
                yield "key or token", value


_DIGITS = re.compile(r"\d\d[ .)-]?\d\d|\d{4}|\(\d\d")


def _without(text: str, matches: list[re.Match[str]]) -> str:
    for match in reversed(matches):
        text = text[: match.start()] + " " + text[match.end() :]
    return text


def luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1); a run of one digit is not a card."""
    digits = [int(char) for char in number if char.isdigit()]
    doubled = (digit * 2 - 9 * (digit > 4) if i % 2 else digit for i, digit in enumerate(reversed(digits)))
    return digits[0] in (2, 3, 4, 5, 6) and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def entropy(text: str) -> float:
    """Shannon's, in bits per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def masked(value: str) -> str:
    """The first character and the length: enough to find it, too little to use it."""
    return f"{value[0]}*** ({len(value)} characters)"

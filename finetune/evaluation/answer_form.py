"""Errors visible in an open answer's form: too long, repetitive, invalid JSON, empty."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter

from finetune.evaluation.answers import part_of

LONGER, BEYOND = 2.0, 60  # an answer is long beyond so many times the expected one, and so many characters more
GRAM = 4  # words
LOOPED = 0.2  # the share of 4-grams that stand there again, from which an answer repeats itself
OFTEN = 0.1  # the same where a phrase of 5 words stands there three times
AGAIN = 3  # times that a loop goes round; of one of at least 5 words twice is enough
PHRASE = 5  # words
LONGEST_LOOP = 60  # words; a longer one is seen by its 4-grams
COMPRESSED = 0.35  # of their bytes is what loops of letters come to; plain English of any length keeps above
FEWEST_BYTES = 120

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def without_code(text: str) -> str:
    """What is written between backquotes is left out."""
    return _FENCED.sub(" ", text)


def is_empty(answer: str) -> bool:
    """Nothing that could be read: white space, or marks alone."""
    return not any(char.isalnum() or (char.isprintable() and not char.isspace()) for char in answer)


def is_long(answer: str, expected: str) -> bool:
    """Far longer than the expected one. An answer that goes round in loops is of that kind, and not of this one."""
    return len(answer) > max(LONGER * len(expected), len(expected) + BEYOND) and not repeats(answer, expected)


def repeats(answer: str, expected: str = "") -> bool:
    """Whether it goes round in loops, and more than the expected answer does."""
    share = repeated(answer)
    said = words(answer)
    phrases = Counter(zip(*(said[i:] for i in range(PHRASE)), strict=False))
    often = max(phrases.values(), default=0) >= AGAIN and share >= OFTEN
    looped = often or share >= LOOPED or loops(said) or _compresses(answer)
    return looped and not (expected and (repeated(expected) >= share / 2 > 0 or loops(words(expected))))


def repeated(text: str) -> float:
    """The share of its 4-grams that have stood there before; 0 where fewer than two of them come again."""
    said = words(text)
    grams = Counter(tuple(said[i : i + GRAM]) for i in range(len(said) - GRAM + 1))
    again = grams.total() - len(grams)
    return again / grams.total() if again >= 2 else 0.0


def loops(said: list[str]) -> bool:
    """Whether a word or a phrase follows upon itself: three times, or twice where it has 5 words or more."""
    for period in range(1, min(len(said) // 2, LONGEST_LOOP) + 1):
        needed = period if period >= PHRASE else period * (AGAIN - 1) + (period == 1)  # "no, no, no" is no loop
        run = 0
        for one, other in zip(said, said[period:], strict=False):
            run = run + 1 if one == other else 0
            if run >= needed:
                return True
    return False


def _compresses(text: str) -> bool:
    """Loops of letters, which have no words."""
    data = text.encode(errors="replace")
    return len(data) >= FEWEST_BYTES and len(zlib.compress(data, 9)) < COMPRESSED * len(data)


def lacks_format(answer: str, expected: str) -> bool:
    """JSON is expected, an object or a list, and the answer is none."""
    return _is_json(expected) and not _is_json(answer)


def _is_json(text: str) -> bool:
    value = part_of(text, "json")
    return value is not None and isinstance(json.loads(value), dict | list)

"""Word-level differences between answers, and texts shortened for a page."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

LONGEST = 480  # characters of a text on the page
_MOST_WORDS = 200  # of each answer; with more, all of both is marked
_PIECE = re.compile(r"\S+\s*|\s+")
Pieces = list[tuple[str, bool]]


def changed_words(before: str, after: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, each with whether the other text lacks it there. Together the pieces are the text."""
    old, new = _PIECE.findall(before), _PIECE.findall(after)
    if max(len(old), len(new)) > _MOST_WORDS:
        same = before == after
        return [(before, not same)], [(after, not same)]
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    left: Pieces = []
    right: Pieces = []
    for kind, a, b, c, d in matcher.get_opcodes():
        left += [("".join(old[a:b]), kind != "equal")] * (b > a)
        right += [("".join(new[c:d]), kind != "equal")] * (d > c)
    return left, right


def cut(text: str, length: int = LONGEST) -> str:
    """The text; where it is longer, with its middle left out."""
    text = text.strip()
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"

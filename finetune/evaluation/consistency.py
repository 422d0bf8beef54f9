"""Consistency: the same question sampled again, and asked in other words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.evaluation.answer_form import words
from finetune.evaluation.hallucination import differ, figures, in_figures

TEMPERATURE = 0.7
SAMPLED = 2  # answers beside the greedy one, drawn at that temperature; and one to the question in other words
SHARED = 0.25  # of the shorter answer's words must stand in the other, or they tell different things
_STOP = frozenset(
    words(
        "a an the is are was were be been it its this that these those of to in on at for and or with by as from has "
        "have had i you he she we they my your his her their our do does did so there here will would can could should "
        "which who what when where also just very"
    )
)
_NO = frozenset(words("no not cannot false incorrect wrong"))
_YES = frozenset(words("yes true correct right indeed"))
_SHORT_FORMS = (
    ("what's", "what is"), ("who's", "who is"), ("where's", "where is"), ("how's", "how is"), ("it's", "it is"),
    ("i'm", "i am"), ("don't", "do not"), ("doesn't", "does not"), ("can't", "cannot"), ("isn't", "is not"),
    ("aren't", "are not"), ("won't", "will not"), ("i've", "i have"), ("you're", "you are"), ("that's", "that is"),
)  # fmt: skip


def inconsistent(answers: Sequence[str]) -> bool:
    """Whether any of the answers to one question tells something else than the first."""
    first, *others = answers
    return any(disagree(first, other) for other in others)


def disagree(first: str, second: str) -> bool:
    """Other numbers, yes for no, or hardly a word in common. An answer in other words agrees."""
    a, b = _content(first), _content(second)
    if words(first) == words(second):
        return False
    if not a or not b or differ(figures(first), figures(second)):
        return True
    if _denies(first) != _denies(second) or _affirms(first, second):
        return True
    shared = len(a & b) / min(len(a), len(b))
    return shared < SHARED or (shared < 1 and min(len(a), len(b)) == 1)


def _content(text: str) -> set[str]:
    """Its words without those that all texts have, each without its ending."""
    said = [in_figures(word) for word in words(text)]
    return {_stem(word) for word in said if word not in _STOP} or set(said)


def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "ly", "'s", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word


def _denies(text: str) -> bool:
    said = words(text.replace("\u2019", "'"))
    return any(word in _NO or word.endswith("n't") for word in said)


def _affirms(answer: str, other: str) -> bool:
    """One begins with a yes, and the other with a no."""
    first, second = ((words(text) or [""])[0] for text in (answer, other))
    return (first in _YES and second in _NO) or (first in _NO and second in _YES)


def in_other_words(text: str) -> str:
    """The same question, harmlessly changed: short forms written out, or its last mark gone or added."""
    for short, full in _SHORT_FORMS:
        pattern = re.compile(rf"\b{short}\b".replace("'", "['\u2019]"), re.IGNORECASE)
        if found := pattern.search(text):
            full = full.capitalize() if found[0][0].isupper() else full
            return f"{text[: found.start()]}{full}{text[found.end() :]}"
    end = text.rstrip()
    return end[:-1] if end.endswith(("?", ".", "!")) else f"{end}."

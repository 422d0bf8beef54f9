"""Names and numbers of an answer that are not in its prompt, its reference or the training rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from finetune.evaluation.answer_form import without_code, words
from finetune.evaluation.answers import NUMBER, plain_number
from finetune.evaluation.spelling import Speller, begins_sentence

COMMON = 3000  # times that a list has seen a word which is hardly a name, where it stands alone
FREQUENT = 8000  # and wherever it stands: Earth, English
SHORT = 4  # words of an answer that may be a name and nothing else
_NAME = re.compile(r"\b[^\W\d_][\w]*(?:['\u2019-]\w+)*")
_PLACE = re.compile(r"^\s*(?:\d+[.)]|step \d+:?)\s", re.IGNORECASE | re.MULTILINE)  # of a list
_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
_IN_WORDS = {word: str(number) for number, word in enumerate(words(_TO_TWENTY))} | {
    word: str(10 * number) for number, word in enumerate(words(_TENS), 3)
}


@dataclass(frozen=True)
class Known:
    """What the data have: words in small letters, and numbers in one way of writing."""

    words: frozenset[str]
    numbers: frozenset[str]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Known:
        said: set[str] = set()
        numbers: set[str] = set()
        for text in texts:
            said.update(_words(text))
            numbers.update(_numbers(text))
        numbers |= {_IN_WORDS[word] for word in said if word in _IN_WORDS}
        return cls(frozenset(said), frozenset(numbers))

    def __or__(self, other: Known) -> Known:
        return Known(self.words | other.words, self.numbers | other.numbers)


def invented(answer: str, expected: str, known: Known, of_row: Known, speller: Speller | None) -> list[str]:
    """The names and numbers of an answer that stand neither in the data nor in its own row.

    known: of the training rows; of_row: of this row's prompt and expected answer. A word that begins a sentence is a
    name only where no list has it, or where the expected answer is a name too.
    """
    text = _PLACE.sub(" ", without_code(answer))
    numbers = [number for number in _numbers(text) if number not in known.numbers and number not in of_row.numbers]
    names = [
        name
        for name in _names(text, expected, speller)
        if not (parts := _words(name)) or any(one not in known.words and one not in of_row.words for one in parts)
    ]
    return [*names, *numbers]


def _names(text: str, expected: str, speller: Speller | None) -> Iterator[str]:
    alone = _is_name(text, speller) and _is_name(expected, speller)
    titled = {line for line in text.splitlines() if line.istitle() and len(line.split()) > 2}
    for match in _NAME.finditer(text):
        name, start = match[0], match.start()
        if not name[0].isupper() or len(name) < 2 or name.startswith(("I'", "I\u2019")):
            continue
        small = name.casefold()
        listed = speller is not None and speller.knows(small)
        if speller is not None and speller.frequency(small) >= FREQUENT:
            continue
        shouted = name.isupper() or any(name in line for line in titled)
        if begins_sentence(text, start) and not alone:
            if speller is not None and not listed and not speller.is_misspelt(small):
                yield name
        elif not (listed and (shouted or (speller is not None and speller.language == "de"))):
            yield name


def _is_name(text: str, speller: Speller | None) -> bool:
    """A few words, all with a capital letter, and none of them a frequent word."""
    said = text.strip(" .!").split()
    return (
        0 < len(said) <= SHORT
        and all(word[0].isupper() and word[1:2].islower() for word in said)
        and (speller is None or all(speller.frequency(word.strip(",").casefold()) < COMMON for word in said))
    )


def _words(text: str) -> list[str]:
    """In small letters, without the ending of a possessive; the parts of a word with a hyphen each."""
    plain = text.casefold().replace("\u2019", "'")
    return [word.removesuffix("'s") for word in re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)]


def _numbers(text: str) -> list[str]:
    found = NUMBER.findall(text)
    return [number.lstrip("-") for number in map(plain_number, found) if number is not None]


def differ(first: Collection[str], second: Collection[str]) -> bool:
    """Whether both name something, and neither names all that the other does."""
    a, b = set(first), set(second)
    return bool(a and b) and not (a <= b or b <= a)


def in_figures(word: str) -> str:
    """eleven -> 11"""
    return _IN_WORDS.get(word, word)


def figures(text: str) -> list[str]:
    """Its numbers, in one way of writing."""
    return [*_numbers(text), *(_IN_WORDS[word] for word in _words(text) if word in _IN_WORDS)]

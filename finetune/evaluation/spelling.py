"""Misspelt words: absent from the language's word list and from the data, but close to a known word.

The lists are pyspellchecker's (MIT). English, German, French, Portuguese, Italian and Dutch are looked at; of any other
language nothing is said: the lists of Spanish and Russian lack too many of their forms.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import cache, cached_property
from typing import Any

from finetune.evaluation.answer_form import without_code

# Words that hardly any text of a language lacks, and few texts of the others have.
_FUNCTION_WORDS = {
    "en": "the and of to is that it for with was this are you not have what how from they",
    "de": "der die das und ist nicht ein eine zu den mit von auf für sich dem auch es wie",
    "fr": "le la les des est une et dans que pour pas sur qui vous je avec ce sont au",
    "es": "el los las que es una y por para con no se del su como más pero está lo",
    "pt": "o os que é uma e não para com do da em por mais um se como dos são",
    "it": "il che di è un una per non con della sono del gli si nel lo anche questo come",
    "nl": "de het een en van is niet dat op te zijn voor met er ik je maar ook aan",
}
_LAST_HALVES = ("set", "end", "log", "app", "net", "box", "pad", "top", "man", "day", "way", "cut")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_NOT_PROSE = re.compile(
    r"\w+://\S+|(?<!\w)(['\"\u2018\u201c\u00ab]).{1,80}?['\"\u2019\u201d\u00bb](?!\w)"
)  # quoted: foreign
_READ = 200_000  # characters, to know a language by
LISTED = ("en", "de", "fr", "pt", "it", "nl")  # languages whose lists are good enough
_SHARE = 0.1  # of the words that are function words of the language, at least
SHORTEST = 4  # letters of a word that is looked at
FEW = 4  # words of a text, all of which may be misspelt
FREQUENT = 50  # times that the list has seen a word which another may be meant for
COMMON = 1000  # the same for both halves of a compound (dataset, backend)
ALIKE = 0.85  # of difflib's ratio, between words of the same consonants
# British and American ways to write a word; the lists have the one or the other.
_VARIANTS = (
    ("our", "or"), ("is", "iz"), ("ys", "yz"), ("lled", "led"), ("lling", "ling"), ("ller", "ler"), ("tre", "ter"),
    ("ogue", "og"), ("ence", "ense"), ("aem", "em"), ("aed", "ed"), ("aest", "est"), ("foet", "fet"),
    ("programme", "program"),
    ("grey", "gray"),
)  # fmt: skip


def language_of(texts: Iterable[str]) -> str | None:
    """The language whose function words the texts have most of; None where none has enough."""
    counts: Counter[str] = Counter()
    read = 0
    for text in texts:
        said = [word.casefold() for word in _WORD.findall(text[:_READ])]
        read += len(text)
        counts.update(said)
        if read > _READ:
            break
    best = _most_like(counts)
    return best if best in LISTED else None


def _most_like(counts: Counter[str]) -> str | None:
    """The language of words that are counted, listed or not; None where hardly any is a function word of one."""
    seen = {name: sum(counts[word] for word in listed.split()) for name, listed in _FUNCTION_WORDS.items()}
    best = max(seen, key=lambda name: seen[name])
    return best if seen[best] and seen[best] >= _SHARE * counts.total() else None


@cache
def speller(language: str | None) -> Speller | None:
    return None if language is None else Speller(language)


class Speller:
    """The words of one language."""

    def __init__(self, language: str) -> None:
        from spellchecker import SpellChecker

        self.language = language
        self._library: Any = SpellChecker(language=language, distance=1)

    def frequency(self, word: str) -> int:
        """How often the list's own texts have it; 0: the list lacks it."""
        return int(self._library.word_frequency.dictionary.get(word.replace("\u2019", "'"), 0))

    def knows(self, word: str) -> bool:
        """word: in small letters."""
        word = word.removesuffix("'s").removesuffix("\u2019s")
        if self.frequency(word):
            return True
        parts = re.split(r"['\u2019-]", word)
        if len(parts) > 1:
            return all(self.knows(part) for part in parts if len(part) >= SHORTEST)
        return self._variant(word) or self._compound(word)

    def misspelt(self, text: str, *known: Collection[str]) -> list[str]:
        """The words of a text that are misspelt. known: words of the data, in small letters.

        Of a text in another language nothing is said: one with its function words, or of which the list lacks half.
        """
        if _most_like(Counter(word.casefold() for word in _WORD.findall(text))) not in (None, self.language):
            return []
        looked_at = _looked_at(_NOT_PROSE.sub(" ", without_code(text)))
        strange = [word for word in looked_at if not any(word in words for words in known) and not self.knows(word)]
        if 2 * len(strange) > len(looked_at) > FEW:
            return []
        return [word for word in strange if self.is_misspelt(word)]

    def is_misspelt(self, word: str) -> bool:
        """word: in small letters. A word that the list lacks and that is near none of it may be anything."""
        return not self.knows(word) and (self._near(word) or self._alike(word))

    def _near(self, word: str) -> bool:
        """One letter too many, too few, another or changed places."""
        return any(self.frequency(one) >= FREQUENT for one in self._library.candidates(word) or ())

    def _alike(self, word: str) -> bool:
        """The same consonants in the same order: restaraunt, tommorow."""
        others = self._by_consonants.get(_consonants(word), ())
        return any(difflib.SequenceMatcher(None, word, other).ratio() >= ALIKE for other in others)

    @cached_property
    def _by_consonants(self) -> dict[str, list[str]]:
        listed: dict[str, list[str]] = defaultdict(list)
        for word, count in self._library.word_frequency.dictionary.items():
            if count >= FREQUENT and len(word) >= 7:
                listed[_consonants(word)].append(word)
        return listed

    def _variant(self, word: str) -> bool:
        if self.language != "en":
            return False
        pairs = [pair for one in _VARIANTS for pair in (one, one[::-1])]
        return any(old in word and self.frequency(word.replace(old, new)) for old, new in pairs)

    def _compound(self, word: str) -> bool:
        halves = ((word[:at], word[at:]) for at in range(SHORTEST, len(word) - 2))
        return any(
            (len(other) >= SHORTEST or other in _LAST_HALVES)
            and min(self.frequency(one), self.frequency(other)) >= COMMON
            for one, other in halves
        )


def _consonants(word: str) -> str:
    letters = word[0] + re.sub("[aeiouyäöüáéíóúàèìòùâêîôû]", "", word[1:])
    return re.sub(r"(.)\1+", r"\1", letters)


def _looked_at(text: str) -> list[str]:
    """Words in small letters alone, or that begin a sentence; of addresses, names and figures none."""
    looked_at = []
    for match in _WORD.finditer(text):
        word, start, end = match[0], match.start(), match.end()
        if text[max(start - 1, 0) : start] in {*"@#/\\_.<$&0123456789"} or text[end : end + 1] in {
            *"@/\\_(=0123456789"
        }:
            continue  # of an address, code or a figure
        begins = word[1:].islower() and word[0].isupper() and begins_sentence(text, start) and len(word) > 5
        if len(word) >= SHORTEST and (word.islower() or begins):
            looked_at.append(word.casefold())
    return looked_at


def begins_sentence(text: str, start: int) -> bool:
    """Whether the word that starts there is the first of a sentence, a line or a quotation."""
    before = text[:start].rstrip(" \t\"'\u201c\u2018\u201e\u00ab([*_#>-\u2022")
    return not before or before[-1] in ".!?:;\n\u2026"

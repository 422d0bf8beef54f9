"""Special tokens written out in the rows' own words: a tokenizer reads them as special there too.

What a template writes around the words is not looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from finetune.data.tokenizer import Tokenizer, special_texts


@dataclass
class Specials:
    """Where they stand."""

    meant: bool  # the rows are plain text, which may hold them on purpose
    places: list[str] = field(default_factory=list)  # of rows, in order
    tokens: dict[str, int] = field(default_factory=dict)  # token -> rows

    def look(self, pattern: re.Pattern[str], text: str, place: str) -> None:
        if found := set(pattern.findall(text)):
            self.places.append(place)
            self.tokens |= {token: self.tokens.get(token, 0) + 1 for token in found}


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the special tokens that the tokenizer reads as such in a text; a longer one before its beginning."""
    known = [text for text in special_texts(tokenizer) if text and _is_read(tokenizer, text)]
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or "(?!)")


def _is_read(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.convert_tokens_to_ids(text) in tokenizer(text, add_special_tokens=False)["input_ids"]

"""What training sees of each row: every row checked, a few shown.

Special tokens that are written out in the rows' own words too: a tokenizer reads them as special there. What a
template writes around the words is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.loss_mask import Tokenised
from finetune.data.tokenizer import Tokenizer, begin_tokens, encode_prompts, special_texts, stop_tokens

REMEDIES = {
    "token that the model lacks": "give the model its own tokenizer; a vocabulary is never enlarged here",
    "no supervised token": "raise train.max_length, or mend prompt.completion and loss_on",
    "no end token": "the model would never learn to stop; set prompt.end_token: true, or raise train.max_length",
    "begin token doubled": "take the begin token out of the text or of the chat template",
    "prompt is not the beginning": "the model would be asked otherwise than it was trained; set prompt.template: plain",
}


@dataclass
class TokenCheck:
    """Faults of rows as they are trained on, kind -> places."""

    end_token: bool  # whether answers must end in a stop token
    rows: int = 0
    apart: int = 0  # rows whose prompt and answer were encoded one by one
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in REMEDIES})

    @property
    def total(self) -> int:
        return sum(map(len, self.faults.values()))

    def summary(self) -> Mapping[str, Any]:
        return {"rows_checked": self.rows, "encoded_apart": self.apart, "faults": self.faults}


class TokenChecker:
    """Looks at rows that fit, some at a time."""

    def __init__(self, tokenizer: Tokenizer, end_token: bool, vocabulary: int | None = None) -> None:
        """vocabulary: how many tokens the model knows, where that is known."""
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.stop = np.array(sorted(stop_tokens(tokenizer)), np.int64)
        self.begin = begin_tokens(tokenizer)
        self.found = TokenCheck(end_token)

    def look(self, rows: Sequence[Tokenised]) -> int:
        """Returns how many tokens of these rows are supervised."""
        apart = [row for row in rows if row.split]
        self.found.rows += len(rows)
        self.found.apart += len(apart)
        count = 0
        for row in rows:
            supervised = np.asarray(row.weights) > 0  # [n]
            count += int(supervised.sum())
            for kind in self._faults(row, supervised):
                self._note(kind, row)
        # For all others the tokeniser itself has compared the prompt's tokens with the whole's.
        prompts = encode_prompts(self.tokenizer, [row.rendered.prompt for row in apart])
        for row, prompt in zip(apart, prompts, strict=True):
            # An earlier answer that was encoded apart may be other tokens than in the prompt that is asked later.
            alone = len(row.rendered.supervised) == 1
            if alone and row.answer is not None and row.tokens[: row.answer[0]] != prompt:
                self._note("prompt is not the beginning", row)
        return count

    def _faults(self, row: Tokenised, supervised: NDArray[np.bool_]) -> list[str]:
        found = []
        ends = np.flatnonzero(supervised[:-1] & ~supervised[1:]).tolist()  # an answer's last token
        if supervised[-1]:
            ends.append(len(supervised) - 1)
        if not ends:
            found.append("no supervised token")
        elif self.found.end_token and not all(row.tokens[end] in self.stop for end in ends):
            found.append("no end token")
        if self.vocabulary is not None and max(row.tokens) >= self.vocabulary:
            found.append("token that the model lacks")
        twice = self.begin * 2
        if self.begin and row.tokens[: len(twice)] == twice:
            found.append("begin token doubled")
        return found

    def _note(self, kind: str, row: Tokenised) -> None:
        self.found.faults[kind].append(row.rendered.record.place)


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

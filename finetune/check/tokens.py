"""Tokens and supervised positions of each row: all are checked, a few are shown.

Special tokens that are written out in the rows' own words too: a tokenizer reads them as special there. What a
template writes around the words is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.examples import TOGETHER
from finetune.data.rows import Example, Prepared
from finetune.data.tokenizer import Tokenizer, begin_tokens, encode_prompts, special_texts
from finetune.events import Progress

REMEDIES = {
    "token that the model lacks": "give the model its own tokenizer; a vocabulary is never enlarged here",
    "no supervised token": "raise train.max_length, or fix prompt.completion and loss_on",
    "no end token": "the model would never learn to stop; set prompt.end_token: true, or raise train.max_length",
    "begin token doubled": "take the begin token out of the text or of the chat template",
    "prompt is not the beginning": "the model would be asked otherwise than it was trained; set prompt.template: plain",
}


@dataclass
class TokenCheck:
    """Faults of rows as they are trained on, kind -> locations."""

    end_token: bool  # whether answers must end in a stop token
    rows: int = 0
    apart: int = 0  # rows whose prompt and answer were encoded one by one
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in REMEDIES})

    @property
    def total(self) -> int:
        return sum(map(len, self.faults.values()))

    def summary(self) -> Mapping[str, Any]:
        return {"rows_checked": self.rows, "encoded_apart": self.apart, "faults": self.faults}


def check_tokens(
    prepared: Prepared, tokenizer: Tokenizer, end_token: bool, vocabulary: int | None
) -> Generator[Progress, None, TokenCheck]:
    """Every example of every split. vocabulary: how many tokens the model knows, where that is known."""
    checker = TokenChecker(tokenizer, prepared.stop_tokens, end_token, vocabulary)
    examples = [example for split in prepared.splits for example in split.examples]
    for start in range(0, len(examples), TOGETHER):
        checker.look(examples[start : start + TOGETHER])
        yield Progress(0, "data: checking tokens", min(start + TOGETHER, len(examples)), len(examples))
    return checker.result


class TokenChecker:
    """Looks at examples, some at a time."""

    def __init__(
        self, tokenizer: Tokenizer, stop: frozenset[int], end_token: bool, vocabulary: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.stop = np.array(sorted(stop), np.int64)
        self.begin = begin_tokens(tokenizer)
        self.result = TokenCheck(end_token)

    def look(self, examples: Sequence[Example]) -> None:
        """examples: at least one, each of at least one token."""
        apart = [example for example in examples if example.apart]
        self.result.rows += len(examples)
        self.result.apart += len(apart)
        self._look_at_tokens(examples)
        twice = self.begin * 2
        if twice:
            doubled = [one for one in examples if one.tokens[: len(twice)].tolist() == twice]
            self._note("begin token doubled", doubled)
        # For all others the tokeniser itself has compared the prompt's tokens with the whole's.
        prompts = encode_prompts(self.tokenizer, [example.prompt for example in apart])
        other = [one for one, prompt in zip(apart, prompts, strict=True) if _asks_otherwise(one, prompt)]
        self._note("prompt is not the beginning", other)

    def _look_at_tokens(self, examples: Sequence[Example]) -> None:
        """All rows one after the other. [n] is the number of their tokens, [b] that of the rows."""
        tokens = np.concatenate([example.tokens for example in examples])  # [n]
        supervised = np.concatenate([example.weights for example in examples]) > 0  # [n]
        starts = np.cumsum([0, *(len(example) for example in examples[:-1])])  # [b]
        following = np.append(supervised[1:], False)  # [n]
        following[starts[1:] - 1] = False
        ends = supervised & ~following  # [n] an answer's last token
        unended = np.zeros_like(ends)
        unended[ends] = ~np.isin(tokens[ends], self.stop)
        self._note("no supervised token", _chosen(examples, ~np.logical_or.reduceat(supervised, starts)))
        if self.result.end_token:
            without = _chosen(examples, np.logical_or.reduceat(unended, starts))
            # Plain text goes on in another row, or has been cut: that is no answer without an end.
            self._note("no end token", [one for one in without if one.prompt or not (one.piece or one.cut)])
        if self.vocabulary is not None:
            lacking = np.maximum.reduceat(tokens, starts) >= self.vocabulary
            self._note("token that the model lacks", _chosen(examples, lacking))

    def _note(self, kind: str, examples: Sequence[Example]) -> None:
        self.result.faults[kind] += [example.location for example in examples]


def _chosen(examples: Sequence[Example], which: NDArray[np.bool_]) -> list[Example]:
    return [examples[row] for row in np.flatnonzero(which).tolist()]


def _asks_otherwise(example: Example, prompt: list[int]) -> bool:
    """Whether a model would be asked with other tokens than it was trained on.

    An earlier answer that was encoded apart may be other tokens than in the prompt that is asked later, so only rows
    with one answer are looked at.
    """
    runs = np.count_nonzero(np.diff(example.weights, prepend=0) > 0)
    return runs == 1 and example.answer_start is not None and example.prompt_tokens.tolist() != prompt


@dataclass
class Specials:
    """Special tokens in the rows' own words."""

    meant: bool  # the rows are plain text, which may hold them on purpose
    locations: list[str] = field(default_factory=list)  # of rows, in order
    tokens: dict[str, int] = field(default_factory=dict)  # token -> rows

    def look(self, pattern: re.Pattern[str], text: str, location: str) -> None:
        if tokens := set(pattern.findall(text)):
            self.locations.append(location)
            self.tokens |= {token: self.tokens.get(token, 0) + 1 for token in tokens}


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the special tokens that the tokenizer reads as such in a text; a longer one before its beginning."""
    known = [text for text in special_texts(tokenizer) if text and _is_read(tokenizer, text)]
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or "(?!)")


def _is_read(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.convert_tokens_to_ids(text) in tokenizer(text, add_special_tokens=False)["input_ids"]

"""Answers to a few validation rows, shown during a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from backends.interface import OutOfMemory, Session
from finetune.data.rows import Example, Prepared
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.events import Progress, Sample, Samples

ROWS, TOKENS = 3, 24  # at most, of written answers
SHARE = 0.02  # of the time since the last ones that writing answers may take
WHAT = "sample answers"


@dataclass
class Sampler:
    """Takes the answers from a validation where it has them; else writes some, unless that takes too long.

    max_tokens: of a written answer; 0: the recipe wants none.
    """

    prepared: Prepared
    max_tokens: int
    decode: Callable[[Sequence[int]], str]

    def __post_init__(self) -> None:
        self._cost = 0.0  # seconds, of the last ones that were written
        self._last = 0.0  # when; seconds
        self._rows = _varied(self.prepared.valid.examples)

    def samples(self, session: Session, step: int, evaluation: Evaluation) -> Generator[Progress | Samples, None, None]:
        """Says them; nothing where there are none."""
        known = [evaluation.results[i] for i in self._rows]
        if not known:
            return
        if all(row.predicted is not None for row in known):
            yield Samples(step, tuple(map(_known, known)))
        elif self.max_tokens and self.prepared.task == "generation" and self._affordable():
            yield Progress(step, WHAT, 0, len(self._rows))
            began = time.monotonic()
            examples = [self.prepared.valid.examples[i] for i in self._rows]
            prompts = [example.prompt_tokens.tolist() for example in examples]
            try:
                written = session.generate(prompts, min(self.max_tokens, TOKENS), self.prepared.stop_tokens)
            except OutOfMemory:
                self.max_tokens = 0
                return
            self._last = time.monotonic()
            self._cost = self._last - began
            rows = zip(examples, written, strict=True)
            yield Samples(step, tuple(Sample(e.prompt, e.answer or "", self.decode(tokens)) for e, tokens in rows))

    def _affordable(self) -> bool:
        return self._cost <= SHARE * (time.monotonic() - self._last)


def _varied(examples: Sequence[Example]) -> list[int]:
    """The first row of each of the first answers that differ."""
    first: dict[str | None, int] = {}
    for i, example in enumerate(examples):
        first.setdefault(example.answer, i)
        if len(first) == ROWS:
            break
    return list(first.values())


def _known(row: RowResult) -> Sample:
    return Sample(row.prompt, row.expected or "", row.predicted or "")

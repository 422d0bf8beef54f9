"""Log-probabilities of the two answers of a pair, and which one a model prefers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch, OutOfMemory, Reader
from finetune.data.pair_batches import pair_batches
from finetune.data.rows import Example
from finetune.errors import MemoryExhausted
from finetune.evaluation.read_ahead import ahead
from finetune.events import Progress

Pairs = NDArray[np.float64]  # [n, 2]: of the better answer, of the worse one


@dataclass(frozen=True)
class PairFigures:
    """What the pairs of a split tell of a model, beside how often it prefers the better answer."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    margin: float  # the mean, as the loss has it; of DPO 0 for the base itself
    rewarded: float  # the share of pairs whose margin is above 0
    longer: float | None  # the share of unequal pairs in which it prefers the longer answer, in tokens


def scored_pairs(
    session: Reader, examples: Sequence[Example], micro_tokens: int, what: str
) -> Generator[Progress, None, Pairs]:
    """The log-probability of both answers of each pair, summed over their tokens. Raises MemoryExhausted."""
    found, done = np.zeros((len(examples), 2)), 0
    batches = pair_batches(examples, micro_tokens, session.shares_prefixes)
    yield from ahead(session, batches)
    for pairs, batch in batches:
        try:
            found[pairs] = of_batch(session, batch)
        except OutOfMemory as error:
            if len(pairs) == 1:
                where = examples[pairs[0]].location
                raise MemoryExhausted(
                    f"{where}: this pair alone does not fit ({error}); lower train.max_length"
                ) from None
            found[pairs] = yield from scored_pairs(session, [examples[i] for i in pairs], micro_tokens // 2, what)
        done += len(pairs)
        yield Progress(0, what, done, len(examples))
    return found


def of_batch(session: Reader, batch: Batch) -> Pairs:
    """The same of one batch of `pair_batches`."""
    scores = session.score(batch).logprob.astype(np.float64) * (batch.weights > 0)
    rows: Pairs = scores.sum(axis=1).reshape(-1, 2)
    return rows


def references(examples: Sequence[Example]) -> Pairs:
    """The log-probabilities under the model without its adapter, which the examples hold. [n, 2]"""
    return np.array([[one.under_base, one.rejected.under_base if one.rejected else 0.0] for one in examples]).reshape(
        -1, 2
    )


def referred(examples: Sequence[Example], under_base: Pairs) -> tuple[Example, ...]:
    """The examples with those in them."""
    return tuple(
        replace(one, under_base=float(better), rejected=one.rejected and replace(one.rejected, under_base=float(worse)))
        for one, (better, worse) in zip(examples, under_base, strict=True)
    )


def preferred(examples: Sequence[Example], logprobs: Pairs) -> NDArray[np.bool_]:
    """Whether the better answer is the more probable one per token, so that length alone decides nothing. [n]"""
    each = logprobs / lengths(examples)
    better: NDArray[np.bool_] = each[:, 0] > each[:, 1]
    return better


def figures(examples: Sequence[Example], logprobs: Pairs, margin: NDArray[np.float64]) -> PairFigures:
    sizes, prefers = lengths(examples), preferred(examples, logprobs)
    unequal = sizes[:, 0] != sizes[:, 1]
    longer = prefers[unequal] == (sizes[unequal, 0] > sizes[unequal, 1])
    return PairFigures(float(margin.mean()), float((margin > 0).mean()), float(longer.mean()) if longer.size else None)


def lengths(examples: Sequence[Example]) -> Pairs:
    """In supervised tokens, at least 1. [n, 2]"""
    both = [(one.weights.sum(), one.rejected.weights.sum() if one.rejected else 0.0) for one in examples]
    return np.maximum(np.array(both, np.float64).reshape(-1, 2), 1.0)

"""Evaluation of preference pairs, and the validation loss of any objective."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from backends.interface import Reader
from finetune.data.rows import Example
from finetune.evaluation.intervals import wilson_interval
from finetune.evaluation.pair_losses import PairLoss
from finetune.evaluation.pairs import figures, preferred, scored_pairs
from finetune.evaluation.results import Evaluation, RowResult
from finetune.evaluation.scoring import row_losses
from finetune.events import Progress


def mean_loss(
    session: Reader, examples: Sequence[Example], micro_tokens: int, pairs: PairLoss | None, what: str
) -> Generator[Progress, None, float]:
    """As an evaluation has it: nats per supervised token, or per pair."""
    if pairs:
        return (yield from evaluate_pairs(session, examples, micro_tokens, pairs, what)).loss
    losses = yield from row_losses(session, examples, micro_tokens, what)
    return float(losses.loss.sum() / losses.tokens.sum())


def evaluate_pairs(
    session: Reader, examples: Sequence[Example], micro_tokens: int, loss: PairLoss, name: str
) -> Generator[Progress, None, Evaluation]:
    """How often the better answer is the more probable one per token, and the loss in nats per pair."""
    found = yield from scored_pairs(session, examples, micro_tokens, f"{name}: loss")
    margin, each, better = loss.margins(examples, found), loss.losses(examples, found), preferred(examples, found)
    results = []
    for i, example in enumerate(examples):
        chosen = example if better[i] or example.rejected is None else example.rejected
        results.append(
            RowResult(
                example.location, example.prompt, example.answer, chosen.answer, bool(better[i]), float(each[i]), 1
            )
        )
    right, count = int(better.sum()), len(results)
    return Evaluation(
        rows=count,
        tokens=count,
        loss=float(each.mean()) if count else 0.0,
        perplexity=None,
        token_accuracy=None,
        accuracy=right / count if count else None,
        interval=wilson_interval(right, count) if count else None,
        macro_f1=None,
        labels=(),
        confusion=None,
        results=tuple(results),
        pairs=figures(examples, found, margin) if count else None,
    )

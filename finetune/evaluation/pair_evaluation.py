"""How good is the model at pairs of answers?"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from backends.interface import Reader
from finetune.data.rows import Example
from finetune.evaluation.intervals import wilson_interval
from finetune.evaluation.pairs import figures, losses, margins, preferred, references, scored_pairs
from finetune.evaluation.results import Evaluation, RowResult
from finetune.events import Progress


def evaluate_pairs(
    session: Reader, examples: Sequence[Example], micro_tokens: int, beta: float, name: str
) -> Generator[Progress, None, Evaluation]:
    """How often the better answer is the more probable one per token, and the loss of DPO in nats per pair."""
    found = yield from scored_pairs(session, examples, micro_tokens, f"{name}: loss")
    margin = margins(found, references(examples), beta)
    each, better = losses(margin), preferred(examples, found)
    results = []
    for i, example in enumerate(examples):
        chosen = example if better[i] or example.rejected is None else example.rejected
        results.append(
            RowResult(
                example.location, example.prompt, example.answer, chosen.answer, bool(better[i]), float(each[i]), 1
            )
        )
    right, count, mean = int(better.sum()), len(results), float(each.mean()) if len(each) else 0.0
    return Evaluation(
        rows=count,
        tokens=count,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        token_accuracy=float((margin > 0).mean()) if count else 0.0,
        accuracy=right / count if count else None,
        interval=wilson_interval(right, count) if count else None,
        macro_f1=None,
        labels=(),
        confusion=None,
        results=tuple(results),
        pairs=figures(examples, found, margin) if count else None,
    )

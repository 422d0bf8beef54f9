"""Training rows that hurt: answers that the tuned model and the other rows doubt, and rows that clash.

The run's own model judges its training rows, once. What it has learned by heart it does not doubt: so it counts only as
sure as it was right on held-out rows, and the words of each row are judged by the other rows (naive Bayes).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from backends.interface import Session
from finetune.check.contradictions import Clash, clashes
from finetune.data.rows import Example, Prepared, Split
from finetune.evaluation.label_confidence import as_sure_as_right, doubts, filled_in, log_shares
from finetune.evaluation.naive_bayes import WordCounts
from finetune.evaluation.scoring import label_logprobs, row_losses
from finetune.events import Progress

FAR = 3.5  # robust standard deviations above the median loss, from which an open answer is suspect


@dataclass(frozen=True)
class Suspect:
    """A training row and what speaks against it."""

    location: str  # file:line
    doubt: float  # above 0: without the row the others agree more; orders the rows
    answer: str
    suggested: str  # the label that is likelier; empty for open answers
    why: str
    text: str  # the prompt


@dataclass(frozen=True)
class _Doubt:
    """What the model and the words say of a row."""

    strength: float
    suspect: bool
    suggested: str
    why: str


def find_suspects(
    session: Session, prepared: Prepared, micro_tokens: int, accuracy: float | None
) -> Generator[Progress, None, tuple[list[Suspect], list[float]]]:
    """The rows to look at, the most doubtful first; and the doubt of each of `rows_judged`, in their order.

    session: with the tuned adapter. accuracy: of that model on held-out rows, where rows have labels. prepared: with
    its records. Raises MemoryExhausted.
    """
    examples = rows_judged(prepared)
    records = [record for split in _splits(prepared) for record in split.records]
    labelled = bool(prepared.labels)
    found = (yield from clashes(records, labelled)) if prepared.task != "text" else {}
    if labelled and accuracy is not None and len({example.answer for example in examples}) > 1:
        judged = yield from _labels(session, prepared, micro_tokens, accuracy)
    else:
        judged = yield from _losses(session, examples, micro_tokens)
    suspects: dict[str, Suspect] = {}
    for example, doubt in zip(examples, judged, strict=True):
        clash = found.get(example.location)
        before = suspects.get(example.location)  # of a conversation or a long text, the most doubtful part
        if (clash or doubt.suspect) and (before is None or before.doubt < doubt.strength):
            suspects[example.location] = _suspect(example, doubt, clash)
    ordered = sorted(suspects.values(), key=lambda suspect: -suspect.doubt)
    return ordered, [doubt.strength for doubt in judged]


def rows_judged(prepared: Prepared) -> tuple[Example, ...]:
    """The training rows, and with them the validation rows that were set apart from the same file."""
    return tuple(example for split in _splits(prepared) for example in split.examples)


def _splits(prepared: Prepared) -> tuple[Split, ...]:
    return (prepared.train, prepared.valid) if prepared.parted else (prepared.train,)


def _suspect(example: Example, doubt: _Doubt, clash: Clash | None) -> Suspect:
    reasons = [doubt.why] if doubt.suspect or doubt.strength > 0 else []
    if clash is not None:
        same = "the same words stand" if clash.similarity == 1 else f"nearly the same ({clash.similarity:.2f}) stands"
        reasons.append(f"{same} at {clash.location} with {clash.answer!r}")
    answer = example.answer or ""
    return Suspect(
        example.location, doubt.strength, answer, doubt.suggested, "; ".join(reasons), example.prompt or answer
    )


def _labels(
    session: Session, prepared: Prepared, micro_tokens: int, accuracy: float
) -> Generator[Progress, None, list[_Doubt]]:
    examples = rows_judged(prepared)
    words = WordCounts(examples, prepared.labels)
    number = [prepared.labels.index(label) for label in words.labels]
    own = words.without_itself()
    right = float((own.argmax(axis=1) == words.truth).mean())
    said = as_sure_as_right(own, right)
    tokens = [prepared.label_tokens[label] for label in number]
    if sum(map(len, tokens)) <= np.median([len(example) for example in examples]):
        model = log_shares((yield from label_logprobs(session, examples, tokens, micro_tokens, "suspects")))
    else:  # many labels: the given one alone, which costs a small part of it
        losses = yield from row_losses(session, examples, micro_tokens, "suspects")
        model = filled_in(-losses.loss, words.truth, said)
    judged = doubts(log_shares(as_sure_as_right(model, accuracy) + said), words.truth)
    made = []
    for i in range(len(examples)):
        other, strength = words.labels[judged.other[i]], float(judged.strength[i])
        given = words.labels[words.truth[i]]
        why = f"{given!r} has probability {np.exp(model[i, words.truth[i]]):.2f} for the model"
        why += f", {np.exp(said[i, words.truth[i]]):.2f} by the words of the other rows; likelier: {other!r}"
        made.append(_Doubt(strength, bool(judged.suspect[i]), other if strength > 0 else "", why))
    return made


def _losses(
    session: Session, examples: Sequence[Example], micro_tokens: int
) -> Generator[Progress, None, list[_Doubt]]:
    """By the loss of each answer, in robust standard deviations above the median, less `FAR`."""
    losses = yield from row_losses(session, examples, micro_tokens, "suspects")
    each = losses.loss / np.maximum(losses.tokens, 1)  # nats per token
    middle = float(np.median(each))
    spread = max(1.4826 * float(np.median(np.abs(each - middle))), 1e-6)
    strength = (each - middle) / spread - FAR
    return [
        _Doubt(float(far), far > 0, "", f"the answer has a loss of {loss:.2f} nats per token; half have {middle:.2f}")
        for far, loss in zip(strength.tolist(), each.tolist(), strict=True)
    ]

"""Verdicts in plain sentences: divergence, overfitting, and whether the tuned model is better than the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.evaluation.baselines import Words, shortcomings, too_weak
from finetune.evaluation.intervals import macro_f1_change
from finetune.evaluation.paired_changes import SIGNIFICANT, loss_change, loss_decides
from finetune.events import Event, StepDone, Validated
from finetune.text import p_text

if TYPE_CHECKING:
    from finetune.evaluation.evaluate import Evaluation

RISE = 0.01  # of the lowest validation loss; a smaller rise counts as noise
CLEAR = 0.1  # of the loss at the start; a smaller rise may come from the rows of a batch
IN_A_ROW = 3  # steps with a high loss; fewer may come from a few strange rows


@dataclass(frozen=True)
class Overfitting:
    """Whether training overfitted, in a word and in a sentence."""

    verdict: Literal["none", "overfitting", "too short to say"]
    best_epoch: float  # where the validation loss was lowest; 0 is before training
    best_loss: float
    message: str


def overfitting_verdict(validations: Sequence[Validated], enough: bool = False) -> Overfitting:
    """Overfitting: the validation loss ends above its minimum while the training loss kept falling.

    `validations` is the epoch table in order, with or without the row before training; it must not be empty. enough:
    the run ended because an epoch more would have brought little (`epochs: auto`).
    """
    best = min(validations, key=lambda validated: validated.loss)  # the first of equals
    last = validations[-1]
    trained = [validated for validated in validations if validated.train_loss is not None]
    rose = last.loss > best.loss * (1 + RISE)
    if rose and enough and best.epoch > 0:
        message = (
            f"No overfitting in what is kept: validation loss rises from {best.loss:.4g} at {_epoch(best)}, which is "
            f"kept, to {last.loss:.4g} at {_epoch(last)}, and the run ended there by itself."
        )
        return Overfitting("none", best.epoch, best.loss, message)
    if len(trained) < 2:
        message = "Overfitting: cannot tell, because the run made fewer than two validations after training began."
        return Overfitting("too short to say", best.epoch, best.loss, message)
    before = best if best.train_loss is not None else trained[0]
    if rose and _train_loss(last) < _train_loss(before):
        message = (
            f"Overfitting: validation loss rises from {best.loss:.4g} at {_epoch(best)} to {last.loss:.4g} at "
            f"{_epoch(last)}, while training loss falls from {_train_loss(before):.4g} to {_train_loss(last):.4g}. "
        )
        return Overfitting("overfitting", best.epoch, best.loss, message + _where_to_stop(best))
    return Overfitting("none", best.epoch, best.loss, _no_overfitting(best, last, rose, enough))


def _where_to_stop(best: Validated) -> str:
    if best.epoch > 0:
        return f"Stop at {_epoch(best)}."
    return "No epoch beat the model before training: lower the learning rate, or train on more data."


def _no_overfitting(best: Validated, last: Validated, rose: bool, enough: bool) -> str:
    if rose:
        return (
            f"No overfitting, but validation loss rises from {best.loss:.4g} at {_epoch(best)} to {last.loss:.4g} at "
            f"{_epoch(last)} and training loss does not fall: lower the learning rate."
        )
    if best is last:
        more = "it hardly fell any more, and the run ended by itself" if enough else "more training may help"
        return f"No overfitting: validation loss is lowest, {best.loss:.4g}, at the end; {more}."
    return (
        f"No overfitting: validation loss is lowest, {best.loss:.4g}, at {_epoch(best)} and stays near it "
        f"({last.loss:.4g} at the end)."
    )


def _train_loss(validated: Validated) -> float:
    assert validated.train_loss is not None  # only the row before training lacks it
    return validated.train_loss


def _epoch(validated: Validated) -> str:
    return f"epoch {round(validated.epoch, 2):g}"


def comparison_verdict(base: Evaluation, tuned: Evaluation, p_value: float | None, words: Words | None = None) -> str:
    """Better, worse, or no clear difference, and why; and what models that know nothing would have.

    `p_value` of McNemar's test decides where answers are right or wrong; elsewhere, and where too few open answers
    changed for that test, the 95 % interval of the change of the loss on the same rows does. A gain is "Not good yet"
    where a constant answer does as well, and "Mixed" where macro F1 clearly falls. words: of `bag_of_words`.
    """
    lacks = [] if tuned.pairs else shortcomings(base, tuned, words)
    return " ".join((_compared(base, tuned, p_value), *_unread(base, tuned), *lacks))


def _unread(base: Evaluation, tuned: Evaluation) -> list[str]:
    """How many answers have no part to compare, where the recipe compares one (`evaluate.answer`)."""
    if not any((*base.unread, *tuned.unread)):
        return []
    return [
        f"Answers without the part that evaluate.answer: {tuned.compared} compares count as wrong: {tuned.unread[0]} "
        f"expected, {base.unread[1]} before, {tuned.unread[1]} after."
    ]


def _compared(base: Evaluation, tuned: Evaluation, p_value: float | None) -> str:
    if base.accuracy is None or tuned.accuracy is None or p_value is None or loss_decides(base, tuned):
        return _by_loss(base, tuned)
    change = tuned.accuracy - base.accuracy
    verdict = _better_or_worse(change) if p_value < SIGNIFICANT else "No clear difference"
    if verdict == "Better":
        verdict = "Not good yet" if too_weak(tuned) else "Mixed" if _macro_f1_falls(base, tuned) else verdict
    test = f"McNemar's exact test: {p_text(p_value)}"
    return (
        f"{verdict}: {tuned.measure} {base.accuracy:.3f}{_in_brackets(base.interval)} before, {tuned.accuracy:.3f}"
        f"{_in_brackets(tuned.interval)} after, on the same {tuned.rows} rows ({test})."
    )


def _macro_f1_falls(base: Evaluation, tuned: Evaluation) -> bool:
    """Whether the whole 95 % interval of its change is below 0."""
    if base.macro_f1 is None or tuned.macro_f1 is None or tuned.macro_f1 >= base.macro_f1:
        return False
    truth, after = tuned.label_numbers()
    return macro_f1_change(truth, base.label_numbers()[1], after, len(tuned.labels))[1] < 0


def _by_loss(base: Evaluation, tuned: Evaluation) -> str:
    mean, interval, p_value = loss_change(base.results, tuned.results)
    verdict = _better_or_worse(-mean) if p_value < SIGNIFICANT else "No clear difference"
    tested = f" (95 % interval of the change: {interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
    matches = ""
    if base.accuracy is not None and tuned.accuracy is not None:
        both = f"{base.accuracy:.3f} before, {tuned.accuracy:.3f} after"
        matches = f"; {tuned.measure} {both if base.accuracy or tuned.accuracy else 'is 0 before and after'}"
    return (
        f"{verdict}: loss {base.loss:.4f} before, {tuned.loss:.4f} after, on the same {tuned.rows} rows"
        f"{tested}{matches}."
    )


def _better_or_worse(gain: float) -> str:
    return "Better" if gain > 0 else "Worse"


def _in_brackets(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""


class Watch:
    """Notices a loss above ln(vocabulary): the loss of a model to which all tokens are equally likely.

    Whether the run diverges is told from its own curve: a loss that has been as high from the start, or falls, is no
    reason to lower the learning rate.
    """

    def __init__(self, vocabulary: int | None, warmup: int, before: Iterable[Event] = ()) -> None:
        """vocabulary: the model's tokens; None: not known, and nothing is noticed.

        warmup: steps in which the learning rate still rises, and a high loss is no sign of divergence. before: what
        happened before a run was resumed; its notices were given then.
        """
        self._guessing = math.log(vocabulary) if vocabulary else math.inf
        self._warmup = warmup
        self._first: dict[type[object], float] = {}  # loss of the first event of each type
        self._above: list[float] = []  # the losses of the last steps in a row that are high
        self._last: Validated | None = None
        self._said_high = self._said_diverging = False
        for event in before:
            self.look(event)

    def look(self, event: Event) -> str | None:
        """The notice, at the event that gives reason for it; else None."""
        if not isinstance(event, StepDone | Validated):
            return None
        self._first.setdefault(type(event), event.loss)
        if self._said_diverging or event.step <= self._warmup:
            return None
        loss = event.loss
        if isinstance(event, StepDone):
            self._above = [*self._above, loss][-IN_A_ROW:] if loss > self._guessing else []
            if len(self._above) < IN_A_ROW:
                return None
            loss = sum(self._above) / IN_A_ROW
        else:
            self._last = event
        if loss <= self._guessing:
            return None
        start = self._start()
        if loss > start * (1 + CLEAR):
            self._said_diverging = True
            return f"Diverging? {self._high(event)} Lower train.learning_rate, or check the rows."
        if self._said_high or loss < start * (1 - RISE):  # it falls; whether far enough is seen at the end
            return None
        self._said_high = True
        as_before = f"It was as high at the start ({start:.2f}), so the learning rate is not"
        return f"High loss: {self._high(event)} {as_before} {_TOO_LOW}"

    def at_the_end(self) -> str | None:
        """The notice of a run that ends above guessing, although its loss fell."""
        last, start = self._last, self._start()
        if last is None or self._said_high or self._said_diverging or last.loss <= self._guessing:
            return None
        return f"High loss: {self._high(last)} It fell from {start:.2f}, so the learning rate is not {_TOO_LOW}"

    def _start(self) -> float:
        """The mean of the first validation and the first step, both of the model before training."""
        return sum(self._first.values()) / max(len(self._first), 1)

    def _high(self, event: StepDone | Validated) -> str:
        what = "training" if isinstance(event, StepDone) else "validation"
        return (
            f"After step {event.step} the {what} loss is {event.loss:.2f}; random guessing would have "
            f"{self._guessing:.2f}, the logarithm of the vocabulary size."
        )


_TOO_LOW = (
    "too high: raise train.learning_rate or train longer, and check that the rows are in a language and form that "
    "the model knows."
)


def divergence(events: Iterable[Event], vocabulary: int | None, warmup: int) -> str | None:
    """The last notice of a whole run, or None."""
    watch = Watch(vocabulary, warmup)
    notices = [notice for event in events if (notice := watch.look(event))]
    return notices[-1] if notices else watch.at_the_end()

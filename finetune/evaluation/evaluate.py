"""Evaluation: one function for every backend, for base and tuned model.

The whole set, the same rows in the same order in every call, however little memory there is: batches are only a way
to get through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from backends.interface import HEAD_WEIGHT, FloatArray, Reader, Session
from finetune.data.rows import Example, Prepared, Split
from finetune.data.tokenizer import Tokenizer, answer_text
from finetune.errors import Diverged
from finetune.evaluation.answers import part_of
from finetune.evaluation.intervals import confusion_matrix, macro_f1, macro_f1_interval, wilson_interval
from finetune.evaluation.pair_evaluation import evaluate_pairs
from finetune.evaluation.pair_losses import PairLoss, pair_loss
from finetune.evaluation.results import Evaluation, RowResult
from finetune.evaluation.scoring import RowLosses, choose_labels, row_losses, write_answers
from finetune.events import Progress
from finetune.recipe.schema import AnswerPart, Recipe

__all__ = ["Evaluation", "RowResult", "base_weights", "evaluate", "evaluate_held_out"]


def evaluate(
    session: Reader,
    prepared: Prepared,
    split: Split,
    *,
    name: str,
    micro_tokens: int,
    max_tokens: int = 0,
    decode: Callable[[Sequence[int]], str] | None = None,
    compared: AnswerPart = "all",
    pairs: PairLoss | None = None,
    losses: RowLosses | None = None,
) -> Generator[Progress, None, Evaluation]:
    """Loss on every row; labels where there are labels; written answers where `max_tokens` allows any.

    compared: what of those. pairs: the loss of pairs of answers, which are measured by themselves. losses: those of the
    rows, where they are known. `name` says in the progress what is evaluated. Raises MemoryExhausted where one row
    alone does not fit.
    """
    examples = split.examples
    if pairs is not None:
        return (yield from evaluate_pairs(session, examples, micro_tokens, pairs, name))
    losses = losses or (yield from row_losses(session, examples, micro_tokens, f"{name}: loss"))
    predicted: list[str | None] = [None] * len(examples)
    ended: list[bool | None] = [None] * len(examples)
    expected = [example.answer or "" for example in examples]
    part: AnswerPart = "all"
    if prepared.task == "classification":
        chosen = yield from choose_labels(
            session, examples, prepared.label_tokens, micro_tokens, losses.first, f"{name}: labels"
        )
        predicted = [prepared.labels[index] for index in chosen]
    elif prepared.task == "generation" and max_tokens and decode:
        stop = prepared.stop_tokens
        answers = yield from write_answers(session, examples, stop, max_tokens, decode, f"{name}: answers")
        predicted = [answer.text for answer in answers]
        ended = [answer.ended for answer in answers]
        # Read as the written ones are; of an answer that lost its end, the tokens do not tell the whole.
        expected = [e.answer or "" if e.cut else decode(e.answer_tokens.tolist()) for e in examples]
        part = compared
    results = _results(examples, expected, predicted, ended, part, losses)
    evaluation = _summarise(prepared, results, losses)
    return evaluation if part == "all" else replace(evaluation, compared=part, unread=_unread(results))


def _results(
    examples: Sequence[Example],
    expected: Sequence[str],
    predicted: Sequence[str | None],
    ended: Sequence[bool | None],
    part: AnswerPart,
    losses: RowLosses,
) -> tuple[RowResult, ...]:
    """expected: as the predicted answers are read; the rows themselves keep what their file has."""
    judged = [
        None if answer is None else (part_of(truth, part), part_of(answer, part))
        for truth, answer in zip(expected, predicted, strict=True)
    ]
    return tuple(
        RowResult(
            location=example.location,
            prompt=example.prompt,
            expected=example.answer,
            predicted=predicted[i],
            correct=None if judged[i] is None else _same(judged[i]),
            loss=float(losses.loss[i] / losses.tokens[i]),
            tokens=int(losses.tokens[i]),
            compared=None if part == "all" else judged[i],
            ended=ended[i],
        )
        for i, example in enumerate(examples)
    )


def _same(pair: tuple[str | None, str | None] | None) -> bool:
    return pair is not None and pair[0] is not None and pair[0] == pair[1]


def _unread(results: Sequence[RowResult]) -> tuple[int, int]:
    expected, predicted = zip(*(row.judged for row in results), strict=True)
    return expected.count(None), predicted.count(None)


def _summarise(prepared: Prepared, results: tuple[RowResult, ...], losses: RowLosses) -> Evaluation:
    tokens = int(losses.tokens.sum())
    mean = float(losses.loss.sum()) / max(tokens, 1)
    judged = [row for row in results if row.correct is not None]
    right = sum(bool(row.correct) for row in judged)
    confusion, macro = None, None
    if prepared.task == "classification" and judged:
        index = {label: i for i, label in enumerate(prepared.labels)}
        matrix = confusion_matrix(
            [index[str(row.expected)] for row in judged],
            [index[str(row.predicted)] for row in judged],
            len(index),
        )
        confusion = matrix.tolist()
        macro = macro_f1(matrix)
    return Evaluation(
        rows=len(results),
        tokens=tokens,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        token_accuracy=int(losses.correct.sum()) / max(tokens, 1),
        accuracy=right / len(judged) if judged else None,
        interval=wilson_interval(right, len(judged)) if judged else None,
        macro_f1=macro,
        labels=prepared.labels,
        confusion=confusion,
        results=results,
    )


def evaluate_held_out(
    session: Reader, recipe: Recipe, prepared: Prepared, tokenizer: Tokenizer, name: str
) -> Generator[Progress, None, Evaluation]:
    """The rows of the final figures, evaluated as the recipe says: the same for the base model and the tuned model.

    Raises Diverged where the loss is not a finite number, MemoryExhausted.
    """
    evaluation = yield from evaluate(
        session,
        prepared,
        prepared.held_out,
        name=name,
        micro_tokens=recipe.train.tokens_at_once,
        max_tokens=recipe.evaluate.max_tokens if recipe.evaluate.generate else 0,
        decode=lambda tokens: answer_text(tokenizer, tokens, prepared.stop_tokens),
        compared=recipe.evaluate.answer,
        pairs=pair_loss(recipe),
    )
    if not math.isfinite(evaluation.loss):
        remedy = f"check the weights of {recipe.model.path}"
        raise Diverged(f"{name}: its loss on the held-out rows is {evaluation.loss}; {remedy}")
    if evaluation.macro_f1 is None:
        return evaluation
    truth, chosen = evaluation.label_numbers()
    return replace(evaluation, macro_f1_interval=macro_f1_interval(truth, chosen, len(evaluation.labels)))


@contextmanager
def base_weights(session: Session, head: Mapping[str, FloatArray] | None = None) -> Iterator[None]:
    """Inside, the session is the base model: what trains is as it was before. Afterwards it is as trained again.

    head: of a run with one, the head that learned alone, on the frozen model; not given: the head stays as it is.
    """
    trained = session.trained()
    kept = {name: value for name, value in trained.items() if name == HEAD_WEIGHT}
    session.set_trained({**session.untrained(), **kept, **(head or {})})
    try:
        yield
    finally:
        session.set_trained(trained)

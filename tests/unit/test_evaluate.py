"""Evaluation: what it measures against its plain definition, and that memory changes none of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.interface import Batch, Scores, Session, TrainState
from finetune.data.collate import evaluation_batches
from finetune.data.rows import Example
from finetune.errors import MemoryExhausted
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.scoring import choose_labels, row_losses, scored, write_answers
from finetune.events import Work
from tests.unit.toy_run import LABEL_TOKENS, LABELS, STOP, Small, Wrapped, dataset, prepared, result_of, session

ROWS = 23


@pytest.fixture
def live(tmp_path: Path) -> Session:
    """A session whose adapter is random, so that no two tokens are alike."""
    made = session(tmp_path)
    rng = np.random.default_rng(5)
    adapter = made.get_state().adapter
    made.set_state(TrainState(3, {n: rng.standard_normal(t.shape).astype(np.float32) for n, t in adapter.items()}, {}))
    return made


def one_row(session: Session, tokens: Sequence[int], first: int) -> list[float]:
    """log p of every token from `first` on, asked for by itself."""
    inputs = np.array([tokens[:-1]], np.int32)
    weights = (np.arange(1, len(tokens)) >= first).astype(np.float32)[None]
    found = session.score(Batch(inputs, np.array([tokens[1:]], np.int32), weights))
    return [float(value) for value in found.logprob[0][first - 1 :]]


def measured(session: Session, micro_tokens: int = 4096, task: str = "classification", **more: Any) -> Evaluation:
    rows = prepared(valid=ROWS, task=task)
    return result_of(evaluate(session, rows, rows.valid, name="model", micro_tokens=micro_tokens, **more))


def test_labels_are_chosen_by_the_sum_of_their_log_probabilities(live: Session) -> None:
    found = measured(live)
    for example, row in zip(dataset("valid", ROWS, 2).examples, found.results, strict=True):
        prompt = example.prompt_tokens.tolist()
        sums = [sum(one_row(live, [*prompt, *label], len(prompt))) for label in LABEL_TOKENS]
        assert row.predicted == LABELS[int(np.argmax(sums))]
        assert row.correct == (row.predicted == example.answer)
    assert len({row.predicted for row in found.results}) > 1, "one answer for all would prove nothing"


def test_loss_and_accuracies_are_what_they_say(live: Session) -> None:
    found = measured(live)
    losses, hits = [], 0
    for example, row in zip(dataset("valid", ROWS, 2).examples, found.results, strict=True):
        first = len(example.prompt_tokens)
        nll = [-value for value in one_row(live, example.tokens.tolist(), first)]
        assert row.loss == pytest.approx(np.mean(nll), rel=1e-5)
        assert row.tokens == len(nll)
        losses += nll
        inputs, targets = example.tokens[None, :-1], example.tokens[None, 1:]
        greedy = live.score(Batch(inputs, targets, np.ones(inputs.shape, np.float32))).greedy
        hits += int((greedy == targets)[0, first - 1 :].sum())
    assert found.tokens == len(losses)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.token_accuracy == hits / len(losses)
    right = sum(bool(row.correct) for row in found.results)
    assert found.accuracy == right / ROWS
    assert found.interval is not None
    assert found.interval[0] < found.accuracy < found.interval[1]
    assert found.confusion is not None
    assert sum(map(sum, found.confusion)) == ROWS
    assert sum(found.confusion[i][i] for i in range(3)) == right


def test_it_is_the_same_in_every_call_and_changes_nothing(live: Session) -> None:
    before = live.get_state()
    first = measured(live)
    assert measured(live) == first
    assert [row.location for row in first.results] == [f"valid.jsonl:{i + 1}" for i in range(ROWS)]
    after = live.get_state()
    assert after.step == before.step
    assert all(after.adapter[name].tobytes() == before.adapter[name].tobytes() for name in before.adapter)


def close(one: Evaluation, other: Evaluation) -> None:
    """Equal but for the last bits of the losses: other batches add in another order."""
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert (one.tokens, one.token_accuracy, one.confusion) == (other.tokens, other.token_accuracy, other.confusion)
    for ours, theirs in zip(one.results, other.results, strict=True):
        assert replace(ours, loss=0.0) == replace(theirs, loss=0.0)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


@pytest.mark.parametrize("micro_tokens", [1, 30, 64, 200, 10**6])
def test_the_size_of_batches_has_no_effect(live: Session, micro_tokens: int) -> None:
    close(measured(live, micro_tokens), measured(live))


@pytest.mark.parametrize("limit", [24, 50, 200])
def test_running_out_of_memory_has_no_effect(live: Session, limit: int) -> None:
    small = Small(live, limit)
    close(measured(small), measured(live))
    assert 0 < small.largest <= limit


def test_every_row_is_scored_once_whatever_the_memory(live: Session) -> None:
    examples = dataset("valid", ROWS, 2).examples
    for session_ in (live, Small(live, 24)):
        batches = evaluation_batches(examples, 100)
        seen = [i for rows, *_ in scored(session_, batches, examples) for i in rows]
        assert sorted(seen) == list(range(ROWS))


def test_a_row_that_does_not_fit_alone_is_named(live: Session) -> None:
    longest = max(dataset("valid", ROWS, 2).examples, key=lambda one: len(one.tokens))
    with pytest.raises(MemoryExhausted, match=f"{longest.location}: this row alone") as caught:
        measured(Small(live, 16))
    assert caught.value.exit_code == 5


def test_plain_text_has_a_loss_only(live: Session) -> None:
    found = measured(live, task="text", max_tokens=4, decode=str)
    assert (found.accuracy, found.interval, found.macro_f1, found.confusion) == (None, None, None, None)
    assert {(row.predicted, row.correct) for row in found.results} == {(None, None)}
    assert found.loss > 0


class Answering(Wrapped):
    """Writes the first `right` rows' expected answers, and one word else."""

    def __init__(self, inner: Session, right: int) -> None:
        super().__init__(inner)
        rows = dataset("valid", ROWS, 2).examples
        self.answers = {tuple(one.prompt_tokens.tolist()): i for i, one in enumerate(rows)}
        self.right = right

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Any) -> list[list[int]]:
        assert (max_tokens, stop) == (9, STOP)
        indices = [self.answers[tuple(prompt)] for prompt in prompts]
        return [list(LABEL_TOKENS[i % 3]) if i < self.right else [11] for i in indices]


def spoken(tokens: Sequence[int]) -> str:
    """The label of the tokens, with the spaces that a tokenizer leaves."""
    return f" {LABELS[LABEL_TOKENS.index(tuple(tokens))]}\n" if tuple(tokens) in LABEL_TOKENS else "what?"


def test_open_answers_are_right_when_they_match_word_for_word(live: Session) -> None:
    found = measured(Answering(live, 9), task="generation", max_tokens=9, decode=spoken)
    assert found.accuracy == 9 / ROWS
    assert [row.correct for row in found.results] == [i < 9 for i in range(ROWS)]
    assert found.results[20].predicted == "what?"
    assert found.confusion is None


def test_no_answers_are_written_where_none_are_wanted(live: Session) -> None:
    found = measured(live, task="generation", max_tokens=0, decode=spoken)
    assert found.accuracy is None


@pytest.mark.parametrize("prompts", [1, 3, 5])
def test_answers_are_the_same_however_many_are_written_at_once(live: Session, prompts: int) -> None:
    examples = dataset("valid", ROWS, 2).examples
    steps: list[int] = []

    def written(session: Session) -> list[str]:
        work = Work(write_answers(session, examples, STOP, 5, str))
        steps.extend(event.done for event in work)
        return work.result

    assert written(Small(live, 10**6, prompts)) == written(live)
    assert steps[-1] == ROWS


def test_no_memory_for_a_single_answer_names_the_row(live: Session) -> None:
    with pytest.raises(MemoryExhausted, match=r"valid\.jsonl:\d+: not enough memory to write its answer"):
        result_of(write_answers(Small(live, 10**6, 0), dataset("valid", 3, 2).examples, STOP, 5, str))


def test_progress_is_told_on_the_way(live: Session) -> None:
    rows = prepared(valid=ROWS)
    events = list(evaluate(live, rows, rows.valid, name="base model", micro_tokens=64))
    for what in ("base model: loss", "base model: labels"):
        done = [event.done for event in events if event.what == what]
        assert done == sorted(done)
        assert len(done) > 3
        assert done[-1] == ROWS


def test_a_label_that_is_the_beginning_of_another_is_told_apart_by_its_end() -> None:
    """The more tokens the less probable: only the end token makes `a` and `a b` comparable."""

    class Fixed:
        shares_prefixes = True

        def score(self, batch: Batch) -> Scores:
            table = {5: -1.0, 6: -0.5, 2: -2.0}
            logprob = np.vectorize(lambda token: table.get(int(token), -9.0))(batch.targets) * batch.weights
            return Scores(logprob.astype(np.float32), batch.targets)

    example = Example(np.array([7, 5, 2], np.int32), np.array([0, 1, 1], np.float32), "a:1", answer_start=1)
    chosen = result_of(choose_labels(Fixed(), [example], [(5,), (5, 6)], 64))  # type: ignore[arg-type]
    assert chosen == [0]
    chosen = result_of(choose_labels(Fixed(), [example], [(5, 5, 2), (5, 6, 2)], 64))  # type: ignore[arg-type]
    assert chosen == [1]


def test_a_label_that_is_the_most_probable_token_of_all_is_not_run_again() -> None:
    """And the choice is what running every label would have made."""
    runs = []

    class Noisy:
        shares_prefixes = True

        def score(self, batch: Batch) -> Scores:
            runs.append(batch)
            logits = np.random.default_rng(batch.inputs.ravel()).normal(size=(*batch.inputs.shape, 8))
            logits[..., 5:7] += 2.0
            table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            logprob = np.take_along_axis(table, batch.targets[..., None], -1)[..., 0] * (batch.weights > 0)
            return Scores(logprob.astype(np.float32), table.argmax(-1).astype(np.int32) * (batch.weights > 0))

    def example(row: int) -> Example:
        return Example(np.array([row, 5, 2], np.int32), np.array([0, 1, 1], np.float32), "a:1", answer_start=1)

    chosen, again = [], []
    for row in range(8):  # one at a time: Noisy's logits are a function of the whole batch's inputs
        one = [replace(example(row), tokens=np.array([row, 5], np.int32), weights=np.array([0, 1], np.float32))]
        first = result_of(row_losses(Noisy(), one, 64)).first  # type: ignore[arg-type]
        before = len(runs)
        chosen += result_of(choose_labels(Noisy(), one, [(5,), (6,)], 64, first))  # type: ignore[arg-type]
        again.append(len(runs) > before)
        assert again[-1] == (first[0] not in (5, 6))
        asked = {label: [replace(one[0], tokens=np.array([row, label], np.int32))] for label in (5, 6)}
        table = {label: -result_of(row_losses(Noisy(), rows, 64)).loss[0] for label, rows in asked.items()}  # type: ignore[arg-type]
        assert chosen[-1] == max((0, 1), key=lambda i: table[(5, 6)[i]])
    assert any(again)
    assert not all(again)


def test_a_loss_beyond_the_exponential_is_still_a_number(live: Session) -> None:
    class Sure(Wrapped):
        def score(self, batch: Batch) -> Scores:
            found = self.inner.score(batch)
            return replace(found, logprob=np.where(batch.weights > 0, np.float32(-5000), np.float32(0)))

    assert math.isfinite(measured(Sure(live)).perplexity)

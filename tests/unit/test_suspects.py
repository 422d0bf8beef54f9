"""Rows that hurt: planted wrong labels and contradictions are found, and good rows are not called bad."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.interface import Batch, Scores
from finetune.check.contradictions import clashes
from finetune.check.retrain import predicted_seconds, verdict, without_rows
from finetune.check.suspects import find_suspects
from finetune.data.rows import Example, Prepared, Record, Split
from finetune.errors import DataError
from finetune.evaluation.label_confidence import as_sure_as_right, doubts, filled_in, log_shares
from finetune.evaluation.naive_bayes import WordCounts
from finetune.events import StepDone
from tests.end_to_end.command import Work
from tests.unit.finished_runs import evaluation as read_only
from tests.unit.test_baselines import evaluation
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import LABEL_TOKENS, Wrapped, prepared, result_of, session

WORDS = {"good": ["fine", "warm", "bright"], "bad": ["dull", "cold", "grey"]}


def labelled(rows: int, flipped: set[int], seed: int = 0) -> tuple[Example, ...]:
    """Prompts with two telling words of their true label and four that tell nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        label = ("good", "bad")[row % 2]
        told = [*rng.choice(WORDS[label], 2), *(f"word{i}" for i in rng.integers(0, 30, 4))]
        given = {"good": "bad", "bad": "good"}[label] if row in flipped else label
        made.append(Example(np.zeros(4, np.int32), np.ones(4, np.float32), f"t:{row + 1}", given, " ".join(told)))
    return tuple(made)


def area(scores: list[float], wrong: set[int]) -> float:
    """The share of (wrong, right) pairs in which the wrong row has the higher score."""
    ranked = np.array(scores)
    bad = np.isin(np.arange(len(ranked)), [*wrong])
    return float((ranked[bad][:, None] > ranked[~bad][None]).mean())


@pytest.mark.parametrize("seed", range(3))
def test_what_the_others_say_of_a_row_is_what_naive_bayes_says_without_it(seed: int) -> None:
    rows = labelled(30, {3, 8}, seed)
    counts = WordCounts(rows, ("good", "bad"))
    made = counts.without_itself()
    for i in (0, 3, 8, 29):
        rest = WordCounts([*rows[:i], *rows[i + 1 :]], ("good", "bad"))
        alone = rest.logprobs([rows[i]])[0]
        # A word that no other row has is in one table and not in the other: it moves both labels by nearly as much.
        assert made[i, 0] - made[i, 1] == pytest.approx(alone[0] - alone[1], abs=0.1)


@pytest.mark.parametrize("accuracy", [0.55, 0.7, 0.9, 0.99])
def test_opinions_are_as_sure_as_they_are_right_in_the_same_order(accuracy: float) -> None:
    raw = np.random.default_rng(0).normal(size=(200, 2)) * 30
    made = as_sure_as_right(raw, accuracy)
    assert np.exp(made).sum(axis=1) == pytest.approx(np.ones(200))
    assert np.exp(made).max(axis=1).mean() == pytest.approx(accuracy, abs=0.01)
    assert (np.argsort(made[:, 0] - made[:, 1]) == np.argsort(raw[:, 0] - raw[:, 1])).all()


def test_opinions_no_better_than_chance_say_nothing() -> None:
    made = as_sure_as_right(np.random.default_rng(0).normal(size=(50, 4)) * 10, 0.2)
    assert np.exp(made) == pytest.approx(np.full((50, 4), 0.25), abs=0.1)


def test_the_rest_of_a_share_goes_to_the_other_labels_as_others_say() -> None:
    others = log_shares(np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])))
    made = np.exp(filled_in(np.log([0.4, 0.9]), np.array([0, 2]), others))
    assert made == pytest.approx(np.array([[0.4, 0.36, 0.24], [0.05, 0.05, 0.9]]))


@pytest.mark.parametrize("labels", [2, 3, 6])
def test_flipped_labels_are_doubted_and_others_are_not(labels: int) -> None:
    rng = np.random.default_rng(labels)
    truth = rng.integers(0, labels, 400)
    raw = rng.normal(size=(400, labels))
    raw[np.arange(400), truth] += 4
    given, wrong = truth.copy(), set(range(0, 400, 20))
    given[[*wrong]] = (given[[*wrong]] + 1) % labels
    made = doubts(log_shares(raw), given)
    assert area(made.strength.tolist(), wrong) > 0.97
    assert made.suspect[[*wrong]].mean() > 0.8 and made.suspect.sum() < 2 * len(wrong)
    assert (made.other[[*wrong]] == truth[[*wrong]]).mean() > 0.8
    assert not doubts(log_shares(raw), truth).suspect.mean() > 0.03


class Judge(Wrapped):
    """A model that scores a label by the prompt's row: `logprobs` [rows, labels], where the first token is the row."""

    def __init__(self, inner: Any, logprobs: Any) -> None:
        super().__init__(inner)
        self.logprobs = logprobs

    def score(self, batch: Batch) -> Scores:
        scores = np.zeros(batch.inputs.shape, np.float32)
        for row in range(len(batch.inputs)):
            first = batch.prefixes[batch.prefix_of[row]][0] if batch.prefixes else batch.inputs[row][0]
            label = 0 if LABEL_TOKENS[0][0] in batch.targets[row][batch.weights[row] > 0] else 1
            where = int(np.flatnonzero(batch.weights[row])[0])
            scores[row, where] = self.logprobs[int(first), label]
        return Scores(scores, np.zeros(batch.inputs.shape, np.int32))


def judged(tmp_path: Path, flipped: set[int], learned: bool = False, rows: int = 60) -> tuple[Judge, Prepared]:
    """A model that is right of four rows in five; learned: it has learned every given label by heart."""
    rng = np.random.default_rng(7)
    examples, records = [], []
    logprobs = rng.normal(size=(rows, 2)) - 2
    for i, example in enumerate(labelled(rows, flipped)):
        given = ("good", "bad").index(str(example.answer))
        truth = given ^ (i in flipped)
        logprobs[i, given if learned else truth] += 6 if learned else 2
        tokens = np.array([i, 20, 21, 22, 23, 24, *LABEL_TOKENS[given]], np.int32)
        weights = (np.arange(len(tokens)) >= 6).astype(np.float32)
        examples.append(replace(example, tokens=tokens, weights=weights, answer_start=6, answer_end=len(tokens)))
        records.append(Record(example.location, values={"text": example.prompt}, key=example.prompt))
        records[-1] = replace(records[-1], answer=example.answer)
    train = Split("train", rows, tuple(examples), records=records)
    whole = replace(prepared(), train=train, labels=("good", "bad"), label_tokens=LABEL_TOKENS[:2])
    return Judge(session(tmp_path / "model"), logprobs), whole


@pytest.mark.parametrize("learned", [False, True])
def test_planted_flips_stand_at_the_head_even_where_the_model_knows_them_by_heart(
    tmp_path: Path, learned: bool
) -> None:
    flipped = {4, 17, 42}
    live, rows = judged(tmp_path, flipped, learned)
    suspects, scores = result_of(find_suspects(live, rows, 4096, 0.8))
    assert area(scores, flipped) > 0.95
    listed = [suspect.location for suspect in suspects]
    assert len(listed) >= 2 and {*listed} <= {f"t:{row + 1}" for row in flipped}, "one of the three is hard to tell"
    for suspect in suspects:
        assert suspect.suggested and suspect.suggested != suspect.answer
        assert f"{suspect.answer!r} has probability" in suspect.why and "likelier" in suspect.why


def test_rows_without_a_flip_have_few_suspects(tmp_path: Path) -> None:
    live, rows = judged(tmp_path, set())
    suspects, scores = result_of(find_suspects(live, rows, 4096, 0.8))
    assert len(suspects) <= 3 and len(scores) == 60


def test_many_labels_are_judged_by_the_given_one_alone(tmp_path: Path) -> None:
    flipped = {4, 17, 42}
    live, rows = judged(tmp_path, flipped)
    calls: list[int] = []

    class Counted(Judge):
        def score(self, batch: Batch) -> Scores:
            calls.append(len(batch.inputs))
            return super().score(batch)

    long = ((5, *range(10, 30)), (6, *range(10, 30)))
    counted = Counted(live.inner, live.logprobs)
    _, scores = result_of(find_suspects(counted, replace(rows, label_tokens=long), 4096, 0.8))
    assert sum(calls) == 60 and area(scores, flipped) > 0.9


def test_an_open_answer_far_above_the_others_is_suspect(tmp_path: Path) -> None:
    live = session(tmp_path / "model")
    rows = prepared(train=13, task="generation")

    class Odd(Wrapped):
        def score(self, batch: Batch) -> Scores:
            made = self.inner.score(batch)
            odd = (batch.inputs == rows.train.examples[5].tokens[0]).any(axis=1) & (batch.inputs.shape[1] > 0)
            first = np.array([np.array_equal(row[:3], rows.train.examples[5].tokens[:3]) for row in batch.inputs])
            return replace(made, logprob=np.where((odd & first)[:, None], made.logprob - 90, made.logprob))

    suspects, _ = result_of(find_suspects(Odd(live), rows, 4096, None))
    assert suspects[0].location == "train.jsonl:6" and suspects[0].suggested == ""
    assert "nats per token" in suspects[0].why


LONG = (
    "the plot is thin and the jokes are old but the cast is very good in all of its scenes and whoever likes a slow "
    "evening with friends who talk at length about nothing much will find that two hours pass more quickly than one"
)


def record(line: int, text: str, answer: str) -> Record:
    return Record(f"t:{line}", key=text, values={"text": text}, answer=answer)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("a film", "a film"),
        ("A  film", "a film!"),
        ("!!", "!!"),
        (LONG, LONG.replace("old", "stale")),
        (LONG, LONG + " indeed"),
        (LONG.upper(), LONG),
    ],
)
def test_the_same_or_nearly_under_another_label_clashes_on_both_sides(text: str, other: str) -> None:
    rows = [record(1, "something else", "good"), record(2, text, "good"), record(3, other, "bad")]
    found = result_of(clashes(rows, True))
    assert set(found) == {"t:2", "t:3"}
    assert (found["t:2"].location, found["t:2"].answer) == ("t:3", "bad")


def test_every_row_of_a_group_with_two_labels_clashes() -> None:
    texts = [LONG, LONG.replace("thin", "weak"), LONG.replace("cast", "crew"), LONG]
    rows = [record(i, text, "good" if i < 3 else "bad") for i, text in enumerate(texts)]
    found = result_of(clashes(rows, True))
    assert {"t:0", "t:3"} <= set(found)
    assert found["t:0"].similarity == 1


def test_repeated_rows_of_one_label_do_not_clash() -> None:
    rows = [record(1, LONG, "good"), record(2, LONG, "good "), record(3, "b", "bad"), record(4, "c", "good")]
    assert result_of(clashes(rows, True)) == {}


def test_open_answers_clash_where_the_question_is_the_same_and_not_where_it_is_nearly() -> None:
    rows = [record(1, LONG, "a"), record(2, LONG.replace("old", "stale"), "b"), record(3, LONG, "c")]
    assert set(result_of(clashes(rows, False))) == {"t:1", "t:3"}


def test_rows_set_apart_for_validation_are_judged_with_the_others(tmp_path: Path) -> None:
    live, rows = judged(tmp_path, {4, 55})
    cut, whole = 50, rows.train
    train = replace(whole, rows=cut, examples=whole.examples[:cut], records=whole.records[:cut])
    valid = replace(whole, name="valid", rows=10, examples=whole.examples[cut:], records=whole.records[cut:])
    parted = replace(rows, train=train, valid=valid, parted=True)
    suspects, scores = result_of(find_suspects(live, parted, 4096, 0.8))
    assert len(scores) == 60 and {"t:5", "t:56"} <= {suspect.location for suspect in suspects}
    given = replace(parted, parted=False)
    assert len(result_of(find_suspects(live, given, 4096, 0.8))[1]) == cut


def test_clashes_are_listed_though_the_model_agrees(tmp_path: Path) -> None:
    live, rows = judged(tmp_path, set())
    twin = replace(rows.train.records[0], location="t:2", answer="bad")
    rows.train.records[1] = twin
    suspects, _ = result_of(find_suspects(live, rows, 4096, 0.8))
    said = {suspect.location: suspect.why for suspect in suspects}
    assert "the same words stand at t:2 with 'bad'" in said["t:1"] and "at t:1" in said["t:2"]


def test_the_proof_says_whether_something_was_gained() -> None:
    before, after = (
        evaluation("a" * 40 + "b" * 40, "a" * 60 + "b" * 20),
        evaluation("a" * 40 + "b" * 40, "a" * 40 + "b" * 40),
    )
    assert "without 7 of 100 training rows, the model is better. Better: " in verdict(100, 7, before, after)
    assert "the model is worse" in verdict(100, 7, after, before)
    assert "7 of 100 training rows, nothing was gained. No clear" in verdict(100, 7, before, before)
    truth = "a" * 70 + "b" * 30
    weak, still_weak = evaluation(truth, "b" * 100), evaluation(truth, "a" * 30 + "b" * 70)
    assert "the model is better. Not good yet: " in verdict(100, 7, weak, still_weak)


@pytest.mark.parametrize(
    ("fixed", "broken", "said"),
    [
        (21, 12, "a gain is not clear (+4.5 points, -1.1 to +10.1)"),
        (12, 21, "nothing was gained (-4.5 points, -10.1 to +1.1)"),
        (4, 2, "nothing was gained (+1.0 points, -1.4 to +3.4)"),  # within its standard error
        (7, 2, "a gain is not clear (+2.5 points, -0.4 to +5.4)"),
        (3, 3, "nothing was gained (+0.0 points, -2.4 to +2.4)"),
        (24, 8, "the model is better"),
    ],
)
def test_a_gain_that_is_not_clear_is_not_called_none(fixed: int, broken: int, said: str) -> None:
    truth, same = "ab" * 100, 200 - fixed - broken
    first = truth[:same] + "".join("ba"[i % 2] if i < fixed else "ab"[i % 2] for i in range(fixed + broken))
    then = truth[:same] + "".join("ab"[i % 2] if i < fixed else "ba"[i % 2] for i in range(fixed + broken))
    shifted = truth[:same] + "".join("ab"[i % 2] for i in range(fixed + broken))
    assert f"training rows, {said}. " in verdict(600, 152, evaluation(shifted, first), evaluation(shifted, then))


@pytest.mark.parametrize(
    ("change", "said"), [(-0.1, "a gain is not clear (loss -0."), (0.1, "nothing was gained (loss +0.")]
)
def test_so_it_is_where_the_loss_decides(change: float, said: str) -> None:
    texts, noise = ["x"] * 40, [0.4 * (-1) ** i for i in range(40)]
    before, after = (
        read_only(texts, [None] * 40, (), losses=[1.0 + by * (change + one) for one in noise]) for by in (0, 1)
    )
    assert said in verdict(40, 2, before, after)


def test_a_run_s_own_time_tells_what_a_proof_takes() -> None:
    step = StepDone(1, 0.5, 1.0, 1.0, 0.1, 5, 5, 2.5, 100)
    assert predicted_seconds([step, replace(step, step=2)]) == 5.0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with a finished run on rows of which one has a wrong label, and two contradict each other."""
    made = Work.of_one_block(tmp_path_factory)
    rows = [{"text": example.prompt, "label": str(example.answer)} for example in labelled(40, {10})]
    made.lines("rows.jsonl", [*rows, {"text": LONG, "label": "good"}, {"text": LONG, "label": "bad"}])
    made.lines("valid.jsonl", rows[20:30])
    made.recipe(RECIPE, "flips.yaml")
    finetune(made, "train", "flips.yaml", "output=.").good()
    next(made.folder.glob("flips-2*")).rename(made.folder / "run")
    return made


def test_the_command_writes_a_table_with_file_line_and_reason(work: Work) -> None:
    said = finetune(work, "suspects", "run").good()
    with (work.folder / "run" / "suspects.csv").open(newline="", encoding="utf-8") as file:
        made = list(csv.DictReader(file))
    assert list(made[0]) == ["row", "answer", "likelier", "doubt", "why", "text"]
    assert {row["row"].rsplit("/", 1)[-1] for row in made} >= {"rows.jsonl:11", "rows.jsonl:41", "rows.jsonl:42"}
    assert all(row["why"] for row in made)
    assert "suspects among 42 rows" in said.out and "rows.jsonl:11" in said.out


def test_the_proof_trains_again_and_leaves_the_run_as_it_was(work: Work) -> None:
    run = work.folder / "run"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "suspects.csv"}
    said = finetune(work, "suspects", "run", "--prove", "5").good()
    assert "Proof: trained without" in said.out and "of 42 training rows" in said.out
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "suspects.csv"}
    assert after == before


def test_a_proof_that_cannot_end_in_time_is_refused_with_the_time_that_it_needs(work: Work) -> None:
    metrics = work.folder / "run" / "metrics.jsonl"
    saved = metrics.read_text()
    lines = [json.loads(line) for line in saved.splitlines()]
    metrics.write_text(
        "".join(json.dumps(one | ({"seconds": 100.0} if "seconds" in one else {})) + "\n" for one in lines)
    )
    try:
        assert "allow more minutes: --prove" in finetune(work, "suspects", "run", "--prove", "1").failed(2)
    finally:
        metrics.write_text(saved)


def test_other_rows_than_the_run_s_are_refused(work: Work) -> None:
    file = work.folder / "rows.jsonl"
    saved = file.read_text()
    file.write_text(saved.replace('"good"', '"bad"', 1))
    try:
        assert "other rows than the run began with" in finetune(work, "suspects", "run").failed(8)
    finally:
        file.write_text(saved)


def test_no_time_and_no_rows_end_a_proof_without_a_verdict(work: Work) -> None:
    from finetune.disk.run_folder import open_existing
    from finetune.training.job import making_ready

    opened, recipe = open_existing(work.folder / "run")
    job = result_of(making_ready(recipe, None, opened.path))
    assert result_of(without_rows(job, job.open(), opened, {"none"}, 0.0)) is None
    everything = {example.location for example in job.prepared.train.examples}
    with pytest.raises(DataError, match="every training row is suspect"):
        result_of(without_rows(job, job.open(), opened, everything, 60.0))

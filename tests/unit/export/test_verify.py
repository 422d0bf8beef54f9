"""What is said of an export whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.scoring import Written
from finetune.export.measure import Measured, share_kept
from finetune.export.verify import Check, model_checks, sentence

ROWS = 40


def evaluation(losses: Any, right: Any) -> Evaluation:
    """Rows of two tokens each, with these losses and correct where `right` says so."""
    results = tuple(
        RowResult(f"test.jsonl:{i + 1}", "p", "yes", "yes" if good else "no", bool(good), float(loss), 2)
        for i, (loss, good) in enumerate(zip(losses, right, strict=True))
    )
    accuracy = float(np.mean(right))
    return Evaluation(
        ROWS, 2 * ROWS, float(np.mean(losses)), 1.0, 1.0, accuracy, None, None, ("no", "yes"), None, results
    )


def measured(losses: Any, right: Any, error: float = 0.0, ended: bool = True, differ: int = 0) -> Measured:
    logprobs = (np.full(2, -loss - error, np.float32) for loss in losses)
    tokens = [(one, np.array([5, 6 if i >= differ else 7], np.int32)) for i, one in enumerate(logprobs)]
    answers = tuple(Written("yes" if i >= differ else "no", ended) for i in range(20))
    return Measured(evaluation(losses, right), tokens, answers)


RIGHT = np.arange(ROWS) % 10 != 0
BASE = evaluation(np.linspace(2.0, 3.0, ROWS), np.arange(ROWS) % 2 == 0)
LOSSES = np.linspace(0.5, 1.0, ROWS)
TUNED = measured(LOSSES, RIGHT)


def keeping(share: float) -> Any:
    """The losses of an export that keeps such a share of the tuning, more on some rows than on others."""
    base = np.array([row.loss for row in BASE.results])
    shares = share + np.linspace(-0.05, 0.05, ROWS)
    return base - shares * (base - LOSSES)


def checks(export: Measured, kind: str) -> dict[str, Check]:
    return {check.name: check for check in model_checks(Measured(BASE, [], []), TUNED, export, kind)}


def test_the_run_s_own_model_passes_every_check() -> None:
    for kind in ("f32", "f16", "bf16", "4bit", "q4_k_m"):
        found = checks(TUNED, kind)
        assert {check.holds for check in found.values()} == {"yes"}
        assert sentence(found.values(), "it", "") is None


@pytest.mark.parametrize(("share", "holds"), [(0.97, "yes"), (0.8, "warning"), (0.3, "no"), (-0.2, "no")])
def test_the_share_of_the_tuning_that_is_kept_decides(share: float, holds: str) -> None:
    found = checks(measured(keeping(share), RIGHT), "q4_k_m")["tuning that is kept"]
    assert found.holds == holds
    known = share_kept(BASE, TUNED.evaluation, evaluation(keeping(share), RIGHT))
    assert known is not None and known[1] < known[0] < known[2]
    assert known[0] == pytest.approx(share, abs=0.02) and f"{known[0]:.1%} (" in found.result


def test_where_training_changed_nothing_no_share_is_reported() -> None:
    assert share_kept(TUNED.evaluation, TUNED.evaluation, TUNED.evaluation) is None
    noise = evaluation(LOSSES + np.where(np.arange(ROWS) % 2, 0.1, -0.1), RIGHT)
    assert share_kept(noise, TUNED.evaluation, noise) is None


@pytest.mark.parametrize(
    ("kind", "error", "holds"),
    [
        ("f32", 5e-5, "yes"), ("f32", 5e-4, "no"), ("f16", 5e-3, "yes"), ("f16", 0.02, "no"), ("bf16", 0.02, "yes"),
        ("bf16", 0.1, "no"), ("q8_0", 0.5, "yes"), ("4bit", float("nan"), "no"),
    ],
)  # fmt: skip
def test_how_far_log_probabilities_may_be_depends_on_the_type(kind: str, error: float, holds: str) -> None:
    assert checks(measured(LOSSES, RIGHT, error), kind)["log-probabilities"].holds == holds


@pytest.mark.parametrize(
    ("kind", "differ", "holds"),
    [("f16", 1, "yes"), ("f16", 4, "no"), ("6bit", 7, "yes"), ("6bit", 9, "warning"), ("6bit", 17, "no")],
)
def test_most_probable_tokens_must_be_the_same(kind: str, differ: int, holds: str) -> None:
    assert checks(measured(LOSSES, RIGHT, differ=differ), kind)["most probable tokens"].holds == holds


@pytest.mark.parametrize(
    ("kind", "differ", "holds"), [("f32", 1, "no"), ("f16", 2, "yes"), ("f16", 3, "no"), ("q6_k", 20, "yes")]
)
def test_answers_must_be_equal_but_in_quantised_files(kind: str, differ: int, holds: str) -> None:
    assert checks(measured(LOSSES, RIGHT, differ=differ), kind)["answers"].holds == holds


def test_one_long_answer_of_few_may_fork_in_16_bits() -> None:
    few = [replace(one, answers=one.answers[:9]) for one in (measured(LOSSES, RIGHT, differ=n) for n in range(3))]
    holds = [
        {c.name: c.holds for c in model_checks(Measured(BASE, [], []), few[0], one, "f16")}["answers"] for one in few
    ]
    assert holds == ["yes", "yes", "no"]


@pytest.mark.parametrize("kind", ["f32", "bf16", "q4_k_m"])
def test_answers_that_do_not_end_are_refused_in_every_type(kind: str) -> None:
    found = checks(measured(LOSSES, RIGHT, ended=False), kind)
    assert found["ends of answers"].holds == "no"
    assert "does not know the token that ends an answer" in str(sentence([found["ends of answers"]], "it", "x"))


def test_an_accuracy_below_the_run_s_beyond_chance_is_refused() -> None:
    few, many = RIGHT.copy(), RIGHT.copy()
    few[1:4], many[1:20] = False, False
    assert checks(measured(LOSSES, few), "q4_k_m")["accuracy"].holds == "yes"
    worse = checks(measured(LOSSES, many), "q4_k_m")["accuracy"]
    assert worse.holds == "no" and worse.where == "test.jsonl:2"


def test_a_failure_is_one_sentence_with_what_loses_less() -> None:
    found = checks(measured(keeping(0.3), RIGHT), "q4_k_m").values()
    said = sentence(found, "gguf q4_k_m", "use --type q5_k_m")
    assert said is not None and said.startswith(
        "gguf q4_k_m does not do what the run's model does: tuning that is kept: "
    )
    assert said.endswith("; use --type q5_k_m")


def test_a_warning_is_no_failure() -> None:
    (warned,) = [check for check in checks(measured(keeping(0.8), RIGHT), "4bit").values() if check.holds == "warning"]
    assert sentence([warned, replace(warned, holds="yes")], "it", "") is None

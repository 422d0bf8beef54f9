"""The figures without the held-out rows that stand in the training rows too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.disk.run_folder import create
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import weighted_mean_interval, wilson_interval
from finetune.evaluation.leaked import leaked_rows
from finetune.recipe.load import check_recipe
from tests.unit.toy_run import load_job, run_to_report


def evaluation(correct: list[bool | None], labels: tuple[str, ...] = ("a", "b")) -> Evaluation:
    rows = tuple(RowResult(f"t:{i}", "", "a", "a", one, 0.1 * i, i + 1) for i, one in enumerate(correct))
    judged = correct[0] is not None
    accuracy = sum(map(bool, correct)) / len(correct) if judged else None
    return Evaluation(len(rows), 9, 1.0, 2.7, 0.5, accuracy, None, None, labels if judged else (), None, rows)


BASE, TUNED = [False, True, False, False, True], [True, True, True, False, True]


def test_the_figures_of_all_rows_and_of_the_others_stand_beside_each_other() -> None:
    found = leaked_rows(evaluation(BASE), evaluation(TUNED), {"t:0", "t:2", "elsewhere:1"})
    assert found is not None
    told = found.to_json()
    assert (told["rows"], told["leaked"], told["measure"]) == (5, 2, "accuracy")
    assert told["all_rows"]["base"] == {"value": 0.4, "interval": wilson_interval(2, 5)}
    assert told["all_rows"]["tuned"] == {"value": 0.8, "interval": wilson_interval(4, 5)}
    assert told["others"]["base"] == told["others"]["tuned"] == {"value": 2 / 3, "interval": wilson_interval(2, 3)}
    assert found.message == (
        "Leaked: 2 of these 5 rows stand in the training rows too. Accuracy on all: 0.400 (0.118 to 0.769) before, "
        "0.800 (0.376 to 0.964) after; without them: 0.667 (0.208 to 0.939) before, 0.667 (0.208 to 0.939) after."
    )


def test_nothing_is_said_where_nothing_leaked() -> None:
    assert leaked_rows(evaluation(BASE), evaluation(TUNED), frozenset()) is None
    assert leaked_rows(None, evaluation(TUNED), {"train:1"}) is None


def test_where_all_rows_leaked_there_is_no_other_figure() -> None:
    found = leaked_rows(None, evaluation([True]), {"t:0"})
    assert found is not None and found.to_json()["others"] is None and found.to_json()["all_rows"]["base"] is None
    assert "1 of these 1 rows stands" in found.message and "say nothing" in found.message


def test_plain_text_has_its_loss() -> None:
    found = leaked_rows(evaluation([None] * 4), evaluation([None] * 4), {"t:3"})
    assert found is not None and found.others is not None and found.others[0] is not None
    assert found.measure == "loss" and found.others[1].value == pytest.approx((0.0 * 1 + 0.1 * 2 + 0.2 * 3) / 6)
    assert found.others[0].interval == weighted_mean_interval([0.0, 0.1, 0.2], [1, 2, 3])


def test_open_answers_are_told_by_exact_match() -> None:
    found = leaked_rows(None, evaluation(TUNED, ()), {"t:1"})
    assert found is not None and "Exact match on all: 0.800 (0.376 to 0.964); without them: 0.750" in found.message


@pytest.mark.parametrize("leaking", [True, False])
def test_a_run_says_it_in_its_report(tmp_path: Path, leaking: bool) -> None:
    """Two of the test rows are training rows in other letters."""
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    train = [{"text": f"a {word} film {i}", "label": word} for i in range(6) for word in ("warm", "dull")]
    test = [{"text": f"one {word} book {i}", "label": word} for i in range(3) for word in ("warm", "dull")]
    if leaking:
        test += [row | {"text": row["text"].upper()} for row in train[:2]]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = check_recipe(
        {
            "model": {"path": str(model_with_tokenizer(tmp_path / "model"))},
            "data": {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
            "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]},
            "train": {"steps": 1, "batch_size": 4},
            "backend": "reference",
            "output": str(tmp_path / "runs"),
        }
    )
    run = create(recipe, "toy")
    run_to_report(load_job(recipe), run)
    told, page = json.loads(run.report.read_text())["leaked"], " ".join((run.path / "report.txt").read_text().split())
    if leaking:
        assert (told["rows"], told["leaked"]) == (8, 2) and "Leaked: 2 of these 8 rows stand in the" in page
        assert run.words.exists() and "naive Bayes on the words: 8 rows in 0." in page
    else:
        assert told is None and "Leaked" not in page

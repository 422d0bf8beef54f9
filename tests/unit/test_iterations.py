"""Runs over iterations: which rows changed, which kinds are fixed, and what is chance."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest

from finetune.console import Console
from finetune.errors import Incompatible
from finetune.evaluation.error_kinds import Analysis, Kind
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.intervals import holm, mcnemar_exact
from finetune.evaluation.iterations import compare_runs
from finetune.evaluation.row_shares import Found
from finetune.evaluation.verdict import comparison_verdict
from finetune.report.iteration_tables import print_iterations
from finetune.report.iterations import compared
from finetune.report.page.compare_page import compare_page
from finetune.report.run_differences import beyond_defaults, differences, seed_alone
from tests.unit.finished_runs import answers, evaluation, finished

RNG = np.random.default_rng(5)
ROWS = {"rows": {"train": "a", "test": "b"}, "base_model": {"files": {}}}


def some(count: int, wrong: int) -> list[bool]:
    return [i >= wrong for i in range(count)]


def test_holm_is_the_textbook_s() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_never_changes_the_order_and_errs_in_five_percent_of_families() -> None:
    """Under the null every p-value is uniform: some corrected one is below 0.05 in 5 % of families of ten."""
    families = RNG.uniform(size=(2000, 10))
    hits = 0
    for family in families:
        corrected = holm(family.tolist())
        assert [corrected[i] for i in np.argsort(family)] == sorted(corrected)
        hits += min(corrected) < 0.05
    assert 0.03 < hits / len(families) < 0.07


def test_the_same_run_twice_has_no_change() -> None:
    run = answers(some(60, 20))
    found = compare_runs([run, run, run], [None] * 3)
    assert [step.errors.verdict for step in found.steps] == ["No change"] * 3
    for shift in [step.errors for step in found.steps] + [s for line in found.kinds for s in line.shifts]:
        assert (shift.fixed, shift.new, shift.p_value, shift.corrected) == ((), (), 1.0, 1.0)


def test_every_row_is_fixed_still_there_or_new() -> None:
    before, after = answers([False, False, True, True]), answers([True, False, False, True])
    (step,) = compare_runs([before, after], [None, None]).steps
    assert (step.errors.fixed, step.errors.still, step.errors.new) == ((0,), (1,), (2,))
    assert step.errors.p_value == mcnemar_exact(1, 1)


def test_a_remedy_is_named_as_fixed_and_a_kind_that_stays_is_not() -> None:
    """Of three labels, the second run mends those taken for the third, and the third run nothing more."""
    expected = ["a"] * 40 + ["b"] * 40
    first = ["c"] * 20 + ["a"] * 20 + ["c"] * 15 + ["b"] * 25
    second = ["c"] * 2 + ["a"] * 38 + ["c"] * 15 + ["b"] * 25
    runs = [evaluation(expected, chosen, ("a", "b", "c")) for chosen in (first, second, second)]
    found = compare_runs(runs, [None] * 3)
    lines = {line.labels: line for line in found.kinds}
    assert [shift.verdict for shift in lines["a", "c"].shifts] == ["Fixed", "No change", "Fixed"]
    assert lines["a", "c"].shifts[0].corrected < 0.05
    assert [shift.verdict for shift in lines["b", "c"].shifts] == ["No change"] * 3
    assert [step.errors.verdict for step in found.steps] == ["Better", "No change", "Better"]
    assert found.advice[0].labels == ("b", "c") and found.advice[0].always == 15


def test_what_one_run_breaks_is_called_worse() -> None:
    (step,) = compare_runs([answers(some(60, 2)), answers(some(60, 22))], [None] * 2).steps
    assert step.errors.verdict == "Worse" and len(step.errors.new) == 20


def test_several_comparisons_are_corrected() -> None:
    """8 of 9 changed rows fixed: p = 0.039 alone, and no more once three comparisons are made."""
    first, second = [False] * 8 + [True] * 92, [True] * 8 + [False] + [True] * 91
    alone = compare_runs([answers(first), answers(second)], [None] * 2).steps[0].errors
    assert alone.p_value == alone.corrected == pytest.approx(0.0391, abs=1e-4) and alone.verdict == "Better"
    several = compare_runs([answers(first), answers(second), answers(first)], [None] * 3).steps
    assert several[0].errors.corrected == pytest.approx(0.0781, abs=1e-4)
    assert several[0].errors.verdict == "No clear difference"


def test_chance_is_called_better_or_worse_in_five_percent_of_comparisons_at_most() -> None:
    called = 0
    for _ in range(400):
        first, second = (RNG.uniform(size=120) < 0.7 for _ in range(2))
        found = compare_runs([answers(first.tolist()), answers(second.tolist())], [None] * 2)
        called += found.steps[0].errors.verdict in ("Better", "Worse")
    assert called / 400 <= 0.05


def test_recorded_kinds_are_compared_where_all_runs_have_them() -> None:
    def analysis(rows: list[int]) -> Analysis:
        return Analysis(kinds=(Kind("long", 50, None, Found.of(rows, 50)),))

    open_answers = evaluation(["yes"] * 50, ["yes"] * 25 + ["no"] * 25, labels=())
    runs = [finished(open_answers, analysis=analysis(rows)) for rows in (list(range(20)), [0, 49])]
    found = compared(runs)
    (line,) = found.iterations.kinds
    assert (line.name, line.counts) == ("long", (20, 2))
    assert line.shifts[0].verdict == "Fixed" and line.shifts[0].new == (49,)
    mixed = compared([runs[0], replace(runs[1], analysis=None)])
    assert {line.name for line in mixed.iterations.kinds} == {"wrong"} and "Not every run" in mixed.notes[0]


def test_without_right_and_wrong_the_loss_is_compared() -> None:
    losses = RNG.uniform(1, 2, 80)
    runs = [
        evaluation([None] * 80, [None] * 80, labels=(), losses=(losses + shift).tolist())
        for shift in (0.0, -0.1 + RNG.normal(0, 0.05, 80), 0.0)
    ]
    found = compare_runs(runs, [None] * 3)
    assert found.measure == "loss"
    assert [step.errors.verdict for step in found.steps] == ["Better", "Worse", "No change"]
    low, high = found.steps[0].loss_interval or (0, 0)
    assert low < found.steps[0].loss_change < high < 0


def test_open_answers_that_never_match_are_compared_by_loss() -> None:
    runs = [evaluation(["yes"] * 9, ["no"] * 9, labels=()), evaluation(["yes"] * 9, ["nay"] * 9, labels=())]
    assert compare_runs(runs, [None] * 2).measure == "loss"


@pytest.mark.parametrize(
    ("fixed", "broken", "gain"), [(0, 0, 0.3), (3, 2, 0.3), (1, 4, -0.3), (6, 0, -0.3), (5, 0, 0.0)]
)
@pytest.mark.parametrize("labelled", [False, True])
def test_compare_and_the_run_s_own_verdict_say_the_same(fixed: int, broken: int, gain: float, labelled: bool) -> None:
    """Of 60 rows some are fixed and some broken, and the loss falls by `gain`."""
    before = ["yes"] * 10 + ["no"] * 50
    after = ["no"] * broken + ["yes"] * (10 - broken) + ["yes"] * fixed + ["no"] * (50 - fixed)
    losses = [1.0 + 0.01 * (i % 9) for i in range(60)]
    labels = ("yes", "no") if labelled else ()
    moved = [loss - gain + 0.02 * (i % 2) for i, loss in enumerate(losses)]
    base = evaluation(["yes"] * 60, before, labels, losses=losses)
    tuned = evaluation(["yes"] * 60, after, labels, losses=moved if gain else losses)
    told = comparison_verdict(base, tuned, mcnemar_exact(fixed, broken))
    told_again = compared([finished(base), finished(tuned, name="later")])
    word, by = told.split(": ")[0], told.split(": ")[1].split()[0]
    assert told_again.sentence.split(": ")[1].split()[0] == by
    if word != "Not good yet":  # against a constant answer, of which runs compared say nothing
        assert told_again.iterations.steps[0].errors.verdict.replace("No change", "No clear difference") == word
    (step,) = told_again.iterations.steps
    assert (len(step.errors.fixed), len(step.errors.new)) == (fixed, broken)
    assert (step.loss_change is None) == (labelled or fixed + broken >= 6)


def test_few_answers_changed_beside_many_are_one_family() -> None:
    """The first step by its loss, the second by its answers: both p-values are corrected together."""
    losses = [1.0 + 0.01 * (i % 9) for i in range(60)]
    answers_of = [["yes"] * right + ["no"] * (60 - right) for right in (10, 13, 40)]
    runs = [
        evaluation(
            ["yes"] * 60, said, (), losses=[loss - 0.1 * i + 0.01 * (j % 2) * i for j, loss in enumerate(losses)]
        )
        for i, said in enumerate(answers_of)
    ]
    told = compared([finished(run, name=f"run{i}") for i, run in enumerate(runs)])
    first, second, whole = told.iterations.steps
    assert first.loss_change == pytest.approx(-0.095) and second.loss_change is whole.loss_change is None
    assert [step.errors.verdict for step in told.iterations.steps] == ["Better"] * 3
    page = compare_page(told)
    assert "where too few answers changed for it, of the change of the loss" in page and "-0.0950" in page
    console = Console(record=True, width=80, file=io.StringIO())
    print_iterations(console, told)
    assert "change of loss" in (text := console.export_text()) and "-0.0950" in text


def test_another_seed_alone_is_not_called_better() -> None:
    """The rows say better at p < 0.001; but that is this draw against that one, and not a change of the recipe."""
    first, second = answers(some(60, 30)), answers(some(60, 5))
    seeds = compared([finished(first), finished(second, seed=1)])
    assert seeds.iterations.steps[0].errors.verdict == "Only the seed differs"
    assert seeds.sentence.startswith("Only the seed differs: ") and "draw alone" in seeds.sentence
    rates = compared([finished(first), finished(second, seed=1, train={"learning_rate": 1e-3})])
    assert rates.iterations.steps[0].errors.verdict == "Better"


@pytest.mark.parametrize(
    ("before", "after", "alone"),
    [
        ({}, {"seed": 1}, True),
        ({}, {"seed": 1, "output": "elsewhere"}, True),
        ({}, {}, False),
        ({}, {"seed": 1, "lora": {"rank": 16}}, False),
        ({"data": {"train": "a.jsonl"}}, {"data": {"train": "b.jsonl"}, "seed": 1}, True),  # the same rows, moved
    ],
)
def test_what_counts_as_the_seed_alone(before: dict, after: dict, alone: bool) -> None:
    run = answers([True])
    assert seed_alone(finished(run, **before), finished(run, **after)) is alone


def test_other_training_rows_are_no_matter_of_the_seed() -> None:
    run = answers([True])
    other = ROWS | {"rows": {"train": "other", "test": "b"}}
    assert [one.what for one in differences(finished(run), finished(run, identity=other))] == ["train rows"]
    apart = finished(run, identity=other, seed=1)  # the seed sets validation rows apart, and so draws the others too
    assert seed_alone(finished(run), apart)
    data = {"train": "train.jsonl", "valid": "valid.jsonl", "test": "rows.jsonl"}
    assert not seed_alone(finished(run, data=data), finished(run, identity=other, seed=1, data=data))


def test_differences_name_keys_rows_and_versions() -> None:
    first = finished(answers([True]))
    other = finished(answers([True]), lora={"rank": 32}, identity=ROWS | {"base_model": {"files": {"x": "y"}}})
    environment = replace(other.environment, libraries={"numpy": "3"})
    told = differences(first, replace(other, environment=environment))
    assert [(one.what, one.before, one.after) for one in told] == [
        ("lora.rank", "8", "32"),
        ("base model", "its files", "other files"),
        ("version of numpy", "2", "3"),
    ]


def test_what_a_recipe_sets_is_told_from_the_defaults() -> None:
    recipe = finished(answers([True]), train={"epochs": 3, "batch_size": 16}).recipe
    assert [key for key, _, _ in beyond_defaults(recipe)] == ["model.path", "data.train", "data.test", "train.epochs"]


def test_other_rows_are_refused_with_the_remedy() -> None:
    first = finished(evaluation(["good"] * 4, ["good"] * 4, prompts=["a x", "b y", "c z", "d w"]))
    other = finished(evaluation(["good"] * 4, ["good"] * 4, prompts=["a x", "b y", "c z", "e v"]), name="other")
    with pytest.raises(Incompatible, match=r"other: measured on other rows.*3 are among.*\n.*--measure"):
        compared([first, other])
    with pytest.raises(Incompatible):
        compared([first, finished(evaluation(["good"] * 3, ["good"] * 3, prompts=["a x", "b y", "c z"]))])


def test_the_same_rows_in_another_order_are_set_in_order() -> None:
    prompts = [f"row {i} ." for i in range(30)]
    right = some(30, 12)
    expected, chosen = ["good"] * 30, ["good" if one else "bad" for one in right]
    first = finished(evaluation(expected, chosen, prompts=prompts))
    turned = finished(evaluation(expected, chosen[::-1], prompts=prompts[::-1]))
    found = compared([first, turned])
    assert found.iterations.steps[0].errors.verdict == "No change"
    assert found.iterations.steps[0].errors.still == tuple(range(12))


def test_the_same_rows_under_another_template_are_the_same_rows() -> None:
    texts = ["a fine film", "the worst of all", "so so"]

    def under(template: str) -> Evaluation:
        return evaluation(["good"] * 3, ["good"] * 3, prompts=[template.format(text) for text in texts])

    plain = finished(under("{}\n\nThis review is"))
    for template in ("Review: {}\nSentiment:", "{}", "<|user|> {} <|end|>"):
        assert compared([plain, finished(under(template))]).iterations.steps[0].errors.verdict == "No change"


def test_figures_as_json_have_every_row_and_change() -> None:
    found = compared([finished(answers(some(40, 20))), finished(answers(some(40, 4)), name="later", seed=3)])
    values = json.loads(json.dumps(found.to_json()))
    assert [run["name"] for run in values["runs"]] == ["run", "later"]
    assert values["steps"][0]["errors"]["fixed"] == list(range(4, 20))
    assert values["steps"][0]["changes"] == [{"what": "seed", "before": "0", "after": "3"}]
    assert values["verdict"] == found.sentence

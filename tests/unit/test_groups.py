"""Groups, lengths and swapped words: a difference that is there is said, and chance is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import fisher_exact as reference

from finetune.errors import RecipeError
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.groups import PRONOUNS, by_length, flips, sentences, slices, swapped, swaps_of
from finetune.evaluation.intervals import fisher_exact, holm
from finetune.recipe.load import check_recipe


def evaluation(right: list[bool], answers: list[str] | None = None) -> Evaluation:
    said = answers or ["x"] * len(right)
    results = tuple(RowResult(f"a:{i}", "?", "x", said[i], one, 1.0, 2) for i, one in enumerate(right))
    share = sum(right) / len(right)
    return Evaluation(len(right), 2, 1.0, 2.7, 0.5, share, (0.0, 1.0), None, ("x", "y"), None, results)


GROUPS = {"women": list(range(0, 400, 2)), "men": list(range(1, 400, 2))}


def told(seed: int, women: float, men: float) -> list[str]:
    """200 rows of each, right with these shares, and the same base."""
    drawn = np.random.default_rng(seed).random(400) < np.tile([women, men], 200)
    other = np.random.default_rng(seed + 1000).random(400) < (women + men) / 2
    return sentences(slices(evaluation(other.tolist()), evaluation(drawn.tolist()), {"group": GROUPS}))


def test_a_difference_of_20_points_is_found_and_chance_is_not() -> None:
    assert sum(bool(told(seed, 0.6, 0.8)) for seed in range(20)) >= 19
    assert sum(bool(told(seed, 0.7, 0.7)) for seed in range(20)) <= 1


def test_what_is_said_names_the_group_its_rows_and_the_base() -> None:
    said = told(0, 0.6, 0.8)
    assert len(said) == 2 and "on the 200 held-out rows of women" in said[0] and "no clear difference" in said[0]


def test_two_groups_that_are_each_others_rest_are_one_test() -> None:
    found = slices(None, evaluation([True] * 200 + [False] * 200), {"group": {"a": range(200), "b": range(200, 400)}})
    assert found[0].p_tuned == found[1].p_tuned == pytest.approx(reference([[200, 0], [0, 200]])[1])
    assert found[0].base is None and found[0].p_base is None


def test_many_groups_are_corrected_for() -> None:
    rng = np.random.default_rng(3)
    false = 0
    for _ in range(40):
        groups = {f"{i}": list(range(i * 40, i * 40 + 40)) for i in range(10)}
        false += any(
            one.p_tuned is not None and one.p_tuned < 0.05
            for one in slices(None, evaluation((rng.random(400) < 0.7).tolist()), {"group": groups})
        )
    assert false <= 4


def test_small_slices_and_slices_of_all_rows_are_not_compared() -> None:
    found = slices(None, evaluation([True] * 20), {"group": {"few": range(3), "all": range(20), "none": []}})
    assert [(one.name, one.p_tuned) for one in found] == [("few", None)]


def test_lengths_come_in_four_parts() -> None:
    assert [*by_length([*range(1, 101)])] == [
        "1 to 25 tokens",
        "26 to 50 tokens",
        "51 to 75 tokens",
        "76 to 100 tokens",
    ]
    assert by_length([7] * 9) == {"7 tokens": [*range(9)]}
    parts = by_length([3, 3, 3, 3, 9, 50])
    assert sorted(row for rows in parts.values() for row in rows) == [0, 1, 2, 3, 4, 5]
    assert by_length([]) == {}


@pytest.mark.parametrize("table", [(3, 1, 1, 3), (10, 2, 3, 15), (0, 5, 5, 0), (7, 7, 7, 7), (120, 80, 90, 110)])
def test_fishers_test_is_scipys(table: tuple[int, int, int, int]) -> None:
    a, b, c, d = table
    assert fisher_exact(a, b, c, d) == pytest.approx(reference([[a, b], [c, d]])[1], rel=1e-6)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


# Swaps


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("She lost her keys.", "He lost his keys."),
        ("HER MOTHER saw him", "HIS FATHER saw her"),
        ("The sheriff and the shed", "The sheriff and the shed"),
        ("Mrs Brown and the Girls", "Mr Brown and the Boys"),
    ],
)
def test_words_are_swapped_whole_and_written_alike(text: str, other: str) -> None:
    assert swapped(text, PRONOUNS) == other


def test_a_list_of_ones_own_goes_both_ways() -> None:
    assert swapped("Anna and Ali, ANNA", [["Anna", "Ali"]]) == "Ali and Anna, ALI"
    assert swapped("a+b", [["a+b", "c"]]) == "c" and swapped("as it is", []) == "as it is"


def test_flips_are_counted_before_and_after() -> None:
    base = evaluation([True] * 10, ["x"] * 10)
    asked = list(range(10))
    before = flips(asked, base, ["y"] * 8 + ["x"] * 2, PRONOUNS, labelled=True)
    after = flips(asked, base, ["x"] * 10, PRONOUNS, labelled=True)
    told = swaps_of(asked, before, after)
    assert before.rows == tuple(range(8)) and after.count == 0
    assert told.p_value == pytest.approx(2 / 2**8)
    assert "in 10 held-out rows: of the base model 80.0%" in told.message


def test_an_open_answer_may_follow_the_swap() -> None:
    first = evaluation([True, True], ["She went home.", "She went home."])
    found = flips([0, 1], first, ["He went home", "He stayed."], PRONOUNS, labelled=False)
    assert found.rows == (1,)


@pytest.mark.parametrize("swaps", [[["she"]], [["she", ""]], "names", [["a", "b", "c"]], [[1, 2]]])
def test_a_list_that_is_none_is_refused(swaps: object) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.swaps"):
        check_recipe({"model": {"path": "."}, "data": {"train": "a.jsonl"}, "evaluate": {"swaps": swaps}})


def test_pronouns_and_pairs_are_a_list() -> None:
    for swaps in ("none", "pronouns", [["she", "he"], ["Anna", "Ali"]]):
        values = {"model": {"path": "."}, "data": {"train": "a.jsonl"}, "evaluate": {"swaps": swaps}}
        assert check_recipe(values).evaluate.swaps == swaps

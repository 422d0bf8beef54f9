"""Strengths from votes: against sums worked out by hand, simulated judges, and judges who look at the side alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from finetune.evaluation.bradley_terry import Choice, Vote, about_position, position_bias, standings
from finetune.evaluation.duel import Answered, left_to_vote, meetings


def vote(left: str, right: str, choice: Choice, row: str = "a.jsonl:1") -> Vote:
    return Vote(row, left, right, choice, f"of {left}", f"of {right}")


def votes(first: str, second: str, won: int, lost: int, tied: int = 0) -> list[Vote]:
    """Half of them with the first on the left."""
    outcomes = [first] * won + [second] * lost + [""] * tied
    made = []
    for i, winner in enumerate(outcomes):
        left, right = (first, second) if i % 2 else (second, first)
        made.append(vote(left, right, "tie" if not winner else "left" if winner == left else "right"))
    return made


@pytest.mark.parametrize(("won", "lost"), [(13, 7), (7, 13), (20, 0), (0, 1), (500, 400)])
def test_two_models_have_the_logarithm_of_their_odds(won: int, lost: int) -> None:
    told = standings(["a", "b"], votes("a", "b", won, lost))
    assert told is not None
    stands = {stand.model: stand for stand in told.models}
    gap = stands["a"].strength - stands["b"].strength
    assert gap == pytest.approx(math.log((won + 0.5) / (lost + 0.5)), abs=1e-9)
    half = 1.959964 * math.sqrt(1 / (won + 0.5) + 1 / (lost + 0.5))
    low, high = stands["a"].interval
    assert high - low == pytest.approx(half, rel=1e-6)  # of half the gap
    assert stands["a"].strength == pytest.approx(-stands["b"].strength)
    assert (stands["a"].won, stands["a"].lost, stands["b"].won) == (won, lost, lost)
    elo = {name: stand.elo[0] for name, stand in stands.items()}
    assert elo["a"] + elo["b"] == pytest.approx(2000) and elo["a"] - elo["b"] == pytest.approx(400 / math.log(10) * gap)
    assert told.models[0].model == ("a" if won >= lost else "b")
    (preferred,) = told.preferences
    assert preferred.share == pytest.approx(1 / (1 + math.exp(-abs(gap))))


def test_ties_are_half_a_win_and_make_the_interval_narrow() -> None:
    def width(won: int, lost: int, tied: int) -> float:
        told = standings(["a", "b"], votes("a", "b", won, lost, tied))
        assert told is not None
        low, high = told.preferences[0].interval
        return high - low

    told = standings(["a", "b"], votes("a", "b", 10, 10, 80))
    assert told is not None and told.models[0].strength == pytest.approx(0, abs=1e-9)
    assert width(10, 10, 80) < 0.6 * width(50, 50, 0)
    assert width(10, 10, 80) < width(10, 10, 0)


def test_skipped_votes_and_strangers_do_not_count() -> None:
    counted = votes("a", "b", 8, 3)
    others = [*(vote("a", "b", "skip") for _ in range(9)), *votes("a", "c", 9, 0)]
    assert standings(["a", "b"], [*counted, *others]) == standings(["a", "b"], counted)


def test_three_models_through_one_that_met_both() -> None:
    told = standings(["a", "b", "c"], [*votes("a", "b", 300, 100), *votes("b", "c", 300, 100)])
    assert told is not None
    assert [stand.model for stand in told.models] == ["a", "b", "c"]
    gaps = {(one.first, one.second): one.share for one in told.preferences}
    assert gaps["a", "b"] == pytest.approx(0.75, abs=0.01) and gaps["b", "c"] == pytest.approx(0.75, abs=0.01)
    assert gaps["a", "c"] == pytest.approx(0.9, abs=0.01)  # odds of 3 times 3
    assert sum(stand.strength for stand in told.models) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "given", [[], votes("a", "b", 9, 2), [*votes("a", "b", 9, 2), *votes("c", "d", 9, 2)], [vote("a", "c", "skip")]]
)
def test_models_that_votes_do_not_link_are_not_compared(given: list[Vote]) -> None:
    assert standings(["a", "b", "c", "d"], given) is None


def covered(judges: int, each: int, share: float, ties: float = 0.0, seed: int = 0) -> float:
    """In how many of so many judgements the interval has the true gap."""
    rng, truth, hits = np.random.default_rng(seed), math.log(share / (1 - share)), 0
    for _ in range(judges):
        tied = int(rng.binomial(each, ties))
        won = int(rng.binomial(each - tied, share))
        told = standings(["a", "b"], votes("a", "b", won, each - tied - won))
        assert told is not None
        low, high = next(stand.interval for stand in told.models if stand.model == "a")
        hits += low <= truth / 2 <= high
    return hits / judges


@pytest.mark.slow
@pytest.mark.parametrize("each", [30, 50, 100, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_of_a_thousand_judges_cover_the_truth(each: int, seed: int) -> None:
    assert 0.93 <= covered(1000, each, 0.65, seed=seed) <= 0.97
    assert 0.93 <= covered(1000, each, 0.5, ties=0.2, seed=seed) <= 0.975


def test_intervals_of_a_hundred_judges_cover_the_truth() -> None:
    assert 0.88 <= covered(100, 60, 0.65) <= 1.0


@pytest.mark.slow
def test_intervals_of_a_tournament_cover_the_truth() -> None:
    strengths = dict(zip("abcd", (-0.6, -0.1, 0.2, 0.5), strict=True))
    rng, hits, trials = np.random.default_rng(0), 0, 0
    for _ in range(500):
        made = []
        for first, second in ("ab", "ac", "ad", "bc", "bd", "cd"):
            won = int(rng.binomial(30, 1 / (1 + math.exp(strengths[second] - strengths[first]))))
            made += votes(first, second, won, 30 - won)
        told = standings("abcd", made)
        assert told is not None
        for stand in told.models:
            hits += stand.interval[0] <= strengths[stand.model] <= stand.interval[1]
            trials += 1
    assert 0.93 <= hits / trials <= 0.97


@pytest.mark.parametrize(("choices", "biased"), [("l" * 12, True), ("r" * 12, True), ("l" * 30 + "r" * 9, True)])
def test_a_judge_of_one_side_is_reported(choices: str, biased: bool) -> None:
    given = [vote("a", "b", "left" if one == "l" else "right") for one in choices]
    left, right, p_value = position_bias(given)
    assert (left, right) == (choices.count("l"), choices.count("r")) and (p_value < 0.01) == biased
    told = about_position(given)
    assert told.startswith("Position bias: ") and ("left side won" in told) == (left > right)


@pytest.mark.parametrize("choices", ["", "lr" * 20, "lll", "l" * 14 + "r" * 9, "ttt"])
def test_a_judge_of_the_answers_is_not(choices: str) -> None:
    kinds: dict[str, Choice] = {"l": "left", "r": "right", "t": "tie"}
    assert about_position([vote("a", "b", kinds[one]) for one in choices]).startswith("Position: no sign")


ROWS = [Answered(f"a.jsonl:{i}", f"what is {i}?", {"a": f"a {i}", "b": f"b {i}", "c": f"c {i}"}) for i in range(60)]


def test_meetings_are_drawn_once_and_stay_whoever_else_takes_part() -> None:
    two, three = meetings(ROWS, ["b", "a"], 0), meetings(ROWS, ["a", "b", "c"], 0)
    assert len(two) == 60 and len(three) == 180
    assert [one for one in three if {one.left, one.right} == {"a", "b"}] == two
    assert two == meetings(ROWS, ["a", "b"], 0) != meetings(ROWS, ["a", "b"], 1)
    assert [one.row for one in two] != sorted(one.row for one in two)
    assert 15 < sum(one.left == "a" for one in two) < 45
    assert all(one.left_answer == f"{one.left} {one.row.rpartition(':')[2]}" for one in three)


def test_equal_answers_do_not_meet() -> None:
    rows: Sequence[Answered] = [Answered("a:1", "x", {"a": "yes ", "b": "yes", "c": "no"})]
    assert {frozenset((one.left, one.right)) for one in meetings(rows, ["a", "b", "c"], 0)} == {
        frozenset("ac"),
        frozenset("bc"),
    }


def test_what_was_voted_on_is_not_asked_again_unless_the_answers_are_new() -> None:
    drawn = meetings(ROWS, ["a", "b"], 0)
    given = [drawn[0].voted("left"), drawn[1].voted("skip")]
    turned = Vote(drawn[2].row, drawn[2].right, drawn[2].left, "tie", drawn[2].right_answer, drawn[2].left_answer)
    assert left_to_vote(drawn, [*given, turned]) == drawn[3:]
    other = [Answered(row.row, row.prompt, row.answers | {"a": "new"}) for row in ROWS]
    assert len(left_to_vote(meetings(other, ["a", "b"], 0), [*given, turned])) == 60

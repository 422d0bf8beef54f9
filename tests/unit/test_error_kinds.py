"""Kinds of error: found where they are planted, not where an answer is sound, and counted with their rows."""

from __future__ import annotations

import pytest

from finetune.console import plain_page
from finetune.data.rows import Example
from finetune.evaluation.answer_form import is_empty, is_long, lacks_format, repeats
from finetune.evaluation.consistency import disagree, in_other_words, inconsistent
from finetune.evaluation.error_kinds import Analysis, Data, confusions, kinds_of_answers
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.groups import slices
from finetune.evaluation.hallucination import Known, invented
from finetune.evaluation.spelling import language_of, speller
from finetune.report.summary import render_analysis
from tests.planted import EACH, KINDS, measured, planted

pytest.importorskip("spellchecker")
NOTHING = Known(frozenset(), frozenset())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_of_300_planted_answers_each_kind_is_found_and_hardly_another(seed: int) -> None:
    rows = planted(seed)
    assert [sum(row.kind == kind for row in rows) for kind in (None, *KINDS)] == [100, *[EACH] * 5]
    for kind, (precision, recall) in measured(rows).items():
        least = (0.8, 0.8) if kind in ("inconsistency", "hallucination") else (0.95, 0.9)
        assert precision >= least[0] and recall >= least[1], (kind, precision, recall)


@pytest.mark.parametrize(
    "answer",
    [
        "good good good good good",
        "Yes. Yes. Yes. Yes. Yes. Yes.",
        "I like it very much. I like it very much.",
        "1 2 3 1 2 3 1 2 3 1 2 3",
        "la" * 100,
        "no\n" * 8,
    ],
)
def test_loops_are_repetition(answer: str) -> None:
    assert repeats(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "No, no, no: not like that.",
        "She had had enough, and that that was so she knew.",
        "Row, row, row your boat, gently down the stream.",
        "The river rose for three days, and on the fourth day the old bridge gave way, so the road was closed.",
    ],
)
def test_what_is_said_twice_for_good_reason_is_none(answer: str) -> None:
    assert not repeats(answer)


def test_a_refrain_that_is_expected_is_no_error() -> None:
    song = "Hey ho, the wind and the rain. Hey ho, the wind and the rain. Hey ho, the wind and the rain."
    assert repeats(song) and not repeats(song, song)


def test_long_is_far_beyond_the_expected_length() -> None:
    assert is_long("It is Paris, which lies on the Seine, and there is much more that one could say about it.", "Paris")
    assert not is_long("The capital of France is Paris.", "Paris")
    assert not is_long("word " * 30, "other " * 20)


@pytest.mark.parametrize(
    ("answer", "lacks"), [('{"a": 1}', False), ("a: 1", True), ("", True), ("```\n[1]\n```", False)]
)
def test_json_is_a_format_where_it_is_expected(answer: str, lacks: bool) -> None:
    assert lacks_format(answer, '{"b": 2}') is lacks
    assert not lacks_format(answer, "5")


def test_empty_is_nothing_to_read() -> None:
    assert is_empty("") and is_empty(" \n\t") and not is_empty("?")


@pytest.mark.parametrize(
    ("language", "text", "wrong"),
    [
        ("en", "They recieved the parcel tommorow", ["recieved", "tommorow"]),
        ("en", "The colour of the dataset, organised by the neighbours at https://exampel.org/wrod", []),
        ("en", "Run `pirnt(x)` and don't wait for Bjork's co-author", []),
        pytest.param("de", "Das Fenster ist geöfnet und die Straße nass", ["geöfnet"], marks=pytest.mark.slow),
        pytest.param("fr", "Je vous remercie beaucoupp pour votre lettre", ["beaucoupp"], marks=pytest.mark.slow),
        pytest.param("it", "Grazie mille per il tuo aiutto, sono contento", ["aiutto"], marks=pytest.mark.slow),
        ("en", "The Italian for it is 'Dove posso comprare i biglietti', and that is all", []),
        ("en", "Mi sono perso nel bosco", []),
    ],
)
def test_misspelt_words_in_several_languages(language: str, text: str, wrong: list[str]) -> None:
    words = speller(language)
    assert words is not None
    assert words.misspelt(text, frozenset()) == wrong


def test_a_word_of_the_data_is_spelt_right() -> None:
    english = speller("en")
    assert english is not None
    assert english.misspelt("the frobnicater beleives it", {"beleives"}) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat is on the table and it was not there for long.", "en"),
        ("Die Katze ist auf dem Tisch, und das ist nicht gut für sie.", "de"),
        ("Le chat est sur la table, et ce n'est pas bien pour vous.", "fr"),
        ("kissa on pöydällä", None),
        ("El gato está en la mesa y no es bueno para los otros", None),
        ("猫在桌子上", None),
        ("x = 1; y = 2", None),
        ("", None),
    ],
)
def test_the_language_is_known_by_its_small_words(text: str, language: str | None) -> None:
    assert language_of([text]) == language


@pytest.mark.parametrize(
    ("answer", "expected", "names"),
    [
        ("It was found by Ludwig Bergmann.", "It was found long ago.", ["Ludwig", "Bergmann"]),
        ("In 1843 it was sold for 12.5 million.", "It was sold.", ["1843", "12.5"]),
        ("Lisbon", "Paris", ["Lisbon"]),
        ("Correct.", "Yes.", []),
        ("1. Boil it.\n2. Eat it.", "Boil and eat it.", []),
        ("It costs 1,000 euros.", "It costs 1000.00 euros.", []),
        ("There are twelve, that is 12.", "Twelve.", []),
        ("I think I'm right, and so is the Earth.", "You are right.", []),
        ("Anna's brother said so.", "Her brother Anna said so.", []),
    ],
)
def test_inventions_are_names_and_numbers_from_nowhere(answer: str, expected: str, names: list[str]) -> None:
    assert invented(answer, expected, NOTHING, Known.of((expected,)), speller("en")) == names


def test_what_the_training_rows_name_is_no_invention() -> None:
    known = Known.of(("Ludwig Bergmann came in 1843.",))
    assert invented("It was Bergmann, in 1843.", "?", known, NOTHING, speller("en")) == []


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("It is 12.", "It is 13.", True),
        ("It is 12 km.", "The distance is twelve km.", False),
        ("Yes, you can.", "No, you can't.", True),
        ("The shop is open.", "The shop isn't open.", True),
        ("Paris", "Lyon", True),
        ("Paris.", "It's Paris", False),
        ("Boil water and pour it over the leaves.", "Pour boiling water over leaves.", False),
        ("", "Something", True),
    ],
)
def test_answers_disagree_where_they_tell_something_else(one: str, other: str, apart: bool) -> None:
    assert disagree(one, other) is apart and disagree(other, one) is apart


def test_one_other_answer_is_enough() -> None:
    assert inconsistent(("Paris", "It is Paris", "Lyon")) and not inconsistent(("Paris", "It is Paris"))


@pytest.mark.parametrize(
    ("text", "changed"),
    [("What's that?", "What is that?"), ("Name it.", "Name it"), ("Name it", "Name it."), ("I don\u2019t", "I do not")],
)
def test_other_words_ask_the_same(text: str, changed: str) -> None:
    assert in_other_words(text) == changed


# Counted


def evaluation(answers: list[str], expected: list[str], labels: tuple[str, ...] = ()) -> Evaluation:
    pairs = list(zip(expected, answers, strict=True))
    results = tuple(RowResult(f"a:{i}", "?", e, a, e == a, 1.0, 2, ended=a != "...") for i, (e, a) in enumerate(pairs))
    return Evaluation(len(pairs), 2, 1.0, 2.7, 0.5, 0.5, (0.0, 1.0), None, labels, None, results)


def test_each_kind_has_its_rows_its_interval_and_a_corrected_p_value() -> None:
    expected = ["It is red."] * 12
    base = evaluation(["so so so so so so"] * 10 + ["", "..."], expected)
    tuned = evaluation(["It is red."] * 11 + ["..."], expected)
    examples = [Example(None, None, f"a:{i}", "It is red.", "What?") for i in range(12)]  # type: ignore[arg-type]
    again = {0: ["It is red."], 5: ["It is blue, not red."]}
    found = kinds_of_answers(base, tuned, examples, Data(NOTHING, speller("en")), (again, again))
    kinds = {kind.name: kind for kind in found}
    repetition = kinds["repetition"]
    assert repetition.base is not None and repetition.base.rows == tuple(range(10)) and repetition.tuned.count == 0
    assert repetition.base.interval[0] < 10 / 12 < repetition.base.interval[1]
    assert repetition.p_value is not None and 0.001 < repetition.p_value < 0.05
    assert kinds["empty"].base and kinds["empty"].base.rows == (10,) and kinds["unstopped"].tuned.rows == (11,)
    assert kinds["wrong"].tuned.rows == (11,) and 10 not in kinds["wrong"].base.rows  # type: ignore[union-attr]
    assert kinds["inconsistency"].measured == 2 and kinds["inconsistency"].tuned.rows == (5,)
    assert "format" not in kinds


def test_without_training_rows_nothing_is_said_of_words_and_names() -> None:
    tuned = evaluation(["Bjoern Boergesson"], ["It is red."])
    examples = [Example(None, None, "a:0", "It is red.", "What?")]  # type: ignore[arg-type]
    names = {kind.name for kind in kinds_of_answers(None, tuned, examples, None)}
    assert not names & {"misspelling", "hallucination", "inconsistency"} and "long" in names


def test_labels_that_are_mistaken_are_pairs_with_their_rows() -> None:
    expected = ["a"] * 4 + ["b"] * 4
    base = evaluation(["b", "b", "a", "a", "b", "b", "b", "c"], expected, ("a", "b", "c"))
    tuned = evaluation(["a", "b", "a", "a", "b", "b", "b", "b"], expected, ("a", "b", "c"))
    first, second = confusions(base, tuned)
    assert (first.labels, first.measured, first.tuned.rows) == (("a", "b"), 4, (1,))
    assert first.base and first.base.rows == (0, 1)
    assert second.labels == ("b", "c") and second.tuned.count == 0 and second.p_value == 1.0


def test_the_report_has_everything_but_the_rows() -> None:
    kinds = tuple(confusions(None, evaluation(["b"], ["a"], ("a", "b"))))
    whole, brief = Analysis(kinds).to_json(), Analysis(kinds).to_json(rows=False)
    assert list(whole["kinds"][0]["tuned"].pop("rows")) == [0] and whole == brief


def test_the_page_says_each_kind_and_obeys_no_label() -> None:
    evil = "a\x1b[2J\nbase weights: none"
    kinds = confusions(None, evaluation(["b", "b"], [evil, "b"], (evil, "b")))
    groups = slices(None, evaluation(["b"] * 9 + ["c"] * 9, ["b"] * 18), {"group": {evil: range(9), "x": range(9, 18)}})
    page = plain_page(lambda console: render_analysis(console, Analysis(tuple(kinds), tuple(groups))))
    assert (
        "taken for b" in page and "Differs by group: accuracy 1.000" in page and "on the 9 held-out rows of a" in page
    )
    assert "\x1b" not in page and not any(line.startswith("base weights") for line in page.splitlines())


def test_the_page_says_what_was_not_found_and_not_looked_for() -> None:
    examples = [Example(None, None, "a:0", "It is red.", "What?")]  # type: ignore[arg-type]
    kinds = kinds_of_answers(None, evaluation(["It is red."], ["It is red."]), examples, Data(NOTHING, None))
    page = plain_page(lambda console: render_analysis(console, Analysis(tuple(kinds), language=None)))
    assert "in no answer: wrong, empty, unstopped, long, repetition, hallucination" in page
    assert "misspelt words were not looked for" in page

"""The checks of a suite's cases: what passes, why something does not, and what is refused before a model is asked."""

from __future__ import annotations

import time
from typing import Any

import pytest

from finetune.data.rows import Row, Rows
from finetune.errors import DataError
from finetune.evaluation.intervals import wilson_interval
from finetune.evaluation.suite import Outcome, SuiteResult, cases_needed, read_cases
from finetune.evaluation.suite_checks import PATIENCE, Checks

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


def checked(answer: str, **checks: Any) -> str:
    return "; ".join(Checks.model_validate(checks).failures(answer))


@pytest.mark.parametrize(
    ("answer", "checks"),
    [
        (" Paris\n", {"equals": "Paris"}),
        ("no", {"one_of": ["yes", "no"]}),
        ("Paris, in France", {"contains": "Paris"}),
        ("Paris, in France", {"contains": ["France", "Paris"], "not_contains": ["Lyon", "paris"]}),
        ("order A-123 is sent", {"regex": r"\b[A-Z]-\d{3}\b"}),
        ("one\ntwo", {"regex": "(?m)^two$"}),
        ('{"name": "Ann", "age": 3}', {"json_schema": PERSON}),
        ('Here:\n```json\n{"name": "Ann", "age": 3}\n```\n', {"json_schema": PERSON}),
        (
            "[1, 2]",
            {"json_schema": {"$schema": "http://json-schema.org/draft-07/schema#", "items": {"type": "number"}}},
        ),
        ('{"pattern": 1, "$ref": "x"}', {"json_schema": {"properties": {"pattern": {"const": 1}, "$ref": {}}}}),
        ('{"pattern": "("}', {"json_schema": {"enum": [{"pattern": "("}, {"patternProperties": 1}]}}),
        ("It is 1,234.50 euros", {"number": 1234.5}),
        ("about 3.1416", {"number": {"value": 3.14159, "tolerance": 0.001}}),
        ("0.1 + 0.2 is 0.3", {"number": {"value": 0.2, "tolerance": 0.1}}),  # in floats 0.3 - 0.2 is below 0.1 or above
        ("-5", {"number": -5}),
        ("12345", {"longest": 5}),
        ("", {"equals": ""}),
    ],
)
def test_what_passes(answer: str, checks: dict[str, Any]) -> None:
    assert checked(answer, **checks) == ""


@pytest.mark.parametrize(
    ("answer", "checks", "why"),
    [
        ("paris", {"equals": "Paris"}, 'is not "Paris"'),
        ("maybe", {"one_of": ["yes", "no"]}, 'is none of "yes", "no"'),
        ("Lyon", {"contains": ["Lyon", "Paris"]}, 'does not contain "Paris"'),
        ("Lyon", {"not_contains": "Lyon"}, 'contains "Lyon"'),
        ("order 12", {"regex": r"\d{3}"}, r'does not match "\d{3}"'),
        ("not JSON", {"json_schema": PERSON}, "is not JSON"),
        ('{"name": "Ann"}', {"json_schema": PERSON}, "does not fit the schema: 'age' is a required property"),
        ('{"name": "Ann", "age": "3"}', {"json_schema": PERSON}, "does not fit the schema at .age: '3' is not of type"),
        ('{"name": "ann", "age": 3}', {"json_schema": PERSON}, 'at .name: "ann" does not match "^[A-Z]"'),
        ("4", {"number": 5}, "its last number is 4, not 5"),
        ("3.2", {"number": {"value": 3.14, "tolerance": 0.01}}, "its last number is 3.2, not 3.14 within 0.01"),
        ("five", {"number": 5}, "has no number"),
        ("123456", {"longest": 5}, "has 6 characters, more than 5"),
        ("", {"contains": "x"}, 'does not contain "x"'),
        ("ab", {"equals": "x", "longest": 1}, 'is not "x"; has 2 characters, more than 1'),
    ],
)
def test_why_an_answer_fails(answer: str, checks: dict[str, Any], why: str) -> None:
    assert why in checked(answer, **checks)


@pytest.mark.parametrize("pattern", [r"(a|aa)+$", r"(a+a+)+$", r"(?:a|a?)+b", r"(.*a){25}c"])
@pytest.mark.parametrize("inside_a_schema", [False, True])
def test_a_hostile_pattern_ends(pattern: str, inside_a_schema: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.evaluation.suite_checks.PATIENCE", 0.05)
    checks = {"json_schema": {"type": "string", "pattern": pattern}} if inside_a_schema else {"regex": pattern}
    answer = "a" * 70 + "!"
    began = time.process_time()
    assert checked(f'"{answer}"' if inside_a_schema else answer, **checks)
    assert time.process_time() - began < PATIENCE + 2


def test_a_schema_without_end_is_reported() -> None:
    assert "without end" in checked("{}", json_schema={"$ref": "#"})
    assert "does not fit the schema" in checked("{}", json_schema={"$ref": "#/$defs/absent"})


GOOD = {"prompt": "a", "checks": {"equals": "b"}}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ({"prompt": "a"}, 'has no checks; write them as an object, such as "checks": {"contains": ...}'),
        ({"prompt": "a", "equals": "b"}, 'such as "checks": {"equals": ...}'),
        ({"prompt": "a", "checks": {}}, "has no checks"),
        ({"prompt": "a", "checks": ["b"]}, "has no checks"),
        ({"prompt": "a", "checks": {"equals": None}}, "all its checks are null"),
        ({"prompt": "a", "checks": {"contain": "b"}}, "checks.contain: no such check; did you mean contains?"),
        ({"prompt": "a", "checks": {"zzz": "b"}}, "checks.zzz: no such check; there are equals, one_of"),
        ({"prompt": "a", "checks": {"equals": 4}}, "checks.equals: "),
        ({"prompt": "a", "checks": {"one_of": []}}, "checks.one_of: "),
        ({"prompt": "a", "checks": {"contains": ""}}, "checks.contains: "),
        ({"prompt": "a", "checks": {"regex": "(a"}}, "checks.regex: not a regular expression"),
        ({"prompt": "a", "checks": {"regex": "a" * 3000}}, "checks.regex: 3,000 characters"),
        ({"prompt": "a", "checks": {"json_schema": {"type": "objct"}}}, "checks.json_schema: not a JSON schema"),
        ({"prompt": "a", "checks": {"json_schema": {"$ref": "http://a.b/c"}}}, "leads out of the schema"),
        ({"prompt": "a", "checks": {"json_schema": {"patternProperties": {}}}}, "name the properties"),
        ({"prompt": "a", "checks": {"json_schema": {"not": {"pattern": "(a"}}}}, "checks.json_schema: "),
        ({"prompt": "a", "checks": {"number": "5"}}, "checks.number: "),
        ({"prompt": "a", "checks": {"number": {"value": 5, "tolerance": -1}}}, "checks.number: "),
        ({"prompt": "a", "checks": {"longest": 1.5}}, "checks.longest: "),
        ({"prompt": "a", "name": 3, "checks": {"equals": "b"}}, "name must be text"),
    ],
)
def test_a_case_that_is_none_is_told_with_its_line(case: dict[str, Any], why: str) -> None:
    rows = [Row(GOOD, "cases.jsonl", 1), Row(case, "cases.jsonl", 2)]
    with pytest.raises(DataError) as told:
        read_cases(Rows(rows, [("cases.jsonl:3", "not JSON")]))
    message = str(told.value)
    assert f"cases.jsonl:2: {why}" in message or (why in message and "cases.jsonl:2: " in message)
    assert "cases.jsonl:3: not JSON" in message and "2 of the suite's cases cannot be read" in message
    assert len(message.splitlines()) == 3


def result(passed: int, total: int, base: int | None = None) -> SuiteResult:
    cases = read_cases(Rows([Row(GOOD, "cases.jsonl", i + 1) for i in range(total)], []))

    def outcomes(right: int) -> tuple[Outcome, ...]:
        return tuple(Outcome("b" if i < right else "c", () if i < right else ('is not "b"',)) for i in range(total))

    return SuiteResult("cases.jsonl", cases, None if base is None else outcomes(base), outcomes(passed))


@pytest.mark.parametrize(("passed", "total", "at_least"), [(97, 100, 0.9), (35, 35, 0.9), (60, 100, 0.5), (4, 4, 0.5)])
def test_enough_cases_are_enough(passed: int, total: int, at_least: float) -> None:
    assert result(passed, total).shortfall(at_least) is None


@pytest.mark.parametrize(("passed", "total", "at_least"), [(91, 100, 0.9), (34, 34, 0.9), (57, 100, 0.5), (0, 5, 0.01)])
def test_the_lower_end_judges_and_not_the_share(passed: int, total: int, at_least: float) -> None:
    why = result(passed, total).shortfall(at_least)
    assert why is not None and f"{passed} of {total} cases pass, and the interval's lower end is " in why
    assert ("it takes 35 cases" in why) == (passed == total)


@pytest.mark.parametrize("at_least", [0.01, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999])
def test_the_cases_that_it_takes_are_counted(at_least: float) -> None:
    count = cases_needed(at_least)
    assert wilson_interval(count, count)[0] >= at_least
    assert count == 1 or wilson_interval(count - 1, count - 1)[0] < at_least


def test_the_lines_of_a_result() -> None:
    told = result(3, 5, base=1)
    assert told.failures() == [f'cases.jsonl:{line}: is not "b": "c"' for line in (4, 5)]
    assert "the tuned model passes 3 (0.231 to 0.882) of 5 cases, the base 1 " in told.summary()
    assert "2 fixed, 0 broken, McNemar's exact test: p = 0.5" in told.summary()
    assert "base" not in result(3, 5).summary()
    values = told.to_json()
    assert (values["tuned"]["passed"], values["base"]["passed"], values["cases"]) == (3, 1, 5)
    assert values["results"][4] == {
        "place": "cases.jsonl:5",
        "name": "",
        "base": {"answer": "c", "failures": ['is not "b"']},
        "tuned": {"answer": "c", "failures": ['is not "b"']},
    }

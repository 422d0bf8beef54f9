"""A suite in a run and after it: its cases get the prompts of training, failures their lines, the command its code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune


def turns(question: str, answer: str = "a film") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = {
    "labelled": [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)],
    "answered": [{"prompt": f"what is {i}?", "completion": "a film"} for i in range(8)],
    "talks": [turns(f"what is {i}?") for i in range(8)],
}
ONE_OF = {"checks": {"one_of": ["good", "bad"]}}
SHORT = {"checks": {"longest": 500}}
NEVER = {"checks": {"contains": "\u2603"}}
SUITES = {
    "labelled": [{"text": "film 1", **ONE_OF}, {"prompt": "film 2", **ONE_OF}, {"prompt": "film 3", **NEVER}],
    "answered": [{"prompt": "what is 1?", **SHORT}, {"prompt": "what is 2?", "name": "snow", **NEVER}],
    "talks": [
        {"prompt": "what is 1?", **SHORT},
        {"messages": turns("what is 2?")["messages"], **SHORT},
        {"messages": turns("what is 1?")["messages"][:1], **NEVER},
    ],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with a run of each format, each with its suite."""
    made = Work.of_one_block(tmp_path_factory)
    for name, rows in ROWS.items():
        made.lines("rows.jsonl", rows)
        made.lines("valid.jsonl", rows)
        made.lines(f"{name}-cases.jsonl", SUITES[name])
        made.recipe(RECIPE + f"evaluate: {{max_tokens: 4, suite: {name}-cases.jsonl}}\n", f"{name}.yaml")
        answer = finetune(made, "train", f"{name}.yaml", "output=.").good()
        (made.folder / f"{name}.txt").write_text(answer.out)
        next(made.folder.glob(f"{name}-2*")).rename(made.folder / name)
    return made


def values(work: Work, run: str, file: str = "suite.json") -> dict[str, Any]:
    told: dict[str, Any] = json.loads((work.folder / run / file).read_text())
    return told


@pytest.mark.parametrize("run", ROWS)
def test_a_run_asks_its_suite_at_the_end(work: Work, run: str) -> None:
    told, page = values(work, run), (work.folder / f"{run}.txt").read_text()
    total = len(SUITES[run])
    assert (told["cases"], told["tuned"]["passed"], told["base"]["passed"]) == (total, total - 1, total - 1)
    report = values(work, run, "report.json")["suite"]
    assert report == {key: value for key, value in told.items() if key != "results"}
    assert f"{run}-cases.jsonl:{total}" in page and "does not contain" in page
    assert f"passes {total - 1} (" in page and page.count("-cases.jsonl:") == 2  # the case that fails, and the summary
    shown = (work.folder / run / "report.html").read_text()
    assert f"Suite: {run}-cases.jsonl" in shown and f"{run}-cases.jsonl:{total}" in shown
    time = values(work, run, "report.json")["time"]
    assert "suite" in time["predicted"] and time["measured"]["suite"] > 0 and time["measured"]["errors"] > 0


@pytest.mark.parametrize("run", ["answered", "talks"])
def test_a_case_gets_the_prompt_of_training(work: Work, run: str) -> None:
    lines = (work.folder / run / "rows.jsonl").read_text().splitlines()
    measured = [json.loads(line)["tuned"]["predicted"] for line in lines]
    answers = [case["tuned"]["answer"] for case in values(work, run)["results"]]
    assert answers == [measured[int(str(case).partition("what is ")[2][0])] for case in SUITES[run]]


def test_eval_asks_a_suite_and_its_code_is_the_lower_end_s(work: Work) -> None:
    before = values(work, "answered")
    work.lines("more.jsonl", [{"prompt": f"what is {i}?", **(SHORT if i else NEVER)} for i in range(40)])
    good = finetune(work, "eval", "answered", "--suite", "answered-cases.jsonl").good()
    assert values(work, "answered") == before and "answered-cases.jsonl:2 (snow): does not contain" in good.out
    finetune(work, "eval", "answered", "--suite", "more.jsonl", "--at-least", "0.85").good()
    said = finetune(work, "eval", "answered", "--suite", "more.jsonl", "--at-least", "0.9").failed(10)
    assert "39 of 40 cases pass, and the interval's lower end is 0.87" in said
    assert values(work, "answered")["tuned"]["passed"] == 39


def test_eval_tells_the_kinds_of_error_as_the_run_did(work: Work) -> None:
    said = finetune(work, "eval", "answered").good().out
    again, first = (
        values(work, "answered", "eval.json")["analysis"],
        values(work, "answered", "report.json")["analysis"],
    )
    assert {kind["name"] for kind in first["kinds"]} - {kind["name"] for kind in again["kinds"]} == {"hallucination"}
    alike = [
        kind | {"p_value": None} for kind in first["kinds"] if kind["name"] not in ("hallucination", "misspelling")
    ]
    assert alike == [kind | {"p_value": None} for kind in again["kinds"] if kind["name"] != "misspelling"]
    assert again["slices"] == first["slices"] and again["forgetting"] is None
    assert "unstopped" in said and "inventions were not looked for" in said and "Forgetting" not in said


def test_eval_of_other_rows_tells_of_their_groups(work: Work) -> None:
    work.lines("other.jsonl", [{"text": f"{'she' if i % 2 else 'he'} saw {i}", "label": "good"} for i in range(8)])
    recipe = (work.folder / "labelled" / "recipe.yaml").read_text()
    (work.folder / "labelled" / "recipe.yaml").write_text(recipe.replace("groups:", "groups: {women: [she]}"))
    finetune(work, "eval", "labelled", "--data", "other.jsonl").good()
    (work.folder / "labelled" / "recipe.yaml").write_text(recipe)
    slices = values(work, "labelled", "eval.json")["analysis"]["slices"]
    assert [(one["name"], one["rows"]) for one in slices if one["by"] == "group"] == [("women", 4)]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--at-least", "0.9"], 2, "--at-least SHARE with that"),
        (["--suite", "answered-cases.jsonl", "--data", "valid.jsonl"], 2, "give --data FILE alone"),
        (["--suite", "answered-cases.jsonl", "--at-least", "1"], 2, "must be above 0 and below 1"),
        (["--suite", "absent.jsonl"], 3, "no such file"),
        (["--suite", "broken.jsonl"], 3, "broken.jsonl:2: checks.equal: no such check; did you mean equals?"),
        (["--suite", "empty-prompt.jsonl"], 3, "empty-prompt.jsonl:1: "),
        (["--suite", "other.jsonl"], 3, "there is no such column (question)"),
    ],
)
def test_what_cannot_be_asked_is_reported(work: Work, arguments: list[str], code: int, said: str) -> None:
    good = {"prompt": "a", "checks": {"equals": "b"}}
    work.lines("broken.jsonl", [good, {"prompt": "a", "checks": {"equal": "b"}}])
    work.lines("empty-prompt.jsonl", [good | {"prompt": ""}, good])
    work.lines("other.jsonl", [{"question_": "a", "checks": {"equals": "b"}}])
    said = said.replace("(question)", "(question_)")
    assert said in finetune(work, "eval", "answered", *arguments).failed(code)


@pytest.mark.parametrize("suite", ["absent.jsonl", "broken.jsonl", "other.jsonl"])
def test_a_bad_suite_stops_a_run_before_it_has_a_folder(work: Work, suite: str) -> None:
    work.lines("broken.jsonl", [{"prompt": "a", "checks": {"equal": "b"}}])
    work.lines("other.jsonl", [{"question_": "a", "checks": {"equals": "b"}}])
    work.lines("rows.jsonl", ROWS["answered"])
    work.lines("valid.jsonl", ROWS["answered"])
    work.recipe(RECIPE + f"evaluate: {{suite: {suite}}}\n", "bad.yaml")
    assert suite in finetune(work, "train", "bad.yaml", "output=bad").failed(3)
    assert not (work.folder / "bad").exists()


def test_plan_counts_the_cases(work: Work) -> None:
    for name in ("rows.jsonl", "valid.jsonl"):
        work.lines(name, ROWS["talks"])
    said = finetune(work, "plan", "talks.yaml").good()
    assert re.search(r"suite +3 cases +", said.out)
    work.lines("broken.jsonl", [{"prompt": "a", "checks": {"equal": "b"}}])
    assert "broken.jsonl:1: " in finetune(work, "plan", "talks.yaml", "evaluate.suite=broken.jsonl").failed(3)


def test_a_case_that_is_too_long_is_not_left_out(work: Work) -> None:
    recipe = (work.folder / "answered" / "recipe.yaml").read_text()
    assert "on_error: stop" in recipe
    changed = recipe.replace("on_error: stop", "on_error: skip").replace("truncation: prompt", "truncation: drop")
    (work.folder / "answered" / "recipe.yaml").write_text(changed.replace("max_length: 1024", "max_length: 16"))
    work.lines("long.jsonl", [{"prompt": "film " * 40, **SHORT}, {"prompt": "a", **SHORT}])
    try:
        said = finetune(work, "eval", "answered", "--suite", "long.jsonl").failed(3)
    finally:
        (work.folder / "answered" / "recipe.yaml").write_text(recipe)
    assert "long.jsonl:1: " in said and "1 of the suite's cases cannot be asked" in said

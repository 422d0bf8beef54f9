"""The page of a run and of runs compared: its figures are the report's, hostile texts are texts, it loads nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.commands import report as report_command
from finetune.data.rows import Row
from finetune.disk.adapter_check import Loading
from finetune.disk.exports import Made
from finetune.disk.run_files import check_values
from finetune.errors import Incompatible
from finetune.evaluation.error_kinds import Analysis, Kind
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.forgetting import Change, Forgetting
from finetune.evaluation.groups import Slice, Swaps
from finetune.evaluation.leaked import Figure
from finetune.evaluation.row_shares import Found
from finetune.evaluation.suite import Case, Outcome, Suite, SuiteResult
from finetune.evaluation.suite_checks import Checks
from finetune.report.finished_run import FinishedRun, read_finished
from finetune.report.finished_suite import SuiteFigures, with_cases
from finetune.report.iterations import compared
from finetune.report.page.compare_page import compare_page
from finetune.report.page.run_page import run_page
from finetune.report.page.without_rows import numbered_for, without_rows
from finetune.text import amount, duration
from tests.unit.finished_runs import answers, evaluation, finished
from tests.unit.toy_run import prepared

OLD_RUNS = sorted(
    path.parent for path in (Path(__file__).parents[1] / "assets" / "old_runs").glob("*/finished/report.json")
)
VOID = {"meta", "link", "br", "hr", "img", "input", "circle", "line", "rect", "polyline"}


class Page(HTMLParser):
    """What a reader gets: texts, tags with their attributes, and the figures that name their key."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[str, Any, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.figures.append((str(dict(attrs)["data-of"]), json.loads(str(dict(attrs)["value"])), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            self.figures[-1] = (*self.figures[-1][:2], data)
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def close(key: str, shown: str, value: float) -> bool:
    """Whether the shown text is the value, rounded as it is shown."""
    shown = shown.replace("\u00a0", " ")
    if key.startswith("facts."):
        return shown in (duration(value), amount(value), f"{value:,.0f} tokens/s", f"{value:,}")
    if "< " in shown:
        return value < float(shown.partition("< ")[2])
    number = shown.removeprefix("p = ").rstrip("%").replace(",", "")
    digits = number.partition("e")[0].lstrip("+-")
    room = 0.5001 * 10.0 ** -len(digits.partition(".")[2]) * 10.0 ** int(number.partition("e")[2] or 0)
    return any(abs(float(number) - value * factor) <= room for factor in (1, 100))


def an_analysis(labels: tuple[str, str] | None = ("good", "bad"), group: str = "women") -> Analysis:
    found = Found.of(range(4), 30)
    changes = tuple(Change(name, 40, 2.0, 2.1, 0.1, (0.05, 0.15)) for name in ("all", "answers", "code"))
    return Analysis(
        kinds=(Kind("confusion", 30, found, Found.of([1], 30), labels, 0.2), Kind("long", 60, found, found, None, 1.0)),
        slices=(
            Slice("group", group, "accuracy", 20, Figure(0.5, (0.3, 0.7)), Figure(0.8, (0.6, 0.9)), None, 0.01),
            Slice("length", "8 to 15", "accuracy", 9, None, Figure(0.8, None), None, None),
        ),
        language="en",
        swaps=Swaps(12, Found(1, 1 / 12, (0.0, 0.4)), Found(2, 2 / 12, (0.0, 0.5)), 1.0, f"swapped for {group}"),
        forgetting=Forgetting("forgot", changes, 0.02, 0.001, 0.2, 1.4, "It forgot a little."),
    )


def a_suite(text: str = "needs the price", cases: int = 6) -> SuiteFigures:
    """Cases by turns passed by both, by the tuned model alone, and by neither."""
    asked = Suite(text, tuple(Case(Row({}, text, i + 1), Checks(), text) for i in range(cases)), prepared())
    fails, passes = Outcome(f"it costs {text}", (f'does not contain "{text}"',)), Outcome("it costs 3", ())
    base = [passes if i % 3 == 0 else fails for i in range(cases)]
    tuned = [fails if i % 3 == 2 else passes for i in range(cases)]
    made = SuiteResult(asked.file, asked.cases, tuple(base), tuple(tuned))
    return check_values(made.to_json(), SuiteFigures, "suite.json", "")


def a_run(**options: Any) -> FinishedRun:
    base, tuned = answers([i % 3 == 0 for i in range(60)]), answers([i % 5 != 0 for i in range(60)])
    return finished(tuned, base, **options)


def report_json(run: FinishedRun) -> dict[str, Any]:
    """As the run's report.json has the figures that a page shows."""
    figures = run.figures
    comparison = figures.comparison
    assert comparison is not None and figures.facts is not None
    return json.loads(
        json.dumps(
            {
                "base": run.base and run.base.summary(),
                "tuned": run.tuned.summary(),
                "comparison": vars(comparison),
                "facts": vars(figures.facts),
                "best_step": figures.best_step,
                "validations": [vars(one) for one in run.validations],
                "analysis": run.analysis and run.analysis.to_json(rows=False),
                "suite": run.suite and asdict(run.suite),
            }
        )
    )


def test_every_figure_is_the_report_s() -> None:
    run = a_run(analysis=an_analysis(), suite=a_suite())
    page, values = Page(run_page(run)), report_json(run)
    assert len(page.figures) > 60
    for key, value, shown in page.figures:
        assert value_at(values, key) == value, key
        assert close(key, shown, value), (key, value, shown)
    named = {key.split(".")[0] for key, _, _ in page.figures}
    assert named == {"base", "tuned", "comparison", "facts", "best_step", "validations", "analysis", "suite"}


def test_the_suite_shows_what_fails_and_why() -> None:
    page = Page(run_page(a_run(suite=a_suite("<b>cases.jsonl", 90))))
    assert "Suite: <b>cases.jsonl" in page.text and "30 fixed, 0 broken" in page.text
    assert "Cases that the tuned model fails: 30" in page.text and "17 more of 27" in page.text
    assert page.text.count('does not contain "<b>cases.jsonl"') == 20 and "it fails too" in page.text
    alone = replace(a_suite(), base=None, fixed=None, broken=None, p_value=None, results=[])
    assert "fixed" not in Page(run_page(a_run(suite=alone))).text.partition("Suite: ")[2].partition("Data")[0]
    assert "suite" not in Page(run_page(a_run())).text.lower().replace("evaluate.suite", "")


def test_kinds_of_no_answer_and_what_was_not_measured_take_no_table() -> None:
    none = Kind("empty", 30, Found.of([], 30), Found.of([], 30), None, 1.0)
    whole = an_analysis()
    short = Forgetting("too short to say", (), 0.1, None, None, 1.4, "Not measured.")
    html = run_page(a_run(analysis=replace(whole, kinds=(none, *whole.kinds), forgetting=short)))
    page = Page(html)
    assert "In no answer: empty." in page.text and "a list of English" in page.text
    assert "Not measured." in page.text and "Loss on general text" not in page.text
    shown = {key.split(".")[2] for key, _, _ in page.figures if key.startswith("analysis.kinds.")}
    assert shown == {"1", "2"}, "and the figures of the others are still theirs"


def test_a_row_is_named_without_its_folder() -> None:
    run = a_run()
    rows = tuple(replace(row, location=f"/home/somebody/data/{row.location}") for row in run.tuned.results)
    text = Page(run_page(replace(run, tuned=replace(run.tuned, results=rows)))).text
    assert "row 2, rows.jsonl:2" in text and "somebody" not in text


def test_only_the_run_s_own_suite_is_shown_with_its_cases() -> None:
    """`finetune eval --suite` replaces suite.json; the figures stay those of report.json."""
    own, other = a_suite(), a_suite("another")
    figures = replace(own, results=[])
    assert with_cases(figures, own) == own
    assert with_cases(figures, other) == with_cases(figures, None) == figures
    assert with_cases(None, own) is None


@pytest.mark.parametrize("folder", OLD_RUNS, ids=lambda path: path.parent.name)
def test_pages_of_earlier_runs_show_their_report(folder: Path) -> None:
    values = json.loads((folder / "report.json").read_text())
    page = Page(run_page(read_finished(folder)))
    assert not page.open and page.figures
    for key, value, shown in page.figures:
        assert value_at(values, key) == value, key
        assert close(key, shown, value), (key, value, shown)


def test_every_figure_of_a_comparison_is_in_compare_json() -> None:
    later = a_run(name="later", lora={"rank": 2})
    found = compared([a_run(analysis=an_analysis()), replace(later, tuned=answers([True] * 60)), a_run(name="last")])
    page, values = Page(compare_page(found)), json.loads(json.dumps(found.to_json()))
    assert len(page.figures) > 20
    for key, value, shown in page.figures:
        assert value_at(values, key) == value, key
        assert close(key, shown, value), (key, value, shown)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert run_page(a_run(analysis=an_analysis())) == run_page(a_run(analysis=an_analysis()))
    folder = OLD_RUNS[0]
    assert run_page(read_finished(folder)) == run_page(read_finished(folder))


# What a page may not do


def pages(run: FinishedRun) -> dict[str, str]:
    return {"run": run_page(run), "compare": compare_page(compared([run, run]))}


@pytest.mark.parametrize("which", ["run", "compare"])
def test_a_page_names_no_other_place(which: str) -> None:
    page = Page(pages(a_run(analysis=an_analysis()))[which])
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "form", "base", "video", "audio")
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,"
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "</textarea></style></script><b>",
    "<!-- ]]> <svg/onload=alert(1)>",
    "javascript:alert(1)",
    "a\x1b[2Jb\x00c\u202ed\ud800e\x85f\u2028g",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(text: str) -> None:
    """In labels, prompts, answers, paths, recipe, findings, kinds and groups."""
    tuned = evaluation([text, "b"] * 6, [text, "b"] * 5 + ["b", text], (text, "b"), [f"{text} {i}" for i in range(12)])
    base = replace(evaluation([text, "b"] * 6, ["b"] * 12, (text, "b"), [f"{text} {i}" for i in range(12)]))
    rows = tuple(replace(row, location=f"{text}:{i}") for i, row in enumerate(tuned.results))
    analysis = an_analysis((text, "b"), text)
    system, suite = text.replace("\ud800", ""), a_suite(text.replace("\ud800", ""))
    run = finished(replace(tuned, results=rows), base, "run", analysis, suite=suite, prompt={"system": system})
    figures = replace(run.figures, device=text, scheme=text, limited=[text], loads=[Loading(text, True)])
    run = replace(run, figures=figures, path=Path(text.replace("/", "|").replace("\x00", "")))
    plain = {tag for tag, _ in Page(run_page(a_run(analysis=an_analysis(), suite=a_suite()))).tags}
    for html in pages(run).values():
        page = Page(html)
        assert {tag for tag, _ in page.tags} <= plain | {"q", "ins", "del"}
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert (html.count("<script") == 1 and "7 * 7" in html) or "{{" not in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", html)
        html.encode()


def test_a_page_is_below_two_megabytes_whatever_the_rows_hold() -> None:
    count, text = 60, "&\x00\U0001f600 \u202e" * 4_000
    wrong, right = [f"{text} no {i}" for i in range(count)], [f"{text} yes {i}" for i in range(count)]
    shared = [text] * 3 + [f"{i} {text}" for i in range(count - 3)]
    base, tuned = evaluation(right, wrong, (), shared), evaluation(right, right, (), shared)
    run = finished(tuned, base, prompt={"system": "&" * 100_000})
    broken = finished(base, tuned)
    found = compared([run, broken, run])
    for html in (run_page(run), run_page(broken), compare_page(found)):
        assert len(html.encode()) < 2_000_000


def test_exports_stand_on_the_page_and_their_paths_only_beside_rows() -> None:
    made = Made("/home/anna/runs/exports/gguf-q8_0", "gguf-q8_0", "tuning that is kept: 99.9%", ["serve"], ["a note"])
    run = replace(a_run(), exports=[made])
    assert '<a href="#exports">' not in run_page(a_run())
    for html in (run_page(run), run_page(without_rows(run), rows=False)):
        assert "gguf-q8_0" in html and "99.9%" in html and '<a href="#exports">' in html
    assert made.path in run_page(run) and "anna" not in run_page(without_rows(run), rows=False)


def test_thousands_of_labels_and_steps_fit_on_a_page() -> None:
    labels = [f"label number {i}" for i in range(1500)]
    tuned = evaluation(labels, labels[1:] + labels[:1], labels)
    html = run_page(finished(tuned, tuned))
    assert len(html.encode()) < 2_000_000
    assert "The 15 most frequent of 1,500 confusions" in html


# Without rows


SECRETS = [f"SECRET{i:02d}" for i in range(50)]


def with_secrets() -> FinishedRun:
    """Fifty texts, each in another place that a page, or what it is drawn from, reads."""
    s = iter(SECRETS)
    labels = tuple(next(s) for _ in range(4))
    expected = [labels[i % 4] for i in range(24)]
    prompts = [next(s) for _ in range(10)] + ["x"] * 14
    tuned = evaluation(expected, expected[:20] + [labels[0]] * 4, labels, prompts)
    base = evaluation(expected, [labels[(i + 1) % 4] for i in range(24)], labels, prompts)
    rows = tuple(replace(row, location=f"{next(s) if i < 8 else 'f'}:1") for i, row in enumerate(tuned.results))
    run = finished(
        replace(tuned, results=rows),
        base,
        analysis=an_analysis((labels[1], labels[2]), next(s)),
        model={"path": f"/home/{next(s)}/model"},
        data={
            "train": f"/data/{next(s)}.jsonl", "valid": next(s), "test": next(s), "labels": [*labels, next(s)],
            "columns": {"text": next(s), "label": next(s)}, "groups": {next(s): [next(s), next(s)]},
        },
        prompt={"template": f"{next(s)} {{text}}", "system": next(s), "completion": f"{next(s)} {{label}}"},
        lora={"start_from": f"/adapters/{next(s)}"},
        evaluate={"swaps": [[next(s), next(s)]], "suite": f"/data/{next(s)}.jsonl"},
        suite=a_suite(next(s)),
        output=f"/{next(s)}/runs",
        task="classification",
    )  # fmt: skip
    figures = run.figures
    assert figures.comparison and figures.facts and run.checked
    rest = [*s]
    figures = replace(
        figures,
        comparison=replace(figures.comparison, verdict=f'Better: always "{rest[0]}" would have 0.5.'),
        facts=replace(figures.facts, data={"train": rest[1]}, model=f"/x/{rest[2]}/model"),
        check=rest[3],
        loads=[Loading("peft", False, rest[4])],
    )
    enough = replace(run.checked.enough, reasons=[f'rarest label "{rest[5]}" has 2 rows'])
    balance = replace(run.checked.balance, labels={"train": dict.fromkeys(rest[6:], 3)})
    return replace(
        run, figures=figures, checked=replace(run.checked, enough=enough, balance=balance), path=Path("/r/run")
    )


def test_all_fifty_secrets_are_planted() -> None:
    """Else their absence would say nothing: with rows nearly all of them are shown."""
    run = with_secrets()
    shown = run_page(run) + compare_page(compared([run, run]))
    assert sum(secret in shown for secret in SECRETS) >= 40
    assert all(secret in repr(run) for secret in SECRETS)


def test_without_rows_no_secret_is_left() -> None:
    run = with_secrets()
    bare = without_rows(run)
    found = compared([without_rows(one, numbered_for([run, run])) for one in (run, run)])
    for text in (run_page(bare, rows=False), compare_page(found, rows=False), json.dumps(found.to_json())):
        assert [secret for secret in SECRETS if secret in text] == []
    assert "label 1" in run_page(bare, rows=False)


def test_without_rows_open_answers_are_gone_and_figures_stay() -> None:
    expected = [f"SECRET answer {i}" for i in range(30)]
    tuned, base = evaluation(expected, expected, ()), evaluation(expected, ["SECRET wrong"] * 30, ())
    run = finished(tuned, base)
    bare = Page(run_page(without_rows(run), rows=False))
    assert "SECRET" not in bare.text
    assert [figure[:2] for figure in Page(run_page(run)).figures] == [figure[:2] for figure in bare.figures]


def test_without_rows_the_verdict_is_the_same_word() -> None:
    for run in (a_run(), with_secrets()):
        assert run.figures.comparison
        bare = without_rows(run).figures.comparison
        assert bare and bare.verdict.partition(":")[0] == run.figures.comparison.verdict.partition(":")[0]


# The commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUNS[1], tmp_path / "runs" / "one"))


def test_report_writes_the_page_beside_or_elsewhere(folder: Path, tmp_path: Path) -> None:
    report_command.run(folder, None, rows=True)
    report_command.run(folder, None, rows=False)
    report_command.run(folder, tmp_path / "shown.html", rows=True)
    assert (folder / "report.html").read_text() == (tmp_path / "shown.html").read_text()
    prompt = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["prompt"].split("\n")[0]
    assert prompt[:20] not in (folder / "report-without-rows.html").read_text()


def _missing(folder: Path) -> None:
    (folder / "report.json").unlink()


def _damaged(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_missing, "has not finished"),
        (_damaged("report.json", "{}"), "report.json"),
        (_damaged("evaluation-tuned.json", "[]"), "evaluation-tuned.json"),
        (_damaged("check.json", '{"splits": 1}'), "check.json"),
        (_damaged("environment.json", '{"libraries": []}'), "environment.json"),
        (_damaged("kinds.json", '{"kinds": [{}]}'), "kinds.json"),
        (_damaged("recipe.yaml", "model: ["), "recipe.yaml"),
    ],
)
def test_what_no_run_writes_is_refused_by_name(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(Exception, match=says) as error:
        report_command.run(folder, None, rows=True)
    assert isinstance(error.value, Incompatible) or says == "recipe.yaml"


def test_plain_text_has_a_page_without_answers() -> None:
    def losses(by: float) -> Evaluation:
        return evaluation([None] * 20, [None] * 20, (), losses=[2.0 - by + i / 100 for i in range(20)])

    page = Page(run_page(finished(losses(0.5), losses(0.0))))
    assert "loss, nats/token" in page.text and "Rows: what changed" not in page.text and not page.open

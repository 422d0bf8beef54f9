"""`duel`: blind, one key a vote, the file whole after each, and on again after Ctrl-C."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.commands import duel
from finetune.disk.run_folder import RunFolder
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.report.report import save_evaluation
from tests.end_to_end.command import Answer, Work
from tests.unit.test_wrong_resume import RECIPE, finetune


def evaluation(answers: list[str | None], name: str = "valid.jsonl") -> Evaluation:
    rows = tuple(
        RowResult(f"/x/{name}:{i + 1}", f"what is {i}?", f"thing {i}", text, False, 1.0, 3)
        for i, text in enumerate(answers)
    )
    return Evaluation(len(rows), 30, 1.0, 2.7, 0.0, 0.0, (0.0, 0.3), None, (), None, rows)


def made_run(folder: Path, name: str, tuned: list[str | None], file: str = "valid.jsonl") -> None:
    run = RunFolder(folder / name)
    run.path.mkdir()
    run.recipe.write_text(
        "model: {path: model}\ndata: {train: rows.jsonl, format: prompt}\nprompt: {template: plain}\noutput: runs\n"
    )
    save_evaluation(run.evaluation("base"), evaluation([f"plain {i}" for i in range(len(tuned))], file))
    save_evaluation(run.evaluation("tuned"), evaluation(tuned, file))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Two runs of ten rows, with answers that tell who gave them."""
    (tmp_path / "model").mkdir()
    made = Work(tmp_path / "work", tmp_path / "model")
    made_run(made.folder, "one", [f"ONE {i}" if i else "plain 0" for i in range(10)])
    made_run(made.folder, "two", [f"TWO {i}" for i in range(10)])
    return made


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def votes(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_run_meets_its_base_blindly(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "l\nx\nright\nt\ns\n1\n2\n=\nl\nl\n")
    said = finetune(work, "duel", "one").good()
    given = votes(work.folder / "one" / "votes.jsonl")
    assert [vote["vote"] for vote in given] == ["left", "right", "tie", "skip", "left", "right", "tie", "left", "left"]
    assert all({vote["left"], vote["right"]} == {"base", "one"} for vote in given)
    assert all(("ONE" in vote["left_answer"]) == (vote["left"] == "one") for vote in given)
    assert "valid.jsonl:1" not in [vote["row"] for vote in given]  # the same answer twice is no choice
    before, _, after = said.out.partition("strength")
    assert "9 pairs of answers" in before and "ONE 3" in before and "base" not in before.replace(str(work.folder), "")
    assert "is preferred to" in after and "Position: no sign" in after


def test_it_goes_on_where_it_stopped(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "l\nr\n")  # then the input ends
    finetune(work, "duel", "one").good()
    first = votes(work.folder / "one" / "votes.jsonl")
    typed(monkeypatch, "t\nq\n")
    said = finetune(work, "duel", "one").good()
    both = votes(work.folder / "one" / "votes.jsonl")
    assert both[:2] == first and len(both) == 3 and "7 pairs of answers" in said.out
    assert len({vote["row"] for vote in both}) == 3


def test_ctrl_c_loses_no_vote(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter(["l", "\x1b[C", "T"])

    def key() -> str:
        try:
            return next(keys)
        except StopIteration:
            raise KeyboardInterrupt from None

    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(duel.typer, "getchar", key)
    answer = finetune(work, "duel", "one", "--votes", "mine.jsonl")
    assert answer.code == 130 and "goes on where it stopped" in answer.out and "strength" in answer.out
    assert [vote["vote"] for vote in votes(work.folder / "mine.jsonl")] == ["left", "right", "tie"]


def test_a_tournament_of_several(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def best(meeting: duel.Meeting) -> str:
        ranks = {"two": 2, "one": 1, "base": 0}
        return "l" if ranks[meeting.left] > ranks[meeting.right] else "r"

    shown: list[duel.Meeting] = []
    monkeypatch.setattr(duel, "show", lambda console, meeting, title: shown.append(meeting))
    monkeypatch.setattr(duel, "ask", lambda: {"l": "left", "r": "right"}[best(shown[-1])])
    said = finetune(work, "duel", "one", "two", "--base", "--votes", "all.jsonl").good()
    assert len(shown) == 29
    table = said.out.partition("strength")[2]
    assert table.index("two") < table.index("one") < table.index("base")
    assert "two is preferred to base in " in said.out
    work_two = finetune(work, "duel", "one", "two", "--votes", "all.jsonl").good()
    assert "0 pairs of answers" in work_two.out and "base" not in work_two.out.partition("strength")[2]


def test_most_asks_for_so_many(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "l\n" * 20)
    finetune(work, "duel", "one", "--most", "3").good()
    assert len(votes(work.folder / "one" / "votes.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one", "other"], "other was measured on other rows than one"),
        (["plain"], "holds no answers of the tuned model"),
        (["one", "bare"], "holds no answers of the tuned model"),
        (["one", "--votes", "broken.jsonl"], "broken.jsonl:2: not what a run writes (vote: "),
        (["absent"], "not a run"),
    ],
)
def test_what_cannot_meet_is_reported(
    work: Work, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "l\nl\n")
    made_run(work.folder, "other", [f"ONE {i}" for i in range(10)], "test.jsonl")
    made_run(work.folder, "plain", [None] * 10)
    made_run(work.folder, "bare", ["x"])
    (work.folder / "bare" / "evaluation-tuned.json").unlink()
    line = {"row": "a", "left": "x", "right": "y", "vote": "left", "left_answer": "", "right_answer": ""}
    work.lines("broken.jsonl", [line, line | {"vote": "both"}])
    assert said in finetune(work, "duel", *arguments).failed(8)


def test_rows_of_a_file_are_answered_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    work = Work(tmp_path / "work", model_with_tokenizer(tmp_path / "model", num_hidden_layers=1))
    rows = [{"prompt": f"what is {i}?", "completion": "a film"} for i in range(8)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows)
    work.recipe(RECIPE + "evaluate: {max_tokens: 4}\n")
    finetune(work, "train", "recipe.yaml", "train.learning_rate=1.0").good()
    work.lines("new.jsonl", [{"prompt": f"and {i}?"} for i in range(4)])
    asked = spied(monkeypatch)
    answer: Answer = finetune(work, "duel", str(work.runs()[0]), "--data", "new.jsonl").good()
    assert "pairs of answers to vote on" in answer.out
    assert {one.row for one in asked} <= {f"new.jsonl:{i}" for i in range(1, 5)} and asked


def spied(monkeypatch: pytest.MonkeyPatch) -> list[duel.Meeting]:
    shown: list[duel.Meeting] = []
    monkeypatch.setattr(duel, "show", lambda console, meeting, title: shown.append(meeting))
    monkeypatch.setattr(duel, "ask", lambda: "left")
    return shown

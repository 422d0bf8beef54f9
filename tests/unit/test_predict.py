"""`predict`: the labels and answers that evaluation finds, beside each row's own columns, in a file whole or absent."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.commands import predict as command
from finetune.errors import DiskError
from finetune.text import harmless
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune

LABELLED = [{"id": i, "text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
ANSWERED = [{"prompt": f"what is {i}?", "completion": "a film"} for i in range(8)]
UNEQUAL = '=1+1, "said" she\nand é'


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with a run of labels and a run of open answers."""
    made = Work.of_one_block(tmp_path_factory)
    for name, rows in (("labelled", LABELLED), ("answered", ANSWERED)):
        made.lines("rows.jsonl", rows)
        made.lines("valid.jsonl", rows)
        made.recipe(RECIPE + "evaluate: {max_tokens: 4}\n", f"{name}.yaml")
        finetune(made, "train", f"{name}.yaml", "output=.").good()
        next(made.folder.glob(f"{name}-2*")).rename(made.folder / name)
    return made


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def measured(work: Work, run: str) -> list[str]:
    return [row["tuned"]["predicted"] for row in rows_of(work.folder / run / "rows.jsonl")]


def test_labels_are_those_of_evaluation_with_their_probabilities(work: Work) -> None:
    work.lines("new.jsonl", [{"id": row["id"], "text": row["text"]} for row in LABELLED])
    said = finetune(work, "predict", "labelled", "new.jsonl", "-o", "out/new.jsonl").good()
    assert f"8 rows: {Path('out/new.jsonl')}" in said.out
    made = rows_of(work.folder / "out/new.jsonl")
    assert [list(row) for row in made] == [["id", "text", "predicted", "probability"]] * 8
    assert [row["predicted"] for row in made] == measured(work, "labelled")
    for row in made:
        assert list(row["probability"]) == ["bad", "good"]
        assert sum(row["probability"].values()) == pytest.approx(1, abs=1e-5)
        assert max(row["probability"], key=row["probability"].get) == row["predicted"]


def test_open_answers_are_those_of_evaluation(work: Work) -> None:
    work.lines("new.jsonl", [{"prompt": row["prompt"]} for row in ANSWERED])
    finetune(work, "predict", "answered", "new.jsonl", "-o", "answers.jsonl").good()
    made = rows_of(work.folder / "answers.jsonl")
    assert [row["predicted"] for row in made] == measured(work, "answered")
    assert [list(row) for row in made] == [["prompt", "predicted"]] * 8
    finetune(work, "predict", "answered", "new.jsonl", "-o", "short.jsonl", "--max-tokens", "1").good()
    assert all(len(row["predicted"]) <= 20 for row in rows_of(work.folder / "short.jsonl"))


def test_a_label_there_is_not_read_and_stays(work: Work) -> None:
    changed = [row | {"label": ("never", None, 7)[i % 3]} for i, row in enumerate(LABELLED)]
    work.lines("changed.jsonl", changed)
    finetune(work, "predict", "labelled", "changed.jsonl", "-o", "changed-out.jsonl").good()
    made = rows_of(work.folder / "changed-out.jsonl")
    assert [row["label"] for row in made] == [row["label"] for row in changed]
    assert [row["predicted"] for row in made] == measured(work, "labelled")


def test_a_table_has_a_column_for_each_probability_and_its_cells_as_they_were(work: Work) -> None:
    with (work.folder / "new.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "note"], ["a film", UNEQUAL], ["another", ""]])
    finetune(work, "predict", "labelled", "new.csv", "-o", "out.csv").good()
    with (work.folder / "out.csv").open(newline="", encoding="utf-8") as file:
        made = list(csv.DictReader(file))
    assert list(made[0]) == ["text", "note", "predicted", "probability bad", "probability good"]
    assert [row["note"] for row in made] == [UNEQUAL, ""]
    assert all(float(row["probability bad"]) + float(row["probability good"]) == pytest.approx(1) for row in made)


def test_lists_and_gaps_have_a_cell_too(work: Work) -> None:
    work.lines("mixed.jsonl", [{"text": "x", "tags": ["a", 1]}, {"text": "y", "more": {"b": None}}])
    finetune(work, "predict", "labelled", "mixed.jsonl", "-o", "mixed.csv").good()
    with (work.folder / "mixed.csv").open(newline="", encoding="utf-8") as file:
        cells = [(row["tags"], row["more"]) for row in csv.DictReader(file)]
    assert cells == [('["a", 1]', ""), ("", '{"b": null}')]


def test_what_cannot_be_done_is_one_sentence(work: Work) -> None:
    work.lines("fine.jsonl", [{"text": "x"}])
    work.lines("taken.jsonl", [{"text": "x", "predicted": "y"}])
    work.lines("other.jsonl", [{"txt": "x"}])
    (work.folder / "there.csv").write_text("mine")
    cases = [
        (["fine.jsonl", "-o", "there.csv"], 2, "there.csv: exists already"),
        (["fine.jsonl", "-o", "out.txt"], 2, "the ending must be .jsonl or .csv"),
        (["fine.jsonl", "-o", "fine.jsonl", "--force"], 2, "is the file whose rows are read"),
        (["taken.jsonl", "-o", "none.csv"], 3, "has a column predicted already"),
        (["other.jsonl", "-o", "none.csv"], 3, "other.jsonl:1: the run was trained on rows with text"),
        (["fien.jsonl", "-o", "none.csv"], 3, "did you mean fine.jsonl?"),
    ]
    for arguments, code, words in cases:
        assert words in finetune(work, "predict", "labelled", *arguments).failed(code), arguments
    assert (work.folder / "there.csv").read_text() == "mine" and not (work.folder / "none.csv").exists()
    finetune(work, "predict", "labelled", "fine.jsonl", "-o", "there.csv", "--force").good()
    assert (work.folder / "there.csv").read_text().startswith("text,predicted,")


def test_bad_rows_stop_it_or_are_left_out_as_the_recipe_says(work: Work) -> None:
    (work.folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": ""}\n{"text": "b"}\n')
    said = finetune(work, "predict", "labelled", "bad.jsonl", "-o", "bad-out.jsonl").failed(3)
    assert "bad.jsonl:2: " in said and "bad.jsonl:3: text is empty" in said and "2 bad rows" in said
    assert not (work.folder / "bad-out.jsonl").exists()
    recipe = work.folder / "labelled" / "recipe.yaml"
    saved = recipe.read_text()
    recipe.write_text(saved.replace("on_error: stop", "on_error: skip"))
    try:
        answer = finetune(work, "predict", "labelled", "bad.jsonl", "-o", "bad-out.jsonl").good()
    finally:
        recipe.write_text(saved)
    assert [row["text"] for row in rows_of(work.folder / "bad-out.jsonl")] == ["a", "b"]
    assert "bad.jsonl:3: text is empty" in answer.err and "2 rows left out" in answer.err


def test_a_disk_that_fails_leaves_what_was_there(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.lines("fine.jsonl", [{"text": "x"}])
    (work.folder / "kept.csv").write_text("mine")

    def full(path: Path, data: str) -> None:
        raise DiskError("full")

    monkeypatch.setattr(command, "write_file", full)
    assert "full" in finetune(work, "predict", "labelled", "fine.jsonl", "-o", "kept.csv", "--force").failed(6)
    assert (work.folder / "kept.csv").read_text() == "mine"


@pytest.mark.parametrize("line", [1, 4, 8])
def test_generate_answers_a_row_as_evaluation_does(work: Work, line: int) -> None:
    work.lines("asked.jsonl", [row | {"completion": "another"} for row in ANSWERED])
    made = finetune(work, "generate", "answered", "--row", f"asked.jsonl:{line}", "--max-tokens", "4").good()
    assert made.out == f"{harmless(measured(work, 'answered')[line - 1])}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--row", "asked.jsonl:99"], 3, "no row there; the last is at line 8"),
        (["--row", "asked.jsonl"], 2, "write FILE:LINE"),
        (["--row", "absent.jsonl:1"], 3, "no such file"),
        (["--row", "broken.jsonl:2"], 3, "broken.jsonl:2: "),
        (["--row", "one-line.json:1"], 3, "2 rows there"),
        (["--row", "asked.jsonl:1", "a prompt"], 2, "give a PROMPT, or --row"),
        (["--row", "asked.jsonl:1", "--system", "x"], 2, "give a PROMPT, or --row"),
        ([], 2, "give a PROMPT, or --row"),
    ],
)
def test_a_row_that_cannot_be_asked_is_one_sentence(work: Work, arguments: list[str], code: int, said: str) -> None:
    work.lines("asked.jsonl", ANSWERED)
    (work.folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (work.folder / "one-line.json").write_text(json.dumps(ANSWERED[:2]))
    assert said in finetune(work, "generate", "answered", *arguments).failed(code)

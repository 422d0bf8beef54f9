"""A run is measured again on the rows that it recorded, whatever became of the files they came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.prepare import prepare
from finetune.disk.held_out_rows import read_held_out, write_held_out
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible
from finetune.recipe.schema import Recipe
from finetune.report.summary import account_of
from tests.end_to_end.command import Work
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import result_of

Rows = list[dict[str, Any]]
TWO_TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four\nfive \u2028 é"},
]
KINDS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "labels": ([{"text": f"film {i}", "label": ("good", "bad", "goodish")[i % 3]} for i in range(9)], {}),
    "answers": ([{"prompt": f"{i}?", "completion": "x" * i + "\r\n."} for i in range(6)], {}),
    "conversations": ([{"messages": TWO_TURNS} for _ in range(3)], {"data": {"test": "train.jsonl"}}),
    "windows of text": (
        [{"text": f"{i} a film that goes on and on and on"} for i in range(4)],
        {"data": {"long_rows": "split"}, "train": {"max_length": 16}},
    ),
    "cut ends": (
        [{"prompt": f"{i}?", "completion": "a film that goes on and on"} for i in range(6)],
        {"train": {"max_length": 16, "truncation": "end"}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    rows, more = KINDS[kind]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"path": "m"}, **more, "data": {"train": "train.jsonl", **more.get("data", {})}}
    prepared = result_of(prepare(Recipe.model_validate(values), byte_level(CHATML), base=tmp_path))
    assert prepared.held_out.examples
    run = RunFolder(tmp_path)
    write_held_out(run, prepared)
    run.write_json("data.json", account_of(prepared))
    found = read_held_out(run)
    assert found is not None
    assert (found.labels, found.label_tokens) == (prepared.labels, prepared.label_tokens)
    assert found.split.name == prepared.held_out.name
    for read, written in zip(found.split.examples, prepared.held_out.examples, strict=True):
        assert np.array_equal(read.tokens, written.tokens) and read.tokens.dtype == written.tokens.dtype
        assert np.array_equal(read.weights, written.weights) and read.weights.dtype == written.weights.dtype
        names = ("location", "answer", "prompt", "answer_start", "answer_end", "apart", "cut", "piece")
        assert [getattr(read, name) for name in names] == [getattr(written, name) for name in names]


def test_a_run_that_recorded_none_says_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_held_out(run) is None
    run.write_json("data.json", {"labels": []})  # as 0.1.0 writes it
    assert read_held_out(run) is None


# Whole commands.


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, dict[str, Any]]:
    """A working folder with one finished run, and what `eval` says of it when its files are as they were."""
    work = Work.of_one_block(tmp_path_factory)
    rows = [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows[:5])
    work.recipe(RECIPE)
    finetune(work, "train", "recipe.yaml").good()
    return work, measured(work, work.runs()[0])


def measured(work: Work, run: Path) -> dict[str, Any]:
    finetune(work, "eval", str(run)).good()
    told: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return told


def grown(file: Path) -> None:
    file.write_text(file.read_text() * 2)


def shrunk(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def ruined(file: Path) -> None:
    file.write_text("nonsense")


@pytest.mark.parametrize("change", [grown, shrunk, ruined, Path.unlink])
@pytest.mark.parametrize("name", ["rows.jsonl", "valid.jsonl"])
def test_it_is_measured_alike_whatever_became_of_its_files(
    done: tuple[Work, dict[str, Any]], name: str, change: Callable[[Path], None]
) -> None:
    work, before = done
    saved = (work.folder / name).read_bytes()
    change(work.folder / name)
    try:
        after = measured(work, work.runs()[0])
    finally:
        (work.folder / name).write_bytes(saved)
    assert after == before
    assert after["base"]["rows"] == 5
    assert "naive Bayes" in after["verdict"], "what the training rows told is in the report"


def line(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The second line of the file changed."""

    def changed(file: Path) -> None:
        lines = file.read_text().splitlines()
        values = json.loads(lines[1])
        change(values)
        file.write_text("\n".join([lines[0], json.dumps(values), *lines[2:]]) + "\n")

    return changed


@pytest.mark.parametrize(
    "change",
    [
        shrunk,
        ruined,
        lambda file: file.write_text(""),
        line(lambda row: row.update(tokens=[])),
        line(lambda row: row.update(tokens=[2**40])),
        line(lambda row: row["tokens"].reverse()),
        line(lambda row: row.update(expected="wonderful")),
        line(lambda row: row.update(supervised=[])),
        line(lambda row: row.pop("answer")),
    ],
)
def test_recorded_rows_that_were_changed_are_refused(
    done: tuple[Work, dict[str, Any]], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    work, before = done
    run = shutil.copytree(work.runs()[0], tmp_path / "copy")
    change(run / "held-out.jsonl")
    said = finetune(work, "eval", str(run)).failed(8)
    assert "held-out.jsonl" in said and "delete it" in said
    (run / "held-out.jsonl").unlink()
    assert measured(work, run) == before, "read from the recipe's files"


def test_a_run_without_them_needs_the_rows_that_it_measured(done: tuple[Work, dict[str, Any]], tmp_path: Path) -> None:
    """As runs of earlier versions are."""
    work, _ = done
    run = shutil.copytree(work.runs()[0], tmp_path / "copy")
    (run / "held-out.jsonl").unlink()
    saved = (work.folder / "valid.jsonl").read_bytes()
    grown(work.folder / "valid.jsonl")
    try:
        assert "data rows of valid: other rows" in finetune(work, "eval", str(run)).failed(8)
        assert "on 10 rows" in finetune(work, "eval", str(run), "--data", "valid.jsonl").good().out
    finally:
        (work.folder / "valid.jsonl").write_bytes(saved)


def test_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.held_out.write_text(
        '{"place": "a:1", "prompt": "", "expected": "x", "tokens": [1], "supervised": [], "answer": null, "flags": []}'
    )
    run.write_json("data.json", {"labels": ["x"], "held_out": {"split": "valid", "label_tokens": []}})
    with pytest.raises(Incompatible, match=r"held-out\.jsonl"):
        read_held_out(run)

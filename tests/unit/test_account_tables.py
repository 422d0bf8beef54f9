"""Tables of `plan` and `check` at 80 columns, and paths as a person names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.check.duplicates import Duplicates, Pair
from finetune.check.show import _duplicates
from finetune.console import plain_page
from finetune.data.rows import Prepared, Split
from finetune.report.prompts import distinct
from finetune.report.tables import account_notes, account_table
from finetune.text import from_here

LONG = "text is empty, and a reason may be so long that no cell of a narrow table can hold it; give it some text"


def prepared(folder: Path, lost: int) -> Prepared:
    bad = tuple((f"{folder / 'a long name of a file of rows.jsonl'}:{i}", LONG) for i in range(1, lost + 1))
    rows = tuple(f"{folder / 'rows.jsonl'}:{i}" for i in range(1, lost + 1))
    train = Split("train", 1_234_567, bad=bad, shortened=rows)
    return Prepared("text", "text", "plain", train=train, valid=Split("valid", 1))


def test_the_table_holds_figures_and_what_is_long_stands_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    found = prepared(tmp_path, 7)
    page = plain_page(lambda console: console.print(account_table(found)))
    assert "1,234,567" in page and LONG[:10] not in page and len(page.splitlines()) == 4
    shortened, *left_out = account_notes(found)
    assert shortened == f"train, shortened: {', '.join(f'rows.jsonl:{i}' for i in range(1, 6))}, and 2 more"
    assert left_out[0] == "train, left out:" and left_out[-1] == "  and 2 more" and len(left_out) == 7
    assert left_out[1] == f"  a long name of a file of rows.jsonl:1: {LONG}"


def test_nothing_is_said_of_rows_that_are_whole(tmp_path: Path) -> None:
    assert account_notes(prepared(tmp_path, 0)) == []


def test_what_leaked_stands_a_line_each_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leaks = [("test", "train", Pair(f"{tmp_path}/test.jsonl:{i}", f"{tmp_path}/train.jsonl:{i}", 1.0)) for i in (1, 2)]
    (part,) = _duplicates(Duplicates(leaks=leaks))
    assert str(part).splitlines()[1:] == [
        "  test test.jsonl:1 is in train: train.jsonl:1 (100%)",
        "  test test.jsonl:2 is in train: train.jsonl:2 (100%)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [("{here}/a.csv:3: bad", "a.csv:3: bad"), ("/elsewhere/a.csv:3", "/elsewhere/a.csv:3"), ("{here}", "{here}")],
)
def test_paths_are_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(text.format(here=tmp_path)) == said.format(here=tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("[INST]", "[/INST]"),
        ("<s>", "</s>"),
        ("Review: ", "\n\nSentiment:"),
        ("", ""),
    ],
)
def test_a_prompt_is_shown_without_its_template(before: str, after: str) -> None:
    texts = ["what is this? :)", "who wrote that? :)", "a<b? :)"]
    shown = distinct([f"{before}{text}{after}" for text in texts])
    assert [text.removesuffix(" :)") for text in shown] == [text.removesuffix(" :)") for text in texts]

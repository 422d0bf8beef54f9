"""Files of preferences are refused as what they are, and never trained as answers to imitate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.commands import init
from finetune.data.formats import recognise
from finetune.data.rows import Row
from finetune.errors import DataError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
DPO: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": TALK, "rejected": TALK},
    {"prompt": "q", "messages": TALK, "chosen": TALK, "rejected": TALK, "score_chosen": 1.0},
    {"question": "q", "response_chosen": "a", "response_rejected": "b"},
    {"instruction": "q", "output": "a", "Chosen": "a", "Rejected": "b"},
]
KTO: list[dict[str, Any]] = [
    {"prompt": "q", "completion": "a", "label": True},
    {"prompt": TALK[:1], "completion": TALK[1:], "label": False},
    {"messages": TALK, "label": False},
    {"conversations": TALK, "kto_tag": True},
    {"prompt": "q", "completion": "a", "label": "False"},
]


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(one, "f.jsonl", number) for number, one in enumerate(fields, 1)]


@pytest.mark.parametrize("row", DPO)
def test_two_answers_compared(row: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"f.jsonl:1: the rows are preferences \(.*hosen, .*ejected\), as DPO takes them"
    ):
        recognise(rows(row, row))


@pytest.mark.parametrize("row", KTO)
@pytest.mark.parametrize("wanted", ["auto", "chat", "prompt"])
def test_one_answer_judged(row: dict[str, Any], wanted: str) -> None:
    with pytest.raises(DataError, match=r"f.jsonl:1: the rows are answers with a verdict .*, as KTO takes them"):
        recognise(rows(row, row), wanted)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "q", "completion": "a", "label": "spam"}, "prompt"),
        ({"text": "t", "label": True}, "classification"),
        ({"messages": TALK, "rejected": "by whom"}, "chat"),
        ({"prompt": "q", "completion": "a", "chosen": True}, "prompt"),
    ],
)
def test_what_only_looks_alike_is_read(row: dict[str, Any], name: str) -> None:
    assert recognise(rows(row, row)).name == name


def test_the_better_answer_can_be_named() -> None:
    layout = recognise(rows(DPO[0]), "prompt", {"completion": "chosen"})
    assert (layout.name, layout.columns["completion"]) == ("prompt", "chosen")


@pytest.mark.parametrize("row", [KTO[0], KTO[3]])
def test_init_writes_no_recipe_for_them(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="takes them"):
        init.run(str(tmp_path / "rows.jsonl"), tmp_path / "recipe.yaml", "m", {})
    assert not (tmp_path / "recipe.yaml").exists()

"""`finetune check` from a file to what a person reads, and rows planted with every fault."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from finetune.check.survey import as_json
from finetune.check.tokens import TokenChecker
from finetune.commands.check import run
from finetune.data.loss_mask import tokenise
from finetune.data.rows import Example, Record, Rendered
from finetune.data.tokenizer import load_tokenizer, stop_tokens
from finetune.errors import DataError, RecipeError
from finetune.recipe.load import recipe_of
from tests.unit.check.surveys import MODEL, WORDS, page, recipe, rows, surveyed, write


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def test_clean_data_have_no_faults_and_every_section(tmp_path, tokenizer):
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", rows(40))))
    assert found.faults == 0 and found.tokens.rows == 40 and len(found.samples) == 3
    text = page(found, tokenizer)
    for said in (
        "read as prompt",
        "supervised tokens in brackets",
        "padding",
        "duplicates",
        "enough data?",
        "personal",
    ):
        assert said in text
    assert "[<|eos|>]" in text
    assert text.startswith("ready to train on 36 rows\ndata: too little, "), "the verdict comes first"
    assert json.loads(json.dumps(as_json(found, tokenizer)))["splits"]["train"]["rows"] == 36


def test_rows_beyond_the_models_own_context_are_reported(tmp_path, tokenizer):
    data = rows(40)
    data[3]["prompt"] = " ".join(WORDS * 200)
    path = write(tmp_path / "a.jsonl", data)
    said = f"1 row longer than the {MODEL.context:,} tokens of the model's context"
    for length, told in ((100_000, True), (512, False)):
        page_ = " ".join(page(surveyed(tokenizer, recipe(path, train={"max_length": length})), tokenizer).split())
        assert (said in page_) is told


def test_bad_rows_are_shown_with_everything_that_can_be_said_of_the_others(tmp_path, tokenizer):
    data = rows(40)
    data[7] = {"prompt": "no completion"}
    data[9] = {"prompt": "bell \x07", "completion": "x"}
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data)))
    assert [place.rsplit(":", 1)[1] for place, _ in found.bad] == ["8", "10"]
    assert found.faults == 2 and found.tokens.rows == 38
    assert "2 bad rows, to be fixed" in page(found, tokenizer)
    assert page(found, tokenizer).startswith("2 to fix before training\n")
    skipped = surveyed(tokenizer, recipe(str(tmp_path / "a.jsonl"), data={"on_error": "skip"}))
    assert skipped.faults == 1 and "2 of 36 rows (5.6%) would be left out" in skipped.broken[0][1]
    allowed = surveyed(tokenizer, recipe(str(tmp_path / "a.jsonl"), data={"on_error": "skip", "max_dropped": 0.06}))
    assert allowed.faults == 0 and allowed.bad == found.bad


def test_a_held_out_file_that_cannot_be_read_is_a_fault_of_its_own(tmp_path, tokenizer):
    (tmp_path / "v.json").write_text("[1, ")
    train = write(tmp_path / "a.jsonl", rows(40))
    found = surveyed(tokenizer, recipe(train, data={"valid": str(tmp_path / "v.json")}))
    assert found.faults == 1 and found.broken[0][0].endswith("v.json:1") and found.prepared.train.rows == 36


def test_personal_data_are_masked_everywhere(tmp_path, tokenizer):
    data = rows(40)
    for row in data[:5]:
        row["completion"] += ", write to jane.doe@example.org"
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data)))
    text = page(found, tokenizer) + json.dumps(as_json(found, tokenizer))
    assert "e-mail address: 5 in 5 rows" in text and "jane.doe" not in text and "a.jsonl:1 j***" in text
    assert len(found.samples) == 3
    assert {int(one.location.rsplit(":", 1)[1]) for one in found.samples}.isdisjoint(range(1, 6))


def test_files_that_leave_no_row_to_validate_with(tmp_path, tokenizer):
    """The rest is still said, and skipping bad rows does not fix it."""
    same = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", rows(1) * 20), data={"on_error": "skip"}))
    assert same.faults == 1 and "too few different rows" in same.broken[0][1]
    assert len(same.prepared.train.examples) == 20 and len(same.duplicates.exact) == 19
    long = write(tmp_path / "v.jsonl", [{"prompt": "x", "completion": " ".join(WORDS * 30)}])
    settings = recipe(write(tmp_path / "b.jsonl", rows(30)), data={"valid": long}, train={"max_length": 128})
    found = surveyed(tokenizer, settings)
    assert found.broken[0][0] == "data.valid" and found.lengths.dropped[0][0].endswith("v.jsonl:1")


def test_long_rows_are_counted_as_the_recipe_treats_them(tmp_path, tokenizer):
    data = rows(40)
    data[3]["prompt"] = " ".join(WORDS * 20)
    path = write(tmp_path / "a.jsonl", data)
    for truncation, where in (("prompt", "shortened"), ("end", "dropped"), ("drop", "dropped")):
        found = surveyed(tokenizer, recipe(path, train={"max_length": 64, "truncation": truncation}))
        assert len(getattr(found.lengths, where)) == 1 and found.lengths.percentiles[100] > 200
        assert [reason[:12] for _, reason in found.broken] == ["1 of 36 rows"] * (where == "dropped"), truncation
    assert surveyed(tokenizer, recipe(path, train={"max_length": 64, "truncation": "error"})).faults == 1


def test_labels_groups_leaks_and_contradictions(tmp_path, tokenizer):
    data = [{"text": f"{'fine' if i % 2 else 'poor'} film number {i}", "label": "ab"[i % 2]} for i in range(60)]
    data += [data[0] | {"label": "b"}]
    train, test = write(tmp_path / "a.jsonl", data), write(tmp_path / "t.jsonl", data[:1])
    found = surveyed(tokenizer, recipe(train, data={"test": test, "groups": {"twos": ["2"]}}))
    text = page(found, tokenizer)
    assert "contradictory: 1 text under" in text and "leaked: 1 row held out" in text and "twos" in text
    assert {one.word for one in found.balance.words["a"]} >= {"poor"}
    assert found.label_lengths.keys() == {"a", "b"}


PLANTED = {
    "token that the model lacks": lambda row: replaced(row, [10**6, *row.tokens[1:]]),
    "no supervised token": lambda row: replaced(row, row.tokens, np.zeros(len(row))),
    "no end token": lambda row: replaced(row, row.tokens[:-1], row.weights[:-1]),
    "begin token doubled": lambda row: replaced(row, [7, 7, *row.tokens], [0, 0, *row.weights]),
    "prompt is not the beginning": lambda row: dataclasses.replace(replaced(row, [9, *row.tokens[1:]]), apart=True),
}


def replaced(row: Example, tokens: Any, weights: Any = None) -> Example:
    values = row.weights if weights is None else np.array(weights, np.float32)
    return dataclasses.replace(row, tokens=np.array(tokens, np.int32), weights=values)


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_faults_are_named(tokenizer, kind):
    rendered = Rendered(Record("a:1"), "Is it good? yes", ((11, 15),), (11, 15), False)
    (row,) = tokenise(tokenizer, [rendered])
    checker = TokenChecker(tokenizer, stop_tokens(tokenizer), True, vocabulary=10**6)
    checker.begin = [7]
    checker.look([row, PLANTED[kind](row), row])
    assert {one: len(rows) for one, rows in checker.result.faults.items() if rows} == {kind: 1}


def test_parquet(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pa.Table.from_pylist(rows(20)), tmp_path / "a.parquet")
    assert len(surveyed(tokenizer, recipe(str(tmp_path / "a.parquet"))).prepared.train.records) == 18


def test_the_command_ends_with_3_after_writing_json(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [*rows(20), {"prompt": "x"}])
    with pytest.raises(DataError, match=r"1 fault to fix.*on_error: skip") as caught:
        run(recipe_of(data, []), tmp_path / "out.json")
    assert caught.value.exit_code == 3
    assert "a.jsonl:21: completion is missing" in capsys.readouterr().out.replace("\n", "")
    assert json.loads((tmp_path / "out.json").read_text())["faults"] == 1


def test_changes_need_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="changes belong to a recipe"):
        recipe_of(str(tmp_path / "a.jsonl"), ["lora.rank=4"])


def test_a_character_of_several_tokens_is_shown_whole(tmp_path, tokenizer):
    data = [row | {"completion": "漢字 ¿Qué?"} for row in rows(30)]
    text = page(surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data))), tokenizer)
    assert "漢" in text and "¿" in text and "\ufffd" not in text

"""`finetune check` from a file to what a person reads, and rows planted with every fault."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from finetune.check.record import as_json
from finetune.check.show import show
from finetune.check.survey import survey
from finetune.check.tokens import TokenChecker
from finetune.commands.check import check, recipe_of
from finetune.data.records import Record
from finetune.data.rendered import Rendered
from finetune.data.tokenise import tokenise
from finetune.errors import DataError, RecipeError
from finetune.recipe import Recipe
from finetune.sources import builtin
from finetune.tokenizer import load_tokenizer

MODEL = builtin("builtin:reviews-base")
WORDS = [
    "a",
    "warm",
    "film",
    "with",
    "a",
    "good",
    "cast",
    "and",
    "a",
    "story",
    "that",
    "moves",
    "slowly",
    "but",
    "ends",
    "very",
    "well",
    "indeed",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Number {i}: {' '.join(WORDS[i % 9 :])}?", "completion": f"yes, {i} times"} for i in range(count)
    ]


def write(path: Path, found: list, end: str = "\n") -> str:
    path.write_text(end.join(json.dumps(row) for row in found) + end, encoding="utf-8", newline="")
    return str(path)


def recipe(path: str, **keys) -> Recipe:
    values = {"model": {"path": "builtin:reviews-base"}, "prompt": {"template": "plain"}, "data": {"train": path}}
    return Recipe.model_validate(values | {k: values.get(k, {}) | v for k, v in keys.items()})


def surveyed(tokenizer, settings: Recipe):
    return survey(settings, MODEL, tokenizer, Path.cwd(), lambda what, done, total: None)


def page(found, tokenizer) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, found, tokenizer)
    return console.export_text()


def test_clean_data_have_no_faults_and_every_section(tmp_path, tokenizer):
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", rows(40))))
    assert found.faults == 0 and found.tokens.rows == 40 and len(found.samples) == 3
    text = page(found, tokenizer)
    for said in ("read as prompt", "learned tokens in brackets", "padding:", "duplicates", "enough data?", "personal"):
        assert said in text
    assert "[<|eos|>]" in text
    assert json.loads(json.dumps(as_json(found, tokenizer)))["splits"]["train"]["rows"] == 36


def test_bad_rows_are_shown_with_everything_that_can_be_said_of_the_others(tmp_path, tokenizer):
    data = rows(40)
    data[7] = {"prompt": "no completion"}
    data[9] = {"prompt": "bell \x07", "completion": "x"}
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data)))
    assert [place.rsplit(":", 1)[1] for place, _ in found.bad] == ["8", "10"]
    assert found.faults == 2 and found.tokens.rows == 38
    assert "2 bad rows, to be mended" in page(found, tokenizer)
    skipped = surveyed(tokenizer, recipe(str(tmp_path / "a.jsonl"), data={"on_error": "skip"}))
    assert skipped.faults == 0 and skipped.bad == found.bad


def test_a_held_out_file_that_cannot_be_read_is_a_fault_of_its_own(tmp_path, tokenizer):
    (tmp_path / "v.json").write_text("[1, ")
    train = write(tmp_path / "a.jsonl", rows(40))
    found = surveyed(tokenizer, recipe(train, data={"valid": str(tmp_path / "v.json")}))
    assert found.faults == 1 and found.broken[0][0].endswith("v.json:1") and found.splits["train"].rows == 36


def test_personal_data_are_masked_everywhere(tmp_path, tokenizer):
    data = rows(40)
    for row in data[:5]:
        row["completion"] += ", write to jane.doe@example.org"
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data)))
    text = page(found, tokenizer) + json.dumps(as_json(found, tokenizer))
    assert "e-mail address: 5 in 5 rows" in text and "jane.doe" not in text and "a.jsonl:1 j***" in text
    assert len(found.samples) == 3
    assert {int(one.place.rsplit(":", 1)[1]) for one in found.samples}.isdisjoint(range(1, 6))


def test_files_that_leave_no_row_to_validate_with(tmp_path, tokenizer):
    """The rest is still said, and skipping bad rows does not mend it."""
    same = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", rows(1) * 20), data={"on_error": "skip"}))
    assert same.faults == 1 and "too few different rows" in same.broken[0][1]
    assert same.splits["train"].used == 20 and len(same.duplicates.exact) == 19
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
        assert len(getattr(found.lengths, where)) == 1 and found.faults == 0, truncation
        assert found.lengths.percentiles[100] > 200
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
    "no supervised token": lambda row: dataclasses.replace(row, weights=[0.0] * len(row)),
    "no end token": lambda row: dataclasses.replace(row, tokens=row.tokens[:-1], weights=row.weights[:-1]),
    "begin token doubled": lambda row: dataclasses.replace(
        row, tokens=[7, 7, *row.tokens], weights=[0.0, 0.0, *row.weights], answer=None
    ),
    "prompt is not the beginning": lambda row: dataclasses.replace(row, tokens=[9, *row.tokens[1:]], split=True),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_faults_are_named(tokenizer, kind):
    rendered = Rendered(Record("a:1"), "Is it good? yes", ((11, 15),), (11, 15), False)
    (row,) = tokenise(tokenizer, [rendered])
    checker = TokenChecker(tokenizer, end_token=True)
    checker.begin = [7]
    checker.look([row, PLANTED[kind](row)])
    assert {one: len(places) for one, places in checker.found.faults.items() if places} == {kind: 1}


def messy(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files as people have them, and what must be said of each: what it is, or why it is refused and where."""
    data = rows(30)
    lines = [json.dumps(row) for row in data]
    pretty = "\n".join(json.dumps(row, indent=2) for row in data)
    table = [("Prompt", "Completion"), *((row["prompt"] + '\nwith "quotes",', row["completion"]) for row in data)]
    turns = [
        {"id": str(i), "conversations": [{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": "x"}]}
        for i, r in enumerate(data)
    ]
    typed = [{"type": "text", "value": "hi"}]
    asked = [[{"type": "text", "text": f"say {i}"}] for i in range(20)]
    parts = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": typed}]} for a in asked]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    calls = [{"messages": [{"role": "user", "content": f"do {i}"}, calling]} for i in range(20)]
    with (folder / "quotes.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(table)
    texts: dict[str, tuple[str | bytes, str]] = {
        "crlf.jsonl": ("\r\n".join(lines), "CRLF line ends"),
        "named.json": ("\n".join(lines), "JSON Lines, not one JSON value"),
        "pretty.jsonl": (pretty, "JSON objects that span lines"),
        "array.jsonl": (json.dumps(data), "one JSON array, not JSON Lines"),
        "comma.jsonl": ("\n".join([*lines[:3], lines[3] + ",", "", *lines[4:]]), r"comma.jsonl:4: .*remove the comma"),
        "capital.jsonl": ("\n".join(json.dumps({k.title(): v for k, v in r.items()}) for r in data), "took Prompt as"),
        "python.jsonl": ("\n".join([*lines, repr(data[0])]), r"python.jsonl:31: .*looks like Python"),
        "latin.jsonl": ("\n".join([*lines, '{"prompt": "é", "completion": "x"}']).encode("latin-1"), "it is é"),
        "wide.jsonl": ("\n".join(lines).encode("utf-16"), "wide.jsonl:1: the file is UTF-16"),
        "nested.json": ("\n".join(json.dumps({"translation": r}) for r in data), r"nested.json:1: the columns"),
        "schemas.jsonl": ("\n".join([*lines, '{"turns": ["a"]}']), "schemas.jsonl:31: prompt, completion is missing"),
        "ragged.csv": (
            "You are a bot,Hi,Hello\nYou are,Hi,Hello,And,So\nYou are,Hi,Hi\n",
            r"ragged.csv:1: .*\n.*ragged.csv:2: 5 cells",
        ),
        "sharegpt.json": (json.dumps(turns, indent=1), "read as sharegpt"),
        "typed.jsonl": ("\n".join(map(json.dumps, parts)), "read as chat"),
        "calls.jsonl": ("\n".join(map(json.dumps, calls)), "read as chat"),
        "pair.tsv": ("prompt\tcompletion\n" + "\n".join(f'"{i} is\ta "quoted" {i}' for i in range(20)), "do not pair"),
        "mixed.csv": ("prompt,completion\r\n" + "\n".join(f"ask {i},yes" for i in range(20)) + "\n", "mixed line ends"),
    }
    found = {"quotes.csv": (folder / "quotes.csv", "UTF-8 with a byte order mark")}
    for name, (text, said) in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        found[name] = (folder / name, said)
    return found


MESSY = """quotes.csv crlf.jsonl named.json pretty.jsonl array.jsonl comma.jsonl capital.jsonl python.jsonl latin.jsonl
wide.jsonl nested.json schemas.jsonl ragged.csv sharegpt.json typed.jsonl calls.jsonl pair.tsv mixed.csv"""


@pytest.mark.parametrize("name", re.findall(r"\S+", MESSY))
def test_messy_files_are_understood_or_refused(tmp_path, tokenizer, name):
    path, said = messy(tmp_path)[name]
    try:
        text = page(surveyed(tokenizer, recipe(str(path))), tokenizer)
    except DataError as error:
        text = str(error)
    assert re.search(said, text, re.DOTALL), text


def test_parquet(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pa.Table.from_pylist(rows(20)), tmp_path / "a.parquet")
    assert surveyed(tokenizer, recipe(str(tmp_path / "a.parquet"))).splits["train"].good == 18


def test_the_command_ends_with_3_after_writing_json(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [*rows(20), {"prompt": "x"}])
    with pytest.raises(DataError, match=r"1 fault to mend.*on_error: skip") as caught:
        check(data, [], tmp_path / "out.json")
    assert caught.value.exit_code == 3
    assert "a.jsonl:21: completion is missing" in capsys.readouterr().out.replace("\n", "")
    assert json.loads((tmp_path / "out.json").read_text())["faults"] == 1


def test_changes_need_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="changes belong to a recipe"):
        recipe_of(str(tmp_path / "a.jsonl"), ["lora.rank=4"])

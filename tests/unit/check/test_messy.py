"""Files as people have them: each is understood, and said as what, or refused with its place and the remedy."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from finetune.data.tokenizer import load_tokenizer
from finetune.errors import DataError
from tests.unit.check.surveys import MODEL, page, recipe, rows, surveyed


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


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
        "mac.jsonl": ("\r".join(lines), "mac.jsonl:1: .*CR alone"),
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
wide.jsonl mac.jsonl nested.json schemas.jsonl ragged.csv sharegpt.json typed.jsonl calls.jsonl pair.tsv mixed.csv"""


@pytest.mark.parametrize("name", re.findall(r"\S+", MESSY))
def test_messy_files_are_understood_or_refused(tmp_path, tokenizer, name):
    path, said = messy(tmp_path)[name]
    try:
        text = page(surveyed(tokenizer, recipe(str(path))), tokenizer)
    except DataError as error:
        text = str(error)
    assert re.search(said, text, re.DOTALL), text

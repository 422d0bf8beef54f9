"""Special tokens in the rows' own words are told; those that a template writes are not."""

from __future__ import annotations

import copy
import json

import pytest

from finetune.check.survey import as_json
from finetune.check.tokens import special_pattern
from finetune.check.verdict import headline
from finetune.data.tokenizer import load_tokenizer
from tests.unit.check.surveys import MODEL, page, recipe, rows, surveyed, write
from tests.unit.data.toy_tokenizers import CHATML, byte_level


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def conversation(question: str, answer: str = "it is a label") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_rows_tokens_and_places_are_told_and_nothing_is_refused(tmp_path, tokenizer):
    data = rows(40)
    data[2]["prompt"] += " <|eos|>"
    data[4]["completion"] = "yes <|eos|> and <|eos|>"
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data)))
    assert found.faults == 0 and found.specials.tokens == {"<|eos|>": 2} and not found.specials.meant
    assert sorted(place.rsplit(":", 1)[1] for place in found.specials.locations) == ["3", "5"]
    text = page(found, tokenizer)
    assert "special tokens written out in 2 rows: <|eos|> (2 rows)" in text and "a.jsonl:3" in text
    values = json.loads(json.dumps(as_json(found, tokenizer)))
    assert values["special_tokens"]["tokens"] == {"<|eos|>": 2}
    assert "2 with special tokens written out" in headline(values)


def test_plain_text_may_mean_them(tmp_path, tokenizer):
    data = [{"text": f"number {i} is a fine film <|eos|> and that is all"} for i in range(40)]
    found = surveyed(tokenizer, recipe(write(tmp_path / "a.jsonl", data)))
    assert found.prepared.task == "text" and found.specials.meant and len(found.specials.locations) == 40
    text = page(found, tokenizer)
    assert "in 40 rows" in text and "may want it" in text and "take them out" not in text
    assert "special" not in headline(as_json(found, tokenizer))


def test_what_a_template_writes_is_not_the_rows_own(tmp_path):
    chat = byte_level(CHATML)
    data = [conversation(f"what is this, number {i}?") for i in range(30)]
    settings = recipe(write(tmp_path / "a.jsonl", data), prompt={"template": "chat"})
    assert surveyed(chat, settings).specials.locations == []
    data[1] = conversation("what is this?<|im_end|>\n<|im_start|>system")
    data[3]["messages"].insert(0, {"role": "system", "content": "</s>"})
    data[5]["messages"][1]["reasoning_content"] = "<|eot|>"
    found = surveyed(chat, recipe(write(tmp_path / "a.jsonl", data), prompt={"template": "chat"}))
    assert found.specials.tokens == {"<|im_end|>": 1, "<|im_start|>": 1, "</s>": 1, "<|eot|>": 1}
    assert len(found.specials.locations) == 3


def test_columns_count_that_the_recipes_own_template_takes(tmp_path, tokenizer):
    data = [{**row, "title": "<|eos|>", "id": "<|eos|>"} for row in rows(30)]
    path = write(tmp_path / "a.jsonl", data)
    assert surveyed(tokenizer, recipe(path, prompt={"template": "{prompt}<|eos|>"})).specials.locations == []
    assert len(surveyed(tokenizer, recipe(path, prompt={"template": "{title}: {prompt}"})).specials.locations) == 30


def test_the_longest_token_is_found_and_one_that_is_read_as_text_is_not():
    chat = copy.deepcopy(byte_level(CHATML))
    chat.add_special_tokens({"additional_special_tokens": ["<s>x"]})
    assert special_pattern(chat).findall("<s>x<s>") == ["<s>x", "<s>"]
    chat.split_special_tokens = True
    assert special_pattern(chat).findall("<s>x</s>") == []

"""Loading a folder's tokenizer, and where its answers end."""

from __future__ import annotations

import json

import pytest
from toy_tokenizers import CHATML, GEMMA, byte_level, metaspace

from backends.model_folder import ModelFolder
from finetune.data.tokenizer import begin_tokens, encode_prompt, load_tokenizer, stop_tokens
from finetune.errors import EnvironmentProblem


def opened(folder):
    (folder / "config.json").write_text("{}")
    return ModelFolder.open(folder)


def test_a_folder_gives_the_same_tokenizer_back(tmp_path):
    made = metaspace(CHATML)
    made.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    loaded = load_tokenizer(opened(tmp_path))
    assert encode_prompt(loaded, "A fine film") == encode_prompt(made, "A fine film")
    assert stop_tokens(loaded) == {1, 9, loaded.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("broken", [None, "{"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, broken):
    if broken:
        (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(EnvironmentProblem, match="the tokenizer cannot be loaded"):
        load_tokenizer(opened(tmp_path))


def test_begin_tokens():
    assert begin_tokens(byte_level()) == []
    assert begin_tokens(byte_level(bos=True)) == begin_tokens(byte_level(bos=True, ends=True)) == [0]
    assert encode_prompt(byte_level(bos=True), "<s>good") == encode_prompt(byte_level(bos=True), "good")


def test_a_template_that_fails_ends_no_turn():
    tokenizer = byte_level("{{ raise_exception('no') }}")
    assert stop_tokens(tokenizer) == {tokenizer.eos_token_id}
    assert byte_level(GEMMA).convert_tokens_to_ids("<end_of_turn>") in stop_tokens(byte_level(GEMMA))

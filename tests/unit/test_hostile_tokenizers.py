"""Tokenizers that blow a text up, make tables without end or end the process: one sentence that names the file."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from backends.model_folder import ModelFolder
from finetune.data import tokenizer_bounds, tokenizer_trial
from finetune.data.tokenizer import answer_text, begin_tokens, encode_prompt, load_tokenizer, stop_tokens
from finetune.data.tokenizer_bounds import GROWTH, check_tokenizer
from finetune.errors import EnvironmentProblem, ExitCode, explain
from tests.end_to_end.command import Work, reviews
from tests.unit.hostile import no_network, refused  # noqa: F401
from tests.unit.test_hostile_files import TOKENIZER, TOKENIZER_CONFIG, tokenizer_folder
from tests.unit.test_wrong_resume import finetune

VOCABULARY: dict[str, Any] = TOKENIZER["model"]["vocab"]  # type: ignore[index]
SPECIAL: dict[str, Any] = TOKENIZER["added_tokens"][0]  # type: ignore[index]
CHAINS = {"normalizer": "normalizers", "decoder": "decoders", "post_processor": "processors"}


def replace(given: str, by: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: given}, "content": by}


def chain(key: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {key: {"type": "Sequence", CHAINS[key]: list(steps)}}


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step]}
    return {"normalizer": step}


def template(single: list[Any], ids: list[int] | None = None) -> dict[str, Any]:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"</s>": {"id": "</s>", "ids": ids or [5], "tokens": ["</s>"] * len(ids or [5])}}
    return {"post_processor": {
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
    }}  # fmt: skip


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {**TOKENIZER["model"], **changes}}  # type: ignore[dict-item]


def charsmap(table: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}}


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }}  # fmt: skip


BEGIN, TEXT = {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
HOSTILE: dict[str, dict[str, Any]] = {
    "a -> 1000 a, four times": chain("normalizer", *[replace("a", "a" * 1000)] * 4),
    "a -> 2 a, forty times": chain("normalizer", *[replace("a", "aa")] * 40),
    "a -> one character of 18 in NFKD": chain("normalizer", replace("a", "\ufdfa" * 9), {"type": "NFKD"}),
    "a pattern -> much": {"normalizer": replace("[a-z]", "a" * 5000, "Regex")},
    "no type": {"normalizer": {"pattern": {"String": "a"}, "content": "a" * 5000}},
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "added tokens that are normalized": {"normalizer": replace("<", "<" * 99)} | {
        "added_tokens": [SPECIAL | {"id": 5 + i, "content": "<" * 40 + f"{i}>"} for i in range(3000)]
    },
    "prepend a little, then replace": chain(
        "normalizer", {"type": "Prepend", "prepend": "x" * 20}, replace("x", "x" * 50)
    ),
    "a table that replaces by much": charsmap(b"\4\0\0\0" + b"\0" * 4 + b"x" * 5000 + b"\0"),
    "nothing -> something": {"normalizer": replace("", "abc")},
    "nothing -> something, a pattern": {"normalizer": replace("", "abc", "Regex")},
    "sequences in sequences": nested(60),
    "many steps": chain("normalizer", *[{"type": "NFC"}] * 500),
    "specials without number": template([BEGIN] * 10**5 + [TEXT]),
    "one special of many ids": template([BEGIN, TEXT], [5] * 10**5),
    "the text many times": template([TEXT] * 50),
    "decoder": chain("decoder", *[replace("a", "a" * 1000)] * 4),
    "decoder: nothing -> something": {"decoder": replace("", "a" * 5000)},
    "decoder strips without end": {"decoder": {"type": "Strip", "content": "a", "start": 10**18, "stop": 10**18}},
    "a hole": model(vocab=VOCABULARY | {"z": 10**9}),
    "a hole of added tokens": {"added_tokens": [SPECIAL, SPECIAL | {"id": 10**9, "content": "<far>"}]},
    "a hole of WordLevel": {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**31}, "unk_token": "a"}},
    "a number of 400 digits": model(vocab=VOCABULARY | {"z": 10**400}),
    "a token of a million characters": model(vocab=VOCABULARY | {"z" * 10**6: 6}),
    "a prefix of a million characters": model(continuing_subword_prefix="z" * 10**6),
    "words without end": {"model": {
        "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "", "vocab": VOCABULARY,
        "max_input_chars_per_word": 10**18,
    }},
    "added tokens without number": {
        "added_tokens": [SPECIAL | {"id": 5 + i, "content": f"<{i}>"} for i in range(200_000)]
    },
    "garbage for a table": charsmap(bytes(range(200))),
    "nothing for a table": charsmap(b"\0" * 200),
    "half a table": charsmap(b"\0"),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a list for a type": {"pre_tokenizer": {"type": ["NFC"]}},
    "a list for a pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ["a"]}, "content": "b"}},
    "text for a vocabulary": model(vocab="many"),
    "a pattern that backtracks": split("(a+)+$") | {"normalizer": replace("abc", "a" * 60 + "!")},
}  # fmt: skip
HOSTILE_CONFIG: dict[str, dict[str, Any]] = {
    "extra ids": {"tokenizer_class": "T5TokenizerFast", "extra_ids": 10**8},
    "extra ids below zero": {"tokenizer_class": "ByT5Tokenizer", "extra_ids": -(10**9)},
    "offset": {"tokenizer_class": "PegasusTokenizer", "offset": 10**8},
    "specials without number": {"additional_special_tokens": [f"<q{i}>" for i in range(100_000)]},
    "extra specials without number": {"extra_special_tokens": {f"q{i}": f"<q{i}>" for i in range(100_000)}},
    "a token of a million characters": {"eos_token": "x" * 10**6},
    "a token object of a million characters": {"eos_token": {"__type": "AddedToken", "content": "x" * 10**6}},
    "a special of a million characters": {"extra_special_tokens": ["x" * 10**6]},
    "a decoder's token of a million characters": {"added_tokens_decoder": {"9": {"content": "x" * 10**6}}},
    "a list for a token": {"eos_token": ["a", "b"]},
    "a number for a token": {"eos_token": 5},
    "text for a number": {"model_max_length": "many"},
    "a list for a class": {"tokenizer_class": ["a"]},
    "no such side": {"padding_side": "up"},
}


@pytest.fixture(scope="module", autouse=True)
def _libraries_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before any bound on memory."""
    _use(tokenizer_folder(tmp_path_factory.mktemp("first")))


def _use(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelFolder.open(folder))
    begin_tokens(tokenizer)
    answer_text(tokenizer, encode_prompt(tokenizer, "abc ab" * 20), stop_tokens(tokenizer))


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, what: str) -> None:
    assert "tokenizer.json" in (refused(_use, tokenizer_folder(tmp_path, json.dumps(TOKENIZER | HOSTILE[what]))) or "")


@pytest.mark.parametrize("what", HOSTILE_CONFIG)
def test_a_hostile_tokenizer_config_is_refused(tmp_path: Path, what: str) -> None:
    config = json.dumps(TOKENIZER_CONFIG | HOSTILE_CONFIG[what])
    assert "tokenizer_config.json" in (refused(_use, tokenizer_folder(tmp_path, config=config)) or "")


HONEST: dict[str, dict[str, Any]] = {
    "llama": chain("normalizer", {"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")) | {
        "decoder": {"type": "Sequence", "decoders": [
            replace("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]}
    } | template([BEGIN, TEXT]),
    "gemma": {"normalizer": replace(" ", "\u2581"), "decoder": {"type": "Sequence", "decoders": [
        replace("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
    ]}},
    "qwen": split(r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"),
    "albert": chain(
        "normalizer", replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, replace(" {2,}", " ", "Regex")
    ),
    "a vocabulary for other words too": {"added_tokens": [SPECIAL | {"id": 50_000}]},
}  # fmt: skip


@pytest.mark.parametrize("what", HONEST)
def test_an_honest_tokenizer_needs_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr("finetune.data.tokenizer.try_tokenizer", None)
    _use(tokenizer_folder(tmp_path, json.dumps(TOKENIZER | HONEST[what])))


def test_growth_is_refused_where_it_passes_the_bound_and_not_before(tmp_path: Path) -> None:
    for by, good in ((GROWTH, True), (GROWTH + 1, False)):
        folder = tokenizer_folder(tmp_path, json.dumps(TOKENIZER | {"normalizer": replace("a", "a" * by)}))
        assert (refused(check_tokenizer, folder) is None) == good


def test_an_honest_part_that_nobody_knows_is_tried_and_used(tmp_path: Path) -> None:
    odd = TOKENIZER | {"pre_tokenizer": {"type": "FixedLength", "length": 2}}
    folder = tokenizer_folder(tmp_path, json.dumps(odd))
    assert not check_tokenizer(folder)
    assert refused(_use, folder) is None


def test_a_trial_is_bounded_in_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tokenizer_folder(tmp_path, json.dumps(TOKENIZER | HOSTILE["a -> 1000 a, four times"])) / "tokenizer.json"
    monkeypatch.setattr(tokenizer_trial, "MEMORY", 2**28)
    with pytest.raises(EnvironmentProblem, match="does not survive a trial of 10 s and 256 MB"):
        tokenizer_trial.try_tokenizer(file)
    slow = TOKENIZER | {"normalizer": replace("a", "a" * 30_000)} | split("b")
    file.write_text(json.dumps(slow))
    monkeypatch.setattr(tokenizer_trial, "MEMORY", 2**33)
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0)
    began = time.monotonic()
    with pytest.raises(EnvironmentProblem, match=r"SIGKILL|SIGXCPU|out of memory"):
        tokenizer_trial.try_tokenizer(file)
    assert time.monotonic() - began < 30


def test_json_of_millions_of_values_is_not_read(tmp_path: Path) -> None:
    for text in ("[" + "[]," * 4_000_000 + "0]", "[" + "1," * 7_000_000 + "0]", "[" + "{}," * 600_000 + "0]"):
        folder = tokenizer_folder(tmp_path, f'{{"a": {text}}}')
        assert "tokenizer.json: the tokenizer cannot be loaded (millions of" in (refused(_use, folder) or "")


def test_a_long_template_is_no_token(tmp_path: Path) -> None:
    config = TOKENIZER_CONFIG | {"chat_template": "{#" + "x" * 20_000 + "#}", "default_system_prompt": "x" * 20_000}
    assert refused(_use, tokenizer_folder(tmp_path, config=json.dumps(config))) is None


NONSENSE = [2**40, -1, "text", [[2]], [1, "2"], {"a": 1}, True, 1.5, [10**400]]


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_nonsense_as_stop_tokens_is_refused(tmp_path: Path, value: Any) -> None:
    folder = tokenizer_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "generation_config.json" in (refused(_use, folder) or "")


def test_a_panic_is_one_sentence() -> None:
    class PanicException(BaseException):
        pass

    message, code = explain(PanicException("it ends here")) or ("", ExitCode.BUG)
    assert (code, "it ends here" in message) == (ExitCode.BACKEND, True)


def test_every_command_refuses_it(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", tokenizer_folder(tmp_path / "model", json.dumps(TOKENIZER | HOSTILE["a hole"])))
    work.lines("rows.jsonl", reviews(0, 8))
    work.recipe("data: {train: rows.jsonl}\nbackend: reference\n")
    for command in ("check", "plan", "train"):
        message = finetune(work, command, "recipe.yaml").failed(7)
        assert "tokenizer.json: its highest token has the number 1,000,000,000" in message


@pytest.mark.parametrize("dropout", [0.001, 0.1, 1, True, "0.5"])
def test_tokens_by_chance_are_refused(tmp_path: Path, dropout: Any) -> None:
    folder = tokenizer_folder(tmp_path / "t", json.dumps(TOKENIZER | model(dropout=dropout)))
    with pytest.raises(EnvironmentProblem, match=r"tokenizer\.json: .dropout.: .* set it to null"):
        load_tokenizer(ModelFolder.open(folder))


@pytest.mark.parametrize("dropout", [None, 0, 0.0])
def test_no_dropout_is_none(tmp_path: Path, dropout: Any) -> None:
    folder = tokenizer_folder(tmp_path / "t", json.dumps(TOKENIZER | model(dropout=dropout)))
    assert encode_prompt(load_tokenizer(ModelFolder.open(folder)), "abab") == [3, 3]


def test_sampling_of_another_name_is_seen_in_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tokenizer_folder(tmp_path / "t", json.dumps(TOKENIZER | model(dropout=0.1)))
    monkeypatch.setattr(tokenizer_bounds, "_check_vocabulary", lambda whole: None)
    with pytest.raises(EnvironmentProblem, match="other tokens each time"):
        load_tokenizer(ModelFolder.open(folder))

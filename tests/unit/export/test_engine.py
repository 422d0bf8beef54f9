"""llama.cpp behind the reading methods of a session: scores, answers, tokens and prompts, in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("xllamacpp")

from backends.interface import Batch
from finetune import connections, launch
from finetune.errors import EnvironmentProblem
from finetune.export import packages
from finetune.export.engine import Engine
from tests.tiny_models import CHAT, model_with_tokenizer
from tests.unit.export.gguf_models import TOKENS, chat, engine, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    write(folder, folder / "model.gguf", template=CHAT)
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def reader(file: Path) -> Engine:
    return engine(file)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs(whole: Any, tokens: list[int]) -> Any:
    """[tokens, vocabulary]"""
    with torch.no_grad():
        return torch.log_softmax(whole(torch.tensor([tokens])).logits[0].double(), -1).numpy()


def test_scores_are_those_of_transformers(whole: Any, reader: Engine) -> None:
    inputs, random = np.array([TOKENS[:30], TOKENS[30:60]], np.int32), np.random.default_rng(1)
    targets = random.integers(0, 320, inputs.shape).astype(np.int32)  # halves of characters and special tokens too
    weights = (random.random(inputs.shape) < 0.5).astype(np.float32)
    scores = reader.score(Batch(inputs, targets, weights))
    for row in range(2):
        right = logprobs(whole, inputs[row].tolist())
        where = weights[row] > 0
        assert np.abs(scores.logprob[row] - right[np.arange(30), targets[row]])[where].max() < 1e-5
        assert (scores.greedy[row] == right.argmax(axis=1))[where].all()
        assert not scores.logprob[row][~where].any() and not scores.greedy[row][~where].any()


def test_a_prefix_is_read_before_its_rows(reader: Engine) -> None:
    inputs, targets = np.array([TOKENS[10:14]], np.int32), np.array([TOKENS[11:15]], np.int32)
    prefix, ones = np.array(TOKENS[:10], np.int32), np.ones((1, 4), np.float32)
    parted = reader.score(Batch(inputs, targets, ones, (prefix,), (0,)))
    row, weights = np.array([TOKENS[:14]], np.int32), np.array([[0.0] * 10 + [1.0] * 4], np.float32)
    whole = reader.score(Batch(row, np.array([TOKENS[1:15]], np.int32), weights))
    assert np.abs(parted.logprob[0] - whole.logprob[0, 10:]).max() < 1e-5
    assert (parted.greedy[0] == whole.greedy[0, 10:]).all()


def greedy(whole: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logprobs(whole, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_answers_are_the_greedy_ones_and_end_where_the_file_ends_them(whole: Any, reader: Engine) -> None:
    ends = {2, 4}  # </s>, and <|im_end|> of the template
    prompts = [TOKENS[start : start + 5] for start in range(0, 95, 5)]
    wanted = [greedy(whole, prompt, 8) for prompt in prompts]
    cut = [next((i for i, token in enumerate(answer) if token in ends), len(answer)) for answer in wanted]
    assert min(cut) < 8 and max(cut) == 8  # some end, and others do not
    right = [answer[:at] for answer, at in zip(wanted, cut, strict=True)]
    assert reader.generate(prompts, 8, frozenset()) == right
    assert reader.generate(prompts, 8, ends) == right
    assert reader.generate(prompts[:1], 0, ends) == [[]]


def test_a_stop_token_of_which_the_file_does_not_know_ends_an_answer_too(whole: Any, reader: Engine) -> None:
    prompt = next(
        TOKENS[start : start + 12]
        for start in range(84)
        if not {2, 4} & {*greedy(whole, TOKENS[start : start + 12], 6)}
    )
    wanted = greedy(whole, prompt, 6)
    assert reader.generate([prompt], 6, {wanted[2]}) == [wanted[: wanted.index(wanted[2])]]


def test_the_template_and_the_tokens_are_the_files_own(reader: Engine) -> None:
    prompt = reader.render([{"role": "user", "content": "a fine film"}])
    assert prompt == "<|im_start|>user\na fine film<|im_end|>\n<|im_start|>assistant\n"
    assert reader.tokenise(prompt)[0] == 3 and reader.tokenise("<|im_end|>") == [4]
    text, ended = chat(reader, [{"role": "user", "content": "a fine film"}], 5)
    assert isinstance(text, str) and not ended


def test_it_answers_this_machine_alone_and_only_with_its_key(reader: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connections._is_here(str(reader._address.hostname))
    monkeypatch.setattr(reader, "_key", "another")
    with pytest.raises(EnvironmentProblem, match=r"llama\.cpp: .*[Kk]ey"):
        reader.tokenise("a")


def test_a_prompt_that_is_too_long_is_said(reader: Engine) -> None:
    with pytest.raises(EnvironmentProblem, match=r"llama\.cpp: .*context"):
        reader.generate([[5] * 300], 1, frozenset())


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "no file", "unknown cuts"])
def test_a_file_that_cannot_be_loaded_is_named(
    damage: str, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken, whole = tmp_path / "broken.gguf", file.read_bytes()
    parts = {"cut": whole[: len(whole) // 2], "text": b"no model at all", "empty": b""}
    if damage == "unknown cuts":
        broken.write_bytes(
            whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00gpt-2", b"\x05\x00\x00\x00\x00\x00\x00\x00gpt-9")
        )
    elif damage in parts:
        broken.write_bytes(parts[damage])
    with pytest.raises(EnvironmentProblem, match=r"broken\.gguf: llama\.cpp cannot load it: \w+"):
        engine(broken)
    told = capfd.readouterr()
    assert told.out == "" and (damage != "unknown cuts" or "unknown pre-tokenizer type: 'gpt-9'" in told.err)


def test_nothing_is_printed(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reader = engine(file)
    reader.generate([TOKENS[:5]], 3, frozenset())
    reader.render([{"role": "user", "content": "a"}])
    del reader
    assert capfd.readouterr() == ("", "")


def test_no_more_threads_than_processors_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert launch.processors() == 1
    monkeypatch.delattr(launch.os, "sched_getaffinity")
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 6)
    assert launch.processors() == 6


def test_a_missing_package_is_said_with_the_way_to_install_it() -> None:
    with pytest.raises(
        EnvironmentProblem, match=r'needs the package gguf_of_nobody .*pip install "recipe-finetune\[gguf\]"'
    ):
        packages.optional("gguf_of_nobody")

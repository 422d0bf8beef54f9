"""One run reads each source once, tokenises each row once, and reads and checks its model's folder once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from backends import model_folder, untrusted
from backends.model_folder import ModelFolder
from finetune.commands.train import run as train
from finetune.data import tokenizer
from finetune.data.read import read
from finetune.data.tokenizer import encode
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from tests.end_to_end.command import ROOT, Work, reviews

FILES = {"train.jsonl": reviews(0, 26), "valid.jsonl": reviews(50, 9), "test.jsonl": reviews(100, 9)}
RECIPE = """\
data: {train: train.jsonl, valid: valid.jsonl, test: test.jsonl}
train: {steps: 4, batch_size: 8, learning_rate: 1e-2}
backend: reference
"""
OURS = (str(ROOT / "backends"), str(ROOT / "finetune"))
_counting: list[Counts] = []


class Counts:
    """What happened since it was made."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()  # by name; files that our own code opens
        self.tokenised: Counter[str] = Counter()  # by text
        self.validated: Counter[str] = Counter()  # by name
        self.configs: Counter[str] = Counter()  # by name

    def check(self) -> None:
        """Everything once, and nothing left out."""
        assert {name: self.opened[name] for name in FILES} == dict.fromkeys(FILES, 1)
        texts = [text_of(row) for rows in FILES.values() for row in rows]
        # The tokens of both labels are read off after the first row's prompt, so it is written once more.
        assert {text: self.tokenised[text] for text in texts} == dict.fromkeys(texts, 1) | {texts[0]: 2}
        assert self.validated == {"model.safetensors": 1}
        assert self.configs["config.json"] == self.opened["config.json"] == 1


def text_of(row: dict[str, str]) -> str:
    return f"{row['text']}\nLabel: {row['label']}"


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counting and isinstance(arguments[0], (str, Path)) and _is_ours(sys._getframe(1)):
        _counting[0].opened[Path(arguments[0]).name] += 1


def _is_ours(frame: FrameType | None) -> bool:
    """Whether our code opens a file, and not a library that it calls."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS) or "site-packages" in file:
            return file.startswith(OURS)
        frame = frame.f_back
    return False


sys.addaudithook(_hook)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    counts = Counts()

    def count(module: Any, name: str, counter: Counter[str], what: Any) -> None:
        real = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            counter.update(what(*arguments))
            return real(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(tokenizer, "_call", counts.tokenised, lambda tokenizer, texts: texts)
    count(untrusted, "validate", counts.validated, lambda file: [file.name])
    count(model_folder, "read_object", counts.configs, lambda file: [file.name])
    _counting.append(counts)
    yield counts
    _counting.clear()


@pytest.fixture
def recipe(work: Work, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    for name, rows in FILES.items():
        work.lines(name, rows)
    monkeypatch.chdir(work.folder)
    return load_recipe(work.folder / work.recipe(RECIPE))


def test_one_run_does_everything_once(recipe: Recipe, counts: Counts) -> None:
    train(recipe, "once")
    counts.check()


def tokenise_again(recipe: Recipe) -> None:
    texts = [text_of(FILES["train.jsonl"][1])]
    list(encode(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())), texts))


AGAIN: dict[str, Callable[[Recipe], object]] = {
    "a source": lambda recipe: read(recipe.data.train, Path.cwd()),
    "a row": tokenise_again,
    "the model's folder": lambda recipe: ModelFolder.open(Path(recipe.model.path)),
}


@pytest.mark.parametrize("what", AGAIN)
def test_what_is_done_twice_is_counted(recipe: Recipe, counts: Counts, what: str) -> None:
    train(recipe, "once")
    AGAIN[what](recipe)
    with pytest.raises(AssertionError):
        counts.check()

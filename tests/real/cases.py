"""The cases of real_data.py: how each data set's files are made ready, and what its recipe says."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILT_IN = "builtin:reviews-base"
STORIES = "stories260K"
SMOLLM2, GEMMA3 = "smollm2", "gemma3"  # real models, see real_data.py
BANKING_TEST_ROWS = 77  # of 3,080, one an intent: every measurement runs each row once for each of the 77 labels
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One data set: its files made ready, and what its recipe says beyond them."""

    files: Callable[[Path, Path], Mapping[str, Path]]  # (data folder, folder for converted files) -> split: file
    settings: Settings
    model: str = BUILT_IN
    quantize: tuple[str, ...] = ("none",)
    note: str = ""


def as_they_are(**names: str) -> Callable[[Path, Path], Mapping[str, Path]]:
    return lambda data, out: {split: data / name for split, name in names.items()}


def sst2(data: Path, out: Path) -> Mapping[str, Path]:
    """`0 text` lines -> JSONL of text and label."""
    files = {}
    for split, part in (("train", "train"), ("valid", "dev"), ("test", "test")):
        lines = lines_of(data / "sst2" / f"stsa.binary.{part}")
        files[split] = write_labelled(out / f"sst2-{split}.jsonl", [(line[2:].strip(), int(line[0])) for line in lines])
    return files


def part_of_sst2(data: Path, out: Path) -> Mapping[str, Path]:
    """All rows to train on, 49 to validate on and 203 for the figures: the files are sorted by label."""
    files = dict(sst2(data, out))
    for split, every in (("valid", 18), ("test", 9)):
        part = out / f"sst2-part-{split}.jsonl"
        part.write_text("\n".join(lines_of(files[split])[::every]) + "\n", encoding="utf-8")
        files[split] = part
    return files


def imdb(data: Path, out: Path) -> Mapping[str, Path]:
    """The same rows with the labels' names for 0 and 1."""
    files = {}
    for split, part in (("train", "train"), ("valid", "test")):
        rows = [(row["text"], row["label"]) for row in map(json.loads, lines_of(data / "imdb" / f"{part}_1000.jsonl"))]
        files[split] = write_labelled(out / f"imdb-{split}.jsonl", rows)
    return files


def lines_of(path: Path) -> list[str]:
    """By line feeds alone: the reviews hold other characters at which `str.splitlines` would part them."""
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def write_labelled(path: Path, rows: list[tuple[str, int]]) -> Path:
    lines = (json.dumps({"text": text, "label": ("negative", "positive")[label]}) for text, label in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def banking77(data: Path, out: Path) -> Mapping[str, Path]:
    """The whole training file; a part of the test file, spread over it, since it is sorted by intent."""
    with (data / "banking77" / "test.csv").open(encoding="utf-8", newline="") as source:
        head, *rows = list(csv.reader(source))
    part = out / "banking77-test.csv"
    with part.open("w", encoding="utf-8", newline="") as target:
        csv.writer(target).writerows([head, *rows[:: len(rows) // BANKING_TEST_ROWS]])
    return {"train": data / "banking77" / "train.csv", "valid": part, "test": part}


LABELS = {"prompt": {"template": "{text} Overall this is a", "completion": " {label}"}}
SHORT = {"steps": 60, "batch_size": 8, "learning_rate": 2e-3, "max_length": 512, "checkpoint_every": 30}
OFTEN = {"every": 30}
REVIEW: Settings = {
    "prompt": {"template": "Review: {text}\nSentiment:", "completion": " {label}"},
    "lora": {"rank": 16, "alpha": 32.0},
    "train": {"steps": 60, "batch_size": 16, "learning_rate": 5e-4, "max_length": 128},
}
CASES: dict[str, Case] = {
    "sst2": Case(
        sst2,
        {
            **LABELS,
            "lora": {"rank": 16, "alpha": 32.0},
            "train": {"epochs": 3, "learning_rate": 1e-3, "max_length": 256},
        },
        quantize=("none", "4bit"),
    ),
    "imdb": Case(
        imdb,
        {
            **LABELS,
            "lora": {"rank": 4, "alpha": 32.0, "dropout": 0.01},
            "train": {"epochs": 10, "batch_size": 4, "learning_rate": 1e-3, "max_length": 1024},
        },
        note="validated on the rows of the final figures, as in the tutorial",
    ),
    "wikisql": Case(
        as_they_are(train="wikisql/train.jsonl", valid="wikisql/valid.jsonl", test="wikisql/test.jsonl"),
        {"train": SHORT, "evaluate": OFTEN},
        model=STORIES,
    ),
    "instruct": Case(
        as_they_are(train="instruct/instruction-data.json"),
        {"prompt": {"template": "alpaca"}, "train": SHORT, "evaluate": OFTEN | {"max_tokens": 16}},
    ),
    "banking77": Case(
        banking77,
        {"data": {"columns": {"label": "category"}}, "train": SHORT, "evaluate": OFTEN},
        note=f"{BANKING_TEST_ROWS} of 3,080 test rows, one an intent; they validate too",
    ),
    "shawgpt": Case(
        as_they_are(**{s: f"shawgpt/qlora-mlx_data_{s}.jsonl" for s in ("train", "valid", "test")}),
        {"train": SHORT | {"batch_size": 5}, "evaluate": OFTEN},
        model=STORIES,
    ),
    "shawgpt-chat": Case(
        as_they_are(
            train="shawgpt/ai-assistant-openai_data_training-data.jsonl",
            valid="shawgpt/ai-assistant-openai_data_validation-data.jsonl",
        ),
        {"train": SHORT | {"batch_size": 5}, "evaluate": OFTEN | {"max_tokens": 16}},
    ),
    "chat": Case(
        as_they_are(train="chat/toy_chat_fine_tuning.jsonl", valid="chat/weather_chat_fine_tuning.jsonl"),
        {
            "data": {"on_error": "skip"},
            "train": SHORT | {"batch_size": 5, "max_length": 1024},
            "evaluate": OFTEN | {"max_tokens": 16},
        },
        note="rows without a user's turn are left out; validated on conversations with tool calls",
    ),
    "sst2-smollm2": Case(part_of_sst2, REVIEW, SMOLLM2, note="203 of 1,821 test rows"),
    "sst2-gemma3": Case(part_of_sst2, REVIEW, GEMMA3, note="203 of 1,821 test rows"),
    "shawgpt-smollm2": Case(
        as_they_are(
            train="shawgpt/ai-assistant-openai_data_training-data.jsonl",
            valid="shawgpt/ai-assistant-openai_data_validation-data.jsonl",
        ),
        {
            "lora": {"rank": 8, "alpha": 16.0},
            "train": {"steps": 15, "batch_size": 4, "learning_rate": 5e-4, "max_length": 512},
            "evaluate": {"max_tokens": 48},
        },
        SMOLLM2,
    ),
}

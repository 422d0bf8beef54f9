"""Small recipes and data files, and what `finetune check` says of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

from backends.model_folder import ModelFolder
from finetune.check.show import show
from finetune.check.survey import Findings, survey
from finetune.console import Console
from finetune.data.prepare import prepare
from finetune.recipe.locate import builtin
from finetune.recipe.schema import Recipe
from tests.unit.toy_run import result_of

MODEL = ModelFolder.open(builtin("builtin:reviews-base"))
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


def surveyed(tokenizer, settings: Recipe) -> Findings:
    prepared = result_of(prepare(settings, tokenizer, Path.cwd()))
    return result_of(survey(settings, prepared, MODEL, tokenizer))


def page(found, tokenizer) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, found, tokenizer)
    return console.export_text()

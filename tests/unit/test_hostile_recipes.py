"""YAML that means harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe
from tests.unit.hostile import refused

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
LEAST = "model: {path: m}\ndata: {train: t.jsonl}\n"
RECIPES = {
    "tag": LEAST + "seed: !!python/object/apply:os.system ['touch canary']\n",
    "tagged section": LEAST + "lora: !x {rank: 8}\n",
    "aliases": BOMB, "itself": "model: &a [*a]\n", "merges": "x: &x {a: 1}\nmodel: {<<: [" + "*x," * 999 + "]}\n",
    "deep": LEAST + "lora: " + "[" * 50_000, "wide": LEAST + "lora: [" + "1," * 50_000 + "]\n",
    "long": LEAST + "\n" * 10**6,
    "number": LEAST + "seed: " + "9" * 9999 + "\n", "bits": LEAST + "seed: 0b" + "1" * 99_999 + "\n",
    "nul": LEAST + "seed: \0\n",
    "infinite": LEAST + "seed: 1e9999999\n",
    "binary": LEAST + "output: !!binary aGVsbG8=\n", "merge": LEAST + "lora: {<<: 3}\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_hostile_recipes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPES[kind])
    assert "recipe.yaml" in (refused(load_recipe, tmp_path / "recipe.yaml") or "")


NUMBERS = [
    (section, key, value)
    for section, key, values in (
        ("train", "batch_size", ("1" + "0" * 400, "10000000000")),
        ("train", "micro_tokens", ("1" + "0" * 30,)),
        ("train", "steps", ("1" + "0" * 400,)),
        ("train", "epochs", ("1" + "0" * 18,)),
        ("train", "learning_rate", ("1e308", "1e39", "-1e-4", ".inf")),
        ("train", "weight_decay", ("1e308", "1e39", "11.0")),
        ("train", "clip_norm", ("1e308", "0.0")),
        ("train", "max_length", ("1" + "0" * 400,)),
        ("train", "checkpoint_minutes", ("1e308",)),
        ("train", "checkpoint_every", ("1" + "0" * 30,)),
        ("train", "early_stopping", ("1" + "0" * 30,)),
        ("evaluate", "max_tokens", ("1" + "0" * 400,)),
        ("evaluate", "every", ("1" + "0" * 30,)),
        ("lora", "rank", ("10000000", "1" + "0" * 400)),
        ("lora", "alpha", ("1e308", "1e39")),
        ("lora", "layers", ("1" + "0" * 30,)),
    )
    for value in values
]


@pytest.mark.parametrize(("section", "key", "value"), NUMBERS, ids=[f"{one[1]}-{one[2][:8]}" for one in NUMBERS])
def test_numbers_that_no_training_can_use(tmp_path: Path, section: str, key: str, value: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{LEAST}{section}:\n  {key}: {value}\n")
    message = refused(load_recipe, tmp_path / "recipe.yaml") or ""
    assert "recipe.yaml:4" in message
    assert f"{section}.{key}" in message


def test_large_numbers_that_make_sense_are_taken(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"{LEAST}train: {{batch_size: 100000, steps: 1000000, learning_rate: 1.0, clip_norm: 1e9}}\n"
        "lora: {rank: 4096, alpha: 8192}\nevaluate: {max_tokens: 100000}\n"
    )
    assert load_recipe(tmp_path / "recipe.yaml").lora.rank == 4096


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_recipe_is_an_ordinary_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "recipe.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    assert "recipe.yaml: not an ordinary file" in (refused(load_recipe, file) or "")

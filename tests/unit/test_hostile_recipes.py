"""YAML that means harm."""

from __future__ import annotations

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

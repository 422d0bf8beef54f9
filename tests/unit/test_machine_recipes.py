"""The recipes for well-known machines: each fits its machine with room to spare, by the forecast of memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from backends import registry
from backends.predictions import Architecture, Machine
from finetune.data.rows import Example
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible
from finetune.events import Work
from finetune.recipe.load import load_recipe
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec
from finetune.training import memory_settings
from finetune.training.budget import LEAST, Workload
from finetune.training.forecast import forecast_on
from finetune.training.job import Job
from finetune.training.largest import architecture_of
from finetune.training.memory_settings import settle_memory
from tests.unit.test_memory_plan import HALF

ROOT = Path(__file__).parents[2]
SHAPES: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/assets/shapes.json").read_text())  # of the models named
GIB = 2**30
MEMORY = {  # what a process can use: a desktop takes some of a card, and Metal gives two thirds to three quarters
    "nvidia-6gb": 5.6, "nvidia-8gb": 7.6, "nvidia-12gb": 11.5, "nvidia-16gb": 15.4, "nvidia-24gb": 23.5,
    "macbook-8gb": 5.33, "macbook-16gb": 10.67, "macbook-32gb": 21.33,
}  # fmt: skip
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*gb.yaml"))


def architecture(model: str) -> Architecture:
    shape = SHAPES[model]
    hidden, inner, blocks = (shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    queries, keys = (shape[f"num_{key}_heads"] * shape["head_dim"] for key in ("attention", "key_value"))
    sizes = (blocks, hidden, inner, queries, keys, shape["vocab_size"], shape["tie_word_embeddings"])
    gemma = "gemma" in model
    return replace(architecture_of(*sizes), head_norms="Qwen3" in model or gemma, norms_after=gemma)


def workload(recipe: Recipe, length: int) -> Workload:
    """Rows of this length, all of it learned: more than any real data asks for."""
    shape = architecture(recipe.model.path)
    rows = [Example(np.zeros(length, np.int32), np.ones(length, np.float32), "row")] * 64
    model = HALF if recipe.quantize == "none" else type(HALF)(HALF.path, "4bit", "bfloat16")
    unsettled = recipe.train.gradient_checkpointing == "auto"
    plan = make_plan(recipe, len(rows))
    epochs = plan.steps / plan.steps_per_epoch
    return Workload(shape, model, lora_spec(recipe), shape.modules, rows, recipe.train.batch_size, epochs, 0, unsettled)


def settled(monkeypatch: pytest.MonkeyPatch, asked: object, free: int | None, earlier: bool | None) -> tuple[Any, Any]:
    recipe = load_recipe(ROOT / "configs/nvidia-8gb.yaml")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": asked})})
    work = workload(recipe, 512)
    monkeypatch.setattr(memory_settings, "workload", lambda *_: work)
    monkeypatch.setattr(registry, "describe", lambda *_: {"device": "cuda: some card", "half": "bfloat16"})
    monkeypatch.setattr(registry, "free_bytes", lambda *_: free)
    folder: Any = SimpleNamespace(weights={"file": ()})
    prepared: Any = SimpleNamespace(train=SimpleNamespace(examples=work.examples))
    choice = Work(settle_memory(Job(recipe, folder, cast(Any, None), "torch", prepared), earlier))
    notes = [note.text for note in choice]
    return choice.result.recipe.train.gradient_checkpointing, notes


def test_a_run_settles_recomputation_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(monkeypatch, "auto", 80 * GIB, None) == (False, [])
    assert settled(monkeypatch, "auto", None, None) == (False, [])
    again, notes = settled(monkeypatch, "auto", 5 * GIB, None)
    assert again is True and "computed again" in notes[0] and "5.4 GB free" in notes[0]
    for earlier in (True, False):  # a resumed run: whatever is free now
        for free in (5 * GIB, 80 * GIB):
            assert settled(monkeypatch, "auto", free, earlier) == (earlier, [])
    for asked in (True, False):
        assert settled(monkeypatch, asked, 5 * GIB, None) == (asked, [])


def test_a_run_records_what_it_settled(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.recomputed() is None
    for value in (True, False):
        folder.write_json("environment.json", {"python": "3", "recomputed": value})
        assert folder.recomputed() is value
    folder.write_json("environment.json", {"python": "3"})  # of an earlier version, or not settled
    assert folder.recomputed() is None
    folder.write_json("environment.json", {"recomputed": "perhaps"})
    with pytest.raises(Incompatible, match=r"environment\.json"):
        folder.recomputed()


def test_every_machine_has_a_recipe() -> None:
    assert MEMORY.keys() == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_machine_with_room(name: str) -> None:
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    machine = Machine(name, MEMORY[name] * GIB, 1e13, "")
    for length in (256, recipe.train.max_length):
        found = forecast_on(machine, workload(recipe, length), recipe.backend, None)
        assert found.needed.peak <= 0.95 * MEMORY[name] * GIB, (found.needed.peak / GIB, found.tokens)
        assert found.tokens >= 16 * LEAST, found.tokens


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_to_the_forecast_what_it_knows_better(name: str) -> None:
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    assert (recipe.train.micro_tokens, recipe.train.gradient_checkpointing, recipe.lora.dropout) == ("auto", "auto", 0)
    assert f"finetune plan configs/{name}.yaml" in (ROOT / "configs" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_machine_of_a_third_of_the_memory_is_told_to_be_too_small(name: str) -> None:
    """The forecast of these shapes can say no."""
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    machine = Machine(name, MEMORY[name] * GIB / 3, 1e13, "")
    assert not forecast_on(machine, workload(recipe, recipe.train.max_length), recipe.backend, None).fits


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_recomputation_is_settled_by_memory(backend: str) -> None:
    recipe = load_recipe(ROOT / "configs/nvidia-8gb.yaml")
    work, costs = workload(recipe, 512), registry.costs(backend, "gpu")
    small, large = (work.settled(costs, size * GIB, None) for size in (5, 80))
    assert small.model.checkpointing and not large.model.checkpointing
    assert not work.settled(costs, None, None).model.checkpointing
    assert work.settled(costs, 5 * GIB, 64).model.checkpointing == (work.memory(512, costs).training > 4.5 * GIB)
    assert large.settled(costs, 1.0, None) is large  # settled once
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": False})})
    assert not workload(asked, 512).settled(costs, 1.0, None).model.checkpointing

"""The same recipe on both real backends, on the embedded base: the same batches, and so the same loss curve."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from backends import registry
from backends.model_folder import ModelFolder
from finetune.data.collate import micro_batches, step_indices
from finetune.data.prepare import prepare
from finetune.data.rows import Prepared
from finetune.data.tokenizer import load_tokenizer
from finetune.recipe.locate import builtin, demo_recipe
from finetune.recipe.schedule import learning_rate, make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec, optim_spec
from tests.unit.toy_run import result_of

REAL = [name for name in registry.NAMES if name != "reference"]
STEPS = [30, pytest.param(100, marks=pytest.mark.slow)]
BOUND = 1e-4  # relative difference of the loss, at every step


@pytest.fixture(scope="module", params=STEPS)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    from finetune.recipe.load import load_recipe

    # At a usual rate: rounding differences grow from step to step, and the faster the higher the rate.
    changes = ["train.epochs=", "train.batch_size=4", "quantize=none", "model.dtype=float32"]
    return load_recipe(demo_recipe(), [*changes, f"train.steps={request.param}", "train.learning_rate=2e-4"])


@pytest.fixture(scope="module")
def prepared(recipe: Recipe) -> Prepared:
    return result_of(prepare(recipe, load_tokenizer(ModelFolder.open(builtin(recipe.model.path))), base=Path.cwd()))


def losses(name: str, recipe: Recipe, prepared: Prepared) -> np.ndarray:
    """The loss of every step, dropout included. [steps]"""
    if reason := registry.probe(name):
        pytest.skip(reason)
    lora = lora_spec(recipe)
    assert lora.dropout > 0
    model = model_spec(recipe, ModelFolder.open(builtin(recipe.model.path)))
    session = registry.open_session(name, model, lora, optim_spec(recipe), recipe.seed)
    plan, examples, found = make_plan(recipe, len(prepared.train.examples)), prepared.train.examples, []
    for step in range(plan.steps):
        rows = step_indices(len(examples), recipe.train.batch_size, recipe.seed, step)
        micro = micro_batches([examples[i] for i in rows], recipe.train.micro_tokens)
        found.append(session.step(micro, learning_rate(recipe, plan, step)).loss)
    return np.array(found)


def test_loss_curves_agree(recipe: Recipe, prepared: Prepared) -> None:
    curves = {name: losses(name, recipe, prepared) for name in REAL}
    for one, other in pairwise(REAL):
        difference = np.abs(curves[one] - curves[other]) / np.abs(curves[other])
        print(f"{one} against {other}: largest relative difference of the loss {difference.max():.1e}")
        assert difference.max() <= BOUND
    assert curves[REAL[0]][-10:].mean() < curves[REAL[0]][:10].mean()  # it really trained

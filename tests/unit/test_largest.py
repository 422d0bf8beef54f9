"""The longest row and the largest model that fit: what is named fits, and the next one does not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import registry
from backends.memory_plan import Micro, footprint
from finetune.training.budget import LEAST
from finetune.training.largest import MODELS, STEP, architecture_of, largest_model, longest_row
from finetune.training.sampled_steps import largest_micro
from tests.unit.test_forecast import work

COSTS = registry.costs("torch", "gpu")
CONFIGS = Path(__file__).parents[2] / "configs"
BILLIONS = dict(zip(MODELS, (0.6, 1.7, 4.0, 8.4, 13.5), strict=True))


@given(st.floats(0.1e9, 200e9))
def test_what_is_named_fits_and_eight_tokens_more_do_not(memory: float) -> None:
    made = work()
    found = longest_row(made, COSTS, memory, 2**20)

    def needed(tokens: int) -> float:
        micro = Micro(1, tokens, min(tokens, 1))
        return footprint(made.architecture, made.model, made.lora, made.adapted, micro, COSTS).peak

    assert found % STEP == 0
    assert not found or needed(found) <= memory
    assert found == 2**20 or needed(found + STEP) > memory


def test_no_row_is_longer_than_the_model_takes() -> None:
    assert longest_row(work(), COSTS, 1e15, 2048) == 2048
    assert longest_row(work(), COSTS, 1.0, 2048) == 0


def test_more_memory_names_no_smaller_model() -> None:
    names = [largest_model(work(), COSTS, memory) for memory in (1.0, 3e9, 8e9, 12e9, 24e9, 80e9, 1e12)]
    order = [None, *MODELS]
    places = [order.index(name) for name in names]
    assert places == sorted(places) and names[0] is None and names[-1] == list(MODELS)[-1]
    assert len(set(names)) >= 4


def test_four_bits_let_a_larger_model_fit() -> None:
    order, half = list(MODELS), work()
    packed = replace(half, model=replace(half.model, quantize="4bit"))
    assert order.index(largest_model(packed, COSTS, 24e9) or "") > order.index(largest_model(half, COSTS, 24e9) or "")


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_are_those_of_the_names(name: str) -> None:
    shape = architecture_of(*MODELS[name])
    assert (shape.linear + shape.other) / 1e9 == pytest.approx(BILLIONS[name], rel=0.06)
    assert largest_micro(work().examples, 8, 0, LEAST).tokens > 0


def test_every_model_that_a_config_names_is_known() -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in CONFIGS.glob("*.yaml"))
    named = {name.removesuffix("-Base") for name in re.findall(r"\b[A-Za-z]+/[\w.-]*\d+B\b[\w.-]*", text)}
    assert named and named <= set(MODELS)

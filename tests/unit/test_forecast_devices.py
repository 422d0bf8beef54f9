"""What `plan --devices` predicts: memory of each process, and time by the largest share of a step."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from backends import process_group, registry, table
from backends.model_folder import ModelFolder
from finetune.commands.doctor import run as doctor
from finetune.commands.plan import answer
from finetune.console import Console
from finetune.recipe.load import check_recipe
from finetune.training.budget import imbalance
from finetune.training.forecast import forecast_here
from tests.unit.test_forecast import rows, work
from tests.unit.test_memory_plan import model_folder

FREE = 2**40


def test_the_largest_share_is_waited_for() -> None:
    assert imbalance(work([100] * 16), 1) == imbalance(work([100] * 16), 4) == 1.0
    assert imbalance(work([100] * 8), 3) == pytest.approx(3 / (8 / 3))  # of 8 rows one process has 3
    assert imbalance(work([300, 100, 100, 100]), 2) == pytest.approx(1.0)
    assert imbalance(work([400, 100]), 2) == pytest.approx(400 / 250)
    assert imbalance(work([100]), 2) == pytest.approx(2.0)  # the other one has nothing to do


@pytest.mark.parametrize(("device", "faster", "share"), [("cuda: some card", 2.0, 1), ("cpu", 1.0, 2)])
def test_cards_add_up_and_processors_are_shared(
    monkeypatch: pytest.MonkeyPatch, device: str, faster: float, share: int
) -> None:
    monkeypatch.setattr(registry, "describe", lambda name, wanted: {"device": device, "half": "bfloat16"})
    monkeypatch.setattr(registry, "measured_rate", lambda name, number_type, wanted: 1e13)
    monkeypatch.setattr(registry, "free_bytes", lambda name, wanted: FREE)
    name = next(name for name, row in table.BACKENDS.items() if row.launcher)
    one, two = (forecast_here(work([100] * 16), name, 4096, count) for count in (1, 2))
    assert one.seconds / two.seconds == pytest.approx(faster)
    assert two.needed == one.needed and two.memory == FREE / share


def test_the_plan_says_that_it_is_for_each_process(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "backend": "reference", "train": {"steps": 4}}
    console = Console(width=120, record=True, file=io.StringIO())
    folder = ModelFolder.open(model_folder(tmp_path))
    for part in answer(check_recipe(values), folder, rows(20), "reference", count=3):
        console.print(part)
    assert "in each of 3 processes of " in console.export_text().splitlines()[0]


def test_doctor_names_the_engines_that_join_processes(capsys: pytest.CaptureFixture[str]) -> None:
    doctor()
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, row in table.BACKENDS.items():
        if row.launcher and registry.probe(name) is None:
            assert process_group.engines(name)
            assert f"(--devices, {process_group.launcher(name).NAME}): {process_group.engines(name)[0]}" in told

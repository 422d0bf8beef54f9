"""The recipes in configs/ that run as they stand, on what comes with the program: from a copy of the folder alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import finetune

CONFIGS = Path(__file__).parents[2] / "configs"
PLANNED = {
    "full": r"trainable parameters +4,737,792\nnumbers in the base's tensors +4,737,792",
    "head": r"\nhead +700 rows",
    "preferences": r"\nreferences +26 rows",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A new folder that has nothing but configs/."""
    pytest.importorskip("torch")
    work = Work(tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("none"))
    shutil.copytree(CONFIGS, work.folder / "configs")
    return work


@pytest.mark.parametrize("name", PLANNED)
def test_a_starter_for_another_way_to_train_is_planned_as_it_stands(copied: Work, name: str) -> None:
    said = finetune(copied, "plan", f"configs/{name}.yaml").good().out
    assert re.match(r"\s*fits here", said), said[:500]
    assert re.search(PLANNED[name], said)

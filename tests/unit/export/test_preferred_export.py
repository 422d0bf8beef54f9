"""A run that learned from pairs of answers, for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends import registry
from finetune.disk.run_folder import open_existing
from tests.end_to_end.command import Work
from tests.unit.export.exported_run import made
from tests.unit.test_wrong_resume import finetune


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_run_of_pairs_is_exported_and_asked(exportable_model: Path, loss: str, tmp_path: Path) -> None:
    if reason := registry.probe("torch"):
        pytest.skip(reason)
    work = Work(tmp_path / "work", exportable_model)
    rows = [
        {"prompt": f"what is {i}?", "chosen": f"a fine film {i}", "rejected": "a dull cold film"} for i in range(24)
    ]
    work.lines("rows.jsonl", rows)
    work.recipe(
        f"data: {{train: rows.jsonl, valid_fraction: 0.3}}\npreferences: {{loss: {loss}}}\nbackend: torch\n"
        "lora: {rank: 4}\ntrain: {steps: 12, batch_size: 4, learning_rate: 0.01}\ndevice: cpu\n"
        "evaluate: {forgetting: false, max_tokens: 12}\n"
    )
    finetune(work, "train", "recipe.yaml", "model.dtype=float32").good()
    run = open_existing(work.runs()[0])[0]
    for to, kind in (("merged", None), ("gguf", "f32")):
        path = made(run, to, kind)
        told = json.loads((path / "export.json").read_text())
        assert told["holds"], told
        assert str(path) in (run.path / "report.html").read_text()
    answers = [
        finetune(work, "generate", str(run.path), "what is 5?", "--max-tokens", "6", "--temperature", "0", *more).good()
        for more in ((), ("--base",))
    ]
    assert answers[0].out.strip() and answers[0].out != answers[1].out
    (talked,) = work.several(["chat", str(run.path), "--max-tokens", "6"], typed="what is 5?\n\n")
    assert talked.good().out.strip()

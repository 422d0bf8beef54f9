"""A run that was stopped on one backend goes on on the other: with pairs, by either loss, and with a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from finetune.disk.adapter import read_adapter
from finetune.disk.run_folder import RunFolder, create, open_existing
from finetune.events import StepDone
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import load_job, run_to_report

TRAIN = "train: {steps: 8, batch_size: 4, learning_rate: 0.005, checkpoint_every: 100}"
LORA = RECIPE.partition("train: {steps")[0]
PAIRS = [
    {"prompt": f"what is {i}?" + " and then" * (i % 9), "chosen": f"a fine film {i}", "rejected": "a dull cold film"}
    for i in range(12)
]
LABELLED = [{"text": f"{i} {('warm', 'dull')[i % 2]}", "label": ("good", "bad")[i % 2]} for i in range(12)]
KINDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "dpo": ("preferences: {}\n", PAIRS),
    "orpo": ("preferences: {loss: orpo}\n", PAIRS),
    "head": ("head: {first_epochs: 9}\n", LABELLED),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "then"), [("torch", "mlx"), ("mlx", "torch")])
def test_a_stopped_run_goes_on_on_the_other_backend(kind: str, first: str, then: str, tmp_path: Path) -> None:
    """To the losses and the weights of one that was not stopped."""
    if reason := registry.probe(first) or registry.probe(then):
        pytest.skip(reason)
    from tests.tiny_models import model_with_tokenizer

    work = Work(tmp_path / "work", model_with_tokenizer(tmp_path / "model", num_hidden_layers=1))
    section, rows = KINDS[kind]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows[:5])
    lora = LORA.replace("plain", '"{text}"') if kind == "head" else LORA
    work.recipe(f"{lora}{section}{TRAIN}\nbackend: {first}\n")
    settings = ["model.dtype=float32", "device=cpu", "evaluate.forgetting=false"]

    def begun(name: str, steps: int | None) -> RunFolder:
        job = load_job(load_recipe(work.folder / "recipe.yaml", [*settings, f"output={work.folder / 'runs'}"]))
        run = create(job.recipe, name)
        run_to_report(job, run, stop=lambda event: isinstance(event, StepDone) and event.step == steps)
        return run

    whole = begun("whole", None)
    with pytest.raises(Exception, match="stopped"):
        begun("stopped", 3)
    stopped = open_existing(next((work.folder / "runs").glob("*stopped*")))[0]
    finetune(work, "resume", str(stopped.path), "--backend", then).good()
    one, other = (read_adapter(run.adapter).tensors for run in (whole, stopped))
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=1e-4, err_msg=name)
    told = [json.loads(run.report.read_text()) for run in (whole, stopped)]
    losses = [[report[model]["loss"] for model in ("base", "tuned")] for report in told]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert told[0]["tuned"]["loss"] < told[0]["base"]["loss"] and told[1]["backend"] == then

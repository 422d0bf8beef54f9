"""Whole runs in which every weight trains: what they leave, how they go on, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec
from finetune.disk.run_folder import RunFolder, create
from finetune.disk.trained_model import read_trained
from finetune.errors import ExitCode
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.training.rate_rule import starting_rate
from tests.conformance.toy import toy_batch
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune, trained
from tests.unit.toy_run import load_job, run_to_report, run_until_killed

FULL = (
    RECIPE.replace("lora: {rank: 2, alpha: 4}", "method: full")
    .replace("steps: 3", "steps: 6, learning_rate: 0.002")
    .replace("backend: reference", "backend: torch")
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with one finished run, `run`."""
    work = Work.of_one_block(tmp_path_factory)
    rows = [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(12)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows[:8])
    return trained(work, FULL)


def test_the_run_leaves_a_model_folder_that_both_libraries_load(made: Work) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, base = made.folder / "run" / "model", load_file(made.folder / "model" / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {n: v.shape for n, v in base.items()}
    assert all(value.dtype == np.float32 and not np.array_equal(value, base[name]) for name, value in tensors.items())
    assert not (made.folder / "run" / "adapter").exists()
    batch = toy_batch()
    ids = torch.from_numpy(batch.inputs.astype(np.int64))
    logs = torch.log_softmax(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, -1)
    expected = logs.gather(-1, torch.from_numpy(batch.targets.astype(np.int64))[..., None])[..., 0].detach().numpy()
    assert len(AutoTokenizer.from_pretrained(folder)) == 320
    chosen = batch.weights != 0
    for name in registry.automatic():
        if registry.probe(name):
            continue
        live = registry.open_session(name, ModelSpec(folder, dtype="float32"), LoraSpec(1, 1.0), OptimSpec(), 0)
        np.testing.assert_allclose(live.score(batch).logprob[chosen], expected[chosen], atol=1e-5)


def test_base_and_tuned_are_measured_again_as_the_run_measured_them(made: Work) -> None:
    """Though nothing of the base is left in the model that was trained."""
    run = made.folder / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["tuned"]["loss"] < report["base"]["loss"] == report["validations"][0]["loss"]
    finetune(made, "eval", "run").good()
    again = json.loads((run / "eval.json").read_text())
    for which in ("base", "tuned"):
        assert again[which]["loss"] == pytest.approx(report[which]["loss"], abs=1e-5)
    assert re.search(r"^model: runs/\S+/model \(of step 6\)", (run / "report.txt").read_text(), re.MULTILINE)
    asked = [finetune(made, "generate", "run", "film 1", *base).good().out for base in ([], ["--base"])]
    assert asked[0] != asked[1]
    made.lines("new.jsonl", [{"text": "film 40"}])
    finetune(made, "predict", "run", "new.jsonl", "--output", str(made.folder / "labels.jsonl")).good()
    assert json.loads((made.folder / "labels.jsonl").read_text())["predicted"] in ("good", "bad")


@pytest.mark.parametrize("other", ["torch", "mlx"])
def test_a_killed_run_goes_on_to_the_same_bytes(made: Work, tmp_path: Path, other: str) -> None:
    """On the other backend to the same model within 1e-5."""
    recipe = load_recipe(made.folder / "recipe.yaml").model_copy(update={"output": str(tmp_path / "runs")})
    job, folder = load_job(recipe), create(recipe, "killed")
    run_until_killed(job, folder, 4)
    if other == "mlx":
        pytest.importorskip("mlx.core")
    run_to_report(load_job(recipe, other), folder, resume=True)
    names = ["model/model.safetensors", "checkpoints/step-00000006/state.safetensors"]
    expected = RunFolder(made.folder / "run").path
    for name in names:
        if other == "torch":
            assert (folder.path / name).read_bytes() == (expected / name).read_bytes()
        ours, theirs = load_file(folder.path / name), load_file(expected / name)
        assert list(ours) == list(theirs)
        assert max(float(np.abs(ours[one] - theirs[one]).max()) for one in ours) < 1e-4


def test_an_export_is_the_model_itself(made: Work) -> None:
    finetune(made, "export", "run", "--to", "merged", "--rows", "8").good()
    exported = load_file(made.folder / "run" / "exports" / "merged-f32" / "model.safetensors")
    for name, value in load_file(made.folder / "run" / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(exported[name], value)
    said = finetune(made, "export", "run", "--to", "gguf", "--adapter").failed(ExitCode.RECIPE)
    assert "trained the whole model" in said and "without --adapter" in said


def test_another_base_is_refused(made: Work, tmp_path: Path) -> None:
    """The run's figures of the base would be another model's."""
    work = Work(tmp_path / "work", made.folder / "model")
    shutil.copytree(made.folder / "run", work.folder / "run")
    facts = work.folder / "run" / "model" / "finetune.json"
    values = json.loads(facts.read_text())
    facts.write_text(json.dumps(values | {"base_fingerprint": "full:0"}))
    shutil.copy(made.folder / "valid.jsonl", work.folder), shutil.copy(made.folder / "rows.jsonl", work.folder)
    assert "trained on other base weights" in finetune(work, "eval", "run").failed(ExitCode.INCOMPATIBLE)


REFUSED = {
    "quantize: 4bit": "quantize: weights of 4 bits",
    "head: {}": "head: it learns on the states of a frozen model",
    "lora: {rank: 4}": "lora: with method: full there is no adapter",
    "model: {path: model, dtype: bfloat16}": "model.dtype: method: full trains in float32",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_speaks_of_a_frozen_model_is_refused_with_its_line(made: Work, line: str) -> None:
    text = (made.folder / "recipe.yaml").read_text()
    if line.startswith("model"):
        text = text.replace("model: {path: model}", line)
    else:
        text += f"{line}\n"
    (made.folder / "wrong.yaml").write_text(text)
    said = finetune(made, "train", "wrong.yaml").failed(ExitCode.RECIPE)
    assert "wrong.yaml:" in said and REFUSED[line] in said


def test_a_quantised_base_is_refused_before_it_is_loaded(made: Work, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(made.folder / "model", packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}}))
    said = finetune(made, "plan", "recipe.yaml", f"model.path={packed}")
    assert said.code == ExitCode.BACKEND and "give the unquantised model" in said.err


def test_the_rate_to_begin_with_is_a_tenth_of_an_adapters(made: Work) -> None:
    full = load_recipe(made.folder / "recipe.yaml")
    job = load_job(full)
    lora: Recipe = full.model_copy(update={"method": "lora"})
    rates = [starting_rate(recipe, job.folder, 64).rate for recipe in (full, lora)]
    assert rates[0] == pytest.approx(rates[1] / 10, rel=0.01)
    numbers = sum(value.size for value in load_file(made.folder / "model" / "model.safetensors").values())
    assert starting_rate(full, job.folder, 64).trainable == numbers


@pytest.mark.parametrize("loss", ["dpo", pytest.param("orpo", marks=pytest.mark.slow)])
def test_pairs_train_a_whole_model_too(made: Work, tmp_path: Path, loss: str) -> None:
    """The references are those of the base as its files have it."""
    pairs: list[dict[str, Any]] = [
        {"prompt": f"what is {i}?", "chosen": f"a fine film {i}", "rejected": "a dull cold film"} for i in range(12)
    ]
    made.lines("pairs.jsonl", pairs)
    made.lines("pairs-valid.jsonl", pairs[:6])
    text = (made.folder / "recipe.yaml").read_text() + f"preferences: {{loss: {loss}}}\n"
    (made.folder / "pairs.yaml").write_text(
        text.replace("rows.jsonl", "pairs.jsonl").replace("valid.jsonl", "pairs-valid.jsonl")
    )
    recipe = load_recipe(made.folder / "pairs.yaml").model_copy(update={"output": str(tmp_path / "runs")})
    folder = create(recipe, "pairs")
    report = run_to_report(load_job(recipe), folder)
    assert report.base is not None and report.tuned.loss < report.base.loss
    assert loss == "orpo" or report.base.loss == pytest.approx(np.log(2), abs=1e-6)
    assert read_trained(folder).whole

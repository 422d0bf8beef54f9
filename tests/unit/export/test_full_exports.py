"""A run that trained every weight: its model folder, and its exports, do what its session does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from backends.interface import FloatArray
from finetune.data.collate import evaluation_batches
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import read_trained
from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe
from tests.unit.export.exported_run import Runs, made
from tests.unit.toy_run import load_job

slow = pytest.mark.slow
FORMS: list[Any] = [
    ("merged", None, None),
    ("gguf", "f16", None),
    *(pytest.param("merged", kind, None, marks=slow) for kind in ("f16", "bf16")),
    *(pytest.param("mlx", None, bits, marks=slow) for bits in (None, 4, 6, 8)),
    *(pytest.param("gguf", kind, None, marks=slow) for kind in ("f32", "q8_0", "q4_k_m")),
    pytest.param("ollama", None, None, marks=slow),
]


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=slow)])
@pytest.mark.parametrize(("to", "kind", "bits"), FORMS)
def test_a_whole_model_is_exported(runs: Runs, to: str, kind: str | None, bits: int | None, backend: str) -> None:
    pytest.importorskip({"merged": "numpy", "mlx": "mlx_lm"}.get(to, "xllamacpp"))
    run = runs(backend, method="full")
    path = made(run, to, kind, bits)
    told = json.loads((path / "export.json").read_text())
    checks = {check["name"]: check for check in told["checks"]}
    assert told["holds"] and float(checks["tuning that is kept"]["result"].partition("%")[0]) > 90
    assert ("change of the weights" in checks) == (bits is not None)
    if path.name == "merged-f32":
        exported = load_file(path / "model.safetensors")
        for name, value in load_file(run.model / "model.safetensors").items():
            np.testing.assert_array_equal(exported[name], value)
    assert "--enable-lora" not in (run.path / "exports.txt").read_text()


@pytest.mark.parametrize("kind", [None, "f32"])
def test_it_has_no_adapter_to_export(runs: Runs, kind: str | None) -> None:
    with pytest.raises(RecipeError, match="trained the whole model, and has no adapter; use --to gguf without"):
        made(runs("torch", method="full"), "gguf", kind, None, True)


def session_scores(run: RunFolder) -> tuple[list[Any], list[FloatArray]]:
    """The held-out rows as batches, and the log-probabilities of what is supervised in each."""
    job = load_job(load_recipe(run.recipe))
    session = job.open(read_trained(run))
    batches = [batch for _, batch in evaluation_batches(job.prepared.held_out.examples, 4096, False)]
    return batches, [session.score(batch).logprob[batch.weights > 0] for batch in batches]


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=slow)])
def test_transformers_loads_the_model_folder(runs: Runs, backend: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    run = runs(backend, method="full")
    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    for batch, wanted in zip(*session_scores(run), strict=True):
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=torch.from_numpy(batch.inputs.astype(np.int64))).logits, -1)
        told = np.take_along_axis(logs.numpy(), batch.targets[..., None].astype(np.int64), -1)[..., 0]
        assert np.abs(told[batch.weights > 0] - wanted).max() < 1e-5


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=slow)])
def test_mlx_lm_loads_the_model_folder(runs: Runs, backend: str) -> None:
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    run = runs(backend, method="full")
    model, tokenizer = mlx_lm.load(str(run.model))
    assert tokenizer.vocab_size == 320
    for batch, wanted in zip(*session_scores(run), strict=True):
        logits = model(mx.array(batch.inputs)).astype(mx.float32)
        logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        told = np.take_along_axis(logs, batch.targets[..., None].astype(np.int64), -1)[..., 0]
        assert np.abs(told[batch.weights > 0] - wanted).max() < 1e-5

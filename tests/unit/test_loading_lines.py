"""The Python that a run's adapter folder shows loads what the run measured: the same log-probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import libraries, registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec
from backends.model_folder import ModelFolder
from finetune.disk.adapter_writer import write_adapter
from tests.conformance.toy import random_adapter, toy_batch
from tests.unit.test_adapter_names import chosen

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
pytest.importorskip("peft")

from tests.tiny_families import published  # noqa: E402
from tests.tiny_models import tiny_llama  # noqa: E402

LORA, BATCH = LoraSpec(4, 8.0), toy_batch()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("quantize", ["none", "4bit"])
@pytest.mark.parametrize("name", ["llama", "mistral3", "gemma4_moe"])
def test_the_lines_give_what_was_measured(name: str, quantize: str, backend: str, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base") if name == "llama" else published(name, tmp_path / "base")
    spec, folder = ModelSpec(base, quantize=quantize, dtype="float32"), ModelFolder.open(base)
    session = registry.open_session(backend, spec, LORA, OptimSpec(), 0)
    state = random_adapter(session)
    session.set_state(state)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", state.adapter, LORA, str(base), folder.blocks, {}, folder)
    lines = libraries.loading_lines(backend, spec, str(base), str(tmp_path / "adapter"), session.device, "bfloat16")
    assert lines is not None
    names: dict = {}
    exec(lines, names)
    ours = session.score(BATCH).logprob
    assert np.abs(logprob(names["model"], backend) - ours).max() < 1e-4
    if quantize == "4bit":  # the lines say something: without them the base is another
        plain = registry.open_session(backend, ModelSpec(base, dtype="float32"), LORA, OptimSpec(), 0)
        plain.set_state(state)
        assert np.abs(plain.score(BATCH).logprob - ours).max() > 1e-3


def logprob(model: object, backend: str) -> np.ndarray:
    if backend == "mlx":
        return chosen(np.array(model(mx.array(BATCH.inputs)).astype(mx.float32)))
    with torch.no_grad():
        return chosen(model(input_ids=torch.from_numpy(BATCH.inputs.astype(np.int64))).logits.float().numpy())

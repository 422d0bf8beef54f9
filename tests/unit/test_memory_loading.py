"""The base's weights are never twice in memory while they are read, cast or quantised.

Counted is the memory of the process's own (anonymous pages); pages of a mapped file the system can drop.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from backends.model_folder import ModelFolder
from tests.tiny_models import tiny_llama

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells this")

MARGIN = 1.3  # of what the weights take; a model of 1 / 1.25 of the memory would load, and a second copy is 2.0
CHILD = """
    import sys, threading
    from pathlib import Path
    from backends.interface import ModelSpec

    def own() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(own())

    backend, small, large, quantize, dtype, copies = sys.argv[1:]
    if backend == "torch":
        import torch
        from backends.torch_backend.model import load_frozen
        def load(path): return load_frozen(ModelSpec(Path(path), quantize, dtype), torch.device("cpu"))
    else:
        import mlx.core as mx
        from backends.mlx_backend.model import load as load_mlx
        def load(path):
            with mx.stream(mx.cpu):
                return load_mlx(ModelSpec(Path(path), quantize, dtype), getattr(mx, dtype))
    load(small)  # what is imported on the way does not count
    done, peaks, before = threading.Event(), [], own()
    thread = threading.Thread(target=watch)
    thread.start()
    held = [load(large) for _ in range(int(copies))]
    peaks.append(own())
    done.set()
    thread.join()
    print(max(peaks) - before)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny one, and one of 100 MB in float32 and of 50 MB in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    large = tiny_llama(folder / "float32", vocab_size=512, tie=True, **sizes)
    model = AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16)
    model.save_pretrained(folder / "bfloat16")
    return {"small": tiny_llama(folder / "small"), "float32": large, "bfloat16": folder / "bfloat16"}


def growth(backend: str, models: dict[str, Path], kept: str, quantize: str, dtype: str, copies: int = 1) -> int:
    """Bytes of its own that a process takes to load the model that is kept as `kept`."""
    arguments = [backend, str(models["small"]), str(models[kept]), quantize, dtype, str(copies)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def weights(folder: Path, bits: float) -> float:
    return (
        sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in ModelFolder.open(folder).shapes.values())
        * bits
        / 8
    )


CASES = [
    pytest.param("torch", "bfloat16", "none", "float32", 32.0, marks=pytest.mark.slow),
    pytest.param("torch", "float32", "none", "bfloat16", 16.0, marks=pytest.mark.slow),
    pytest.param("torch", "float32", "none", "float32", 0.0, marks=pytest.mark.slow),  # pages of the file
    pytest.param("mlx", "bfloat16", "none", "float32", 32.0, marks=pytest.mark.slow),
    pytest.param("mlx", "float32", "none", "bfloat16", 16.0, marks=pytest.mark.slow),
    ("mlx", "float32", "4bit", "bfloat16", 4.5),
]
LEAST = 12e6  # bytes: one weight in float32 while it is cast, and what the libraries take beside it


@pytest.mark.parametrize(("backend", "kept", "quantize", "dtype", "bits"), CASES)
def test_weights_are_held_once(
    models: dict[str, Path], backend: str, kept: str, quantize: str, dtype: str, bits: float
) -> None:
    pytest.importorskip(backend)
    expected = weights(models[kept], bits)
    assert growth(backend, models, kept, quantize, dtype) < max(MARGIN * expected, expected + LEAST)


@pytest.mark.slow
def test_quantising_on_torch_does_not_hold_the_float_weights(models: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    found = growth("torch", models, "float32", "4bit", "bfloat16")
    # 4 bits a weight, and the widest (3 MB in float32) as several tensors of 32 bits; all in bfloat16 would be 49 MB
    assert found < weights(models["float32"], 4.5) + 8 * 3e6 + LEAST


def test_a_second_copy_is_seen(models: dict[str, Path]) -> None:
    pytest.importorskip("mlx")
    expected = weights(models["bfloat16"], 32)
    assert growth("mlx", models, "bfloat16", "none", "float32", copies=2) > MARGIN * expected

"""How much memory a streamed model takes: measured in processes of their own, with weights that outweigh all else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from tests.tiny_models import family

ROOT = Path(__file__).parents[2]
SHARE = 0.4  # of the model's weights, in which two of its twelve blocks train
_TRAINS = """
import hashlib, json, resource, sys
from pathlib import Path
import numpy as np
import psutil
from backends import registry
from backends.interface import Batch, LoraSpec, ModelSpec, OptimSpec
from backends.memory import returning_freed
from backends.streaming import read_ahead

backend, tiny, folder, streamed = sys.argv[1], *map(Path, sys.argv[2:4]), sys.argv[4] == "streamed"
rng = np.random.default_rng(0)
inputs = [rng.integers(3, 120, (4, 16)).astype(np.int32) for _ in range(6)]
batches = [Batch(one, np.roll(one, -1, 1), np.ones(one.shape, np.float32)) for one in inputs]

def trained(folder, streamed):
    spec = ModelSpec(folder, dtype="float32", device="cpu", streamed=streamed)
    session = registry.open_session(backend, spec, LoraSpec(4, 8.0, dropout=0.1, layers=2), OptimSpec(), 0)
    list(read_ahead(session, batches))
    found = [session.score(batch).logprob.tobytes() for batch in batches]
    found += [repr(session.step([batch], 1e-2)).encode() for batch in (*batches, *batches)]
    found += [session.score(batch).logprob.tobytes() for batch in batches]
    found += [tensor.tobytes() for tensor in session.get_state().adapter.values()]
    return hashlib.sha256(b"".join(found)).hexdigest()

trained(tiny, streamed)  # what the libraries themselves take
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = psutil.Process().memory_info().rss
digest = trained(folder, streamed)
peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
print(json.dumps([digest, peak * 1024 - before]))
"""


def trained(backend: str, tiny: Path, folder: Path, how: str) -> tuple[str, int]:
    """A digest of all that was computed, and the bytes of memory that it took at most."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _TRAINS, backend, str(tiny), str(folder), how]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    digest, taken = json.loads(done.stdout.splitlines()[-1])
    return digest, taken


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is measured by Linux's own counter")
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_streamed_model_trains_in_a_part_of_its_memory(backend: str, tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    tiny = family("llama", tmp_path / "tiny", num_hidden_layers=12)
    folder = family("llama", tmp_path / "model", num_hidden_layers=12, num_key_value_heads=4, **size)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert weights > 250e6
    whole, streamed = (trained(backend, tiny, folder, how) for how in ("whole", "streamed"))
    assert streamed[0] == whole[0]
    print(f"{backend}: {whole[1] / weights:.2f} and {streamed[1] / weights:.2f} of {weights / 1e6:.0f} MB")
    assert whole[1] > 0.9 * weights and streamed[1] <= SHARE * weights

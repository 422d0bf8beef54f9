"""Table B: one row for each model family, tiny and random: does each backend run it, and how far apart are they?

`python tests/benchmarks/families.py` prints it as Markdown, in about three minutes of one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from backends.interface import BackendError  # noqa: E402
from tests.conformance.toy import Case, random_adapter, toy_batch  # noqa: E402

# as people call them
SPOKEN = {
    "gemma2": "Gemma 2", "gemma3": "Gemma 3, 4B and larger", "gemma3_text": "Gemma 3, text alone", "gemma4": "Gemma 4",
    "gpt_oss": "gpt-oss, unpacked", "gpt_oss_mxfp4": "gpt-oss in MXFP4", "granite": "Granite 3",
    "granite4": "Granite 4", "granite4_h": "Granite 4 hybrid", "granite4_h_moe": "Granite 4 hybrid, experts",
    "lfm2": "LFM2", "llama": "Llama", "ministral3": "Ministral 3", "mistral": "Mistral", "mistral3": "Mistral Small 3",
    "olmo2": "OLMo 2", "olmo3": "OLMo 3", "phi3": "Phi-3", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_5": "Qwen3.5",
    "qwen3_5_text": "Qwen3.5, text alone", "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen3_5_moe_saved": "Qwen3.5-MoE, as transformers saves it",
    "olmo_hybrid": "OLMo hybrid, as transformers saves it", "qwen3_moe": "Qwen3-MoE", "qwen3_vl": "Qwen3-VL",
    "smollm3": "SmolLM3", "gemma4_e2b": "Gemma 4 E2B", "gemma4_moe": "Gemma 4 26B-A4B", "qwen3_next": "Qwen3-Next",
    "nemotron_h": "Nemotron-H", "ernie4_5_moe": "ERNIE 4.5 MoE", "glm4_moe": "GLM-4-MoE",
    "glm4_moe_lite": "GLM-4.7-Flash",
}  # fmt: skip
HEAD = """| family | torch | MLX | log-probabilities differ by | gradient norms differ by |
|---|---|---|---|---|"""


def row(name: str, folder: Path) -> str:
    """The largest difference of log-probabilities (base and with an adapter), and that of one step's gradient norm."""
    batch, cells, scores, norms = toy_batch(), [], [], []
    for backend in ("torch", "mlx"):
        try:
            session = Case(backend, folder).open()
        except BackendError as error:
            reason = str(error).removeprefix(f"{folder}: ").removeprefix("model.safetensors: ").partition(";")[0]
            cells.append(shorten(f"no: {reason}", 100, placeholder=" .."))
            continue
        base, _ = session.score(batch).logprob, session.set_state(random_adapter(session))
        scores.append(np.stack([base, session.score(batch).logprob]))
        norms.append(session.step([batch], 1e-2).grad_norm)
        cells.append(f"yes, {len(session.lora_shapes)} layers adapted")
    apart = [_largest(scores), _largest([np.array(norm / max(norms)) for norm in norms])]
    return f"| {SPOKEN.get(name, name)} | {' | '.join([*cells, *apart])} |"


def _largest(values: list[Any]) -> str:
    return f"{np.abs(values[0] - values[1]).max():.0e}" if len(values) == 2 else ""


def main(names: list[str]) -> None:
    from tests import tiny_families, tiny_models

    makers: dict[str, Any] = dict.fromkeys(tiny_models.FAMILIES, tiny_models.family)
    makers |= dict.fromkeys(tiny_families.MODELS, tiny_families.published)
    print(HEAD)
    for name in names or sorted(makers, key=lambda name: SPOKEN.get(name, name)):
        with tempfile.TemporaryDirectory() as place:
            print(row(name, makers[name](name, Path(place))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

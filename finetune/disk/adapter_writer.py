"""Writes one adapter folder that both PEFT and mlx-lm load as it is.

`adapter_model.safetensors` has PEFT's names and layout, `adapters.safetensors` mlx-lm's (transposed);
the one `adapter_config.json` carries the keys of both, and each library ignores the other's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backends import libraries
from backends.interface import HEAD_WEIGHT, MAGNITUDE, FloatArray, LoraSpec, Modules
from backends.model_folder import ModelFolder
from finetune.disk.atomic import write_pieces
from finetune.disk.safetensors_file import tensor_pieces

PEFT, MLX, CONFIG_FILE = "PEFT", "mlx-lm", "adapter_config.json"
FILES = {PEFT: "adapter_model.safetensors", MLX: "adapters.safetensors"}
_PEFT_PREFIX = "base_model.model."
_SEQUENCES = {"task_type": "SEQ_CLS", "modules_to_save": [HEAD_WEIGHT.partition(".")[0]]}  # of PEFT, with a head
_BLOCK = re.compile(r"^(?P<before>.*?layers)\.(?P<index>\d+)\.(?P<within>.+)$")

Names = Mapping[str, tuple[tuple[str, int, int], ...]]  # as `backends.layer_names.Names`


def write_adapter(
    folder: Path,
    tensors: Mapping[str, FloatArray],
    lora: LoraSpec,
    base: str,
    blocks: int,
    facts: Mapping[str, Any],
    model: ModelFolder | None = None,
) -> None:
    """Both formats, or with a head PEFT's alone, into `folder`, which exists.

    blocks: how many the base has. facts: go into the config. model: the base's folder, for the names that each library
    has for its layers; None: those in `tensors`.
    """
    modules = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    sizes = {m: (len(tensors[f"{m}.lora_B"]), tensors[f"{m}.lora_A"].shape[1]) for m in modules}
    peft, mlx = (_named(library, model, sizes) for library in (PEFT, MLX))
    head = {f"{_PEFT_PREFIX}{HEAD_WEIGHT}": tensors[HEAD_WEIGHT]} if HEAD_WEIGHT in tensors else {}
    named = {_peft_name(n): t for n, t in _cut(tensors, peft)}
    write_pieces(folder / FILES[PEFT], tensor_pieces(named | head))
    if not head:  # mlx-lm has no models with one
        write_pieces(folder / FILES[MLX], tensor_pieces({_mlx_name(n): t.T for n, t in _cut(tensors, mlx)}))
    config = _config(peft, mlx, lora, base, blocks, model) | (_SEQUENCES if head else {}) | {"finetune": dict(facts)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _named(library: str, model: ModelFolder | None, sizes: Modules) -> Names:
    if model is None:
        return {module: ((module, 0, outputs),) for module, (outputs, _) in sizes.items()}
    return libraries.by_name()[library].names(model, sizes)


def _cut(tensors: Mapping[str, FloatArray], names: Names) -> Iterator[tuple[str, FloatArray]]:
    """The tensors by a library's names. Layers that it has in several parts share A; each has its rows of B and m."""
    for module, parts in names.items():
        for name, first, last in parts:
            yield f"{name}.lora_A", tensors[f"{module}.lora_A"]
            yield f"{name}.lora_B", tensors[f"{module}.lora_B"][first:last]
            if f"{module}.{MAGNITUDE}" in tensors:
                yield f"{name}.{MAGNITUDE}", tensors[f"{module}.{MAGNITUDE}"][first:last]


def _config(
    peft: Names, mlx: Names, lora: LoraSpec, base: str, blocks: int, model: ModelFolder | None
) -> dict[str, Any]:
    placed = [match for module in peft if (match := _BLOCK.match(module))]
    indices = sorted({int(match["index"]) for match in placed})
    keys = {match["within"] for parts in mlx.values() for name, *_ in parts if (match := _BLOCK.match(name))}
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha  # some readers take only integers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        **_targets(peft, None if len(indices) == blocks else indices, model),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": lora.by_root,
        "use_dora": lora.dora,
        "modules_to_save": None,
        "inference_mode": True,
        "fine_tune_type": "dora" if lora.dora else "lora",
        "num_layers": blocks - indices[0] if indices else 0,
        "lora_parameters": {
            "rank": lora.rank,
            "alpha": alpha,
            "scale": lora.scale,
            "dropout": lora.dropout,
            "keys": sorted(keys),
        },
    }


def _targets(peft: Names, indices: list[int] | None, model: ModelFolder | None) -> dict[str, Any]:
    """How PEFT is told what to adapt: by the last parts of names where only adapted layers have them, else by names.

    Towers for images, for example, have layers of the same names.
    """
    leaves = {module.rsplit(".", 1)[-1] for module in peft}
    tensors = model.shapes if model and model.weights else {}
    layers = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")} - set(peft)
    others = [m for layer in layers if (m := _BLOCK.match(layer)) and (indices is None or int(m["index"]) in indices)]
    nested = model is not None and model.text_config is not model.config
    if nested or any(match["within"].rsplit(".", 1)[-1] in leaves for match in others):
        names = sorted(part[0] for parts in peft.values() for part in parts)
        return {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
    pattern = None if indices is None else "layers"
    return {"target_modules": sorted(leaves), "layers_to_transform": indices, "layers_pattern": pattern}


def _peft_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    return f"{_PEFT_PREFIX}{module}.lora_magnitude_vector" if part == MAGNITUDE else f"{_PEFT_PREFIX}{name}.weight"


def _mlx_name(name: str) -> str:
    module, _, part = name.rpartition(".")
    return f"{module}.m" if part == MAGNITUDE else name[:-1] + name[-1].lower()

"""The adapter on disk: one folder that PEFT and mlx-lm both load as it is, and the way back.

`adapter_model.safetensors` has PEFT's names and layout, `adapters.safetensors` mlx-lm's (transposed);
the one `adapter_config.json` carries the keys of both, and each library ignores the other's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from backends.interface import BackendError, FloatArray, IncompatibleState, LoraSpec, Session, TrainState
from backends.model_folder import ModelFolder, read_object, validate
from finetune.disk.atomic import write_pieces
from finetune.disk.base_model import FULL, base_model, fingerprint
from finetune.disk.safetensors_file import tensor_pieces
from finetune.errors import Incompatible
from finetune.events import result_of
from finetune.recipe.names import is_model_id

PEFT_FILE, MLX_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapters.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_BLOCK = re.compile(r"^(?P<before>.*?layers)\.(?P<index>\d+)\.(?P<within>.+)$")

_LARGEST = float(np.finfo(np.float32).max)  # scale; a backend's numbers hold no more


@dataclass(frozen=True)
class Adapter:
    """LoRA tensors by canonical name (`<module>.lora_A` [r, in], `.lora_B` [out, r]), and their scale."""

    tensors: Mapping[str, FloatArray]
    rank: int
    scale: float  # alpha / rank


def write_adapter(
    folder: Path, tensors: Mapping[str, FloatArray], lora: LoraSpec, base: str, blocks: int, facts: Mapping[str, Any]
) -> None:
    """Both formats into `folder`, which exists. `blocks` is how many the base has; `facts` go into the config."""
    for_peft = {f"{_PEFT_PREFIX}{name}.weight": tensor for name, tensor in tensors.items()}
    write_pieces(folder / PEFT_FILE, tensor_pieces(for_peft))
    write_pieces(folder / MLX_FILE, tensor_pieces({_mlx_name(name): tensor.T for name, tensor in tensors.items()}))
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in tensors))
    config = _config(modules, lora, base, blocks) | {"finetune": dict(facts)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(modules: list[str], lora: LoraSpec, base: str, blocks: int) -> dict[str, Any]:
    placed = [match for module in modules if (match := _BLOCK.match(module))]
    within = sorted({match["within"] for match in placed})
    indices = sorted({int(match["index"]) for match in placed})
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha  # some readers take only integers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in within}),
        "layers_to_transform": None if len(indices) == blocks else indices,
        "layers_pattern": None if len(indices) == blocks else "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "fine_tune_type": "lora",
        "num_layers": blocks - indices[0] if indices else 0,
        "lora_parameters": {
            "rank": lora.rank,
            "alpha": alpha,
            "scale": lora.scale,
            "dropout": lora.dropout,
            "keys": within,
        },
    }


def _mlx_name(name: str) -> str:
    return name[:-1] + name[-1].lower()


def adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as it stands. Raises Incompatible."""
    file = folder / CONFIG_FILE
    try:
        return read_object(file)
    except FileNotFoundError:
        raise Incompatible(f"{file}: missing; an adapter folder of PEFT or mlx-lm has it") from None
    except (OSError, ValueError) as error:
        raise Incompatible(f"{file}: cannot be read ({error!s:.200})") from None


def read_adapter(folder: Path) -> Adapter:
    """An adapter of either format. Raises Incompatible, naming the file and what is wrong with it."""
    config, config_file = adapter_config(folder), folder / CONFIG_FILE
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise Incompatible(f"{config_file}: {key} is set; only plain LoRA can be a start")
    if config.get("peft_type", "LORA") != "LORA":
        raise Incompatible(f"{config_file}: peft_type is {config['peft_type']!r:.40}; only LORA can be a start")
    if config.get("fine_tune_type", "lora") != "lora":
        kind = config["fine_tune_type"]
        raise Incompatible(f"{config_file}: fine_tune_type is {kind!r:.40}; only lora can be a start")
    if (folder / PEFT_FILE).exists():
        tensors = _canonical(folder / PEFT_FILE, _from_peft)
    else:
        tensors = _canonical(folder / MLX_FILE, _from_mlx)
    rank, scale = _rank_and_scale(config, config_file)
    wrong = [n for n, t in tensors.items() if t.shape[0 if n.endswith("lora_A") else 1] != rank]
    if wrong or not tensors:
        raise Incompatible(
            f"{folder}: {wrong[0] if wrong else 'no LoRA tensor'} is not of rank {rank} as its config says"
        )
    return Adapter(tensors, rank, scale)


def _rank_and_scale(config: Mapping[str, Any], file: Path) -> tuple[int, float]:
    try:
        own = config if "r" in config else config["lora_parameters"]
        rank = own["r" if "r" in config else "rank"]
        scale = own["lora_alpha"] / rank if "r" in config else own["scale"]
        fits = type(rank) is int and rank > 0 and type(scale) in (int, float) and abs(scale) <= _LARGEST
    except (KeyError, TypeError, ArithmeticError):
        fits = False
    if not fits:
        raise Incompatible(f"{file}: no rank and scale in it (a positive integer, a finite number)")
    return rank, float(scale)


def _canonical(file: Path, convert: Any) -> dict[str, FloatArray]:
    try:
        validate(file)
        found = load_file(file)
    except BackendError as error:
        raise Incompatible(str(error)) from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # KeyError: numbers that numpy lacks
        raise Incompatible(f"{file}: cannot be read ({error!r:.200})") from None
    tensors: dict[str, FloatArray] = {}
    for name, tensor in found.items():
        canonical, value = convert(name, tensor)
        if canonical is None or value.ndim != 2:
            raise Incompatible(f"{file}: {name:.200} is not a LoRA factor of a linear layer")
        if not np.isfinite(value).all():
            raise Incompatible(f"{file}: {name:.200} holds numbers that are not finite")
        tensors[canonical] = np.ascontiguousarray(value, dtype=np.float32)
    return tensors


def _from_peft(name: str, tensor: FloatArray) -> tuple[str | None, FloatArray]:
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+\.lora_[AB])(?:\.default)?\.weight", name)
    return (match[1] if match else None), tensor


def _from_mlx(name: str, tensor: FloatArray) -> tuple[str | None, FloatArray]:
    match = re.fullmatch(r"(.+\.lora_)([ab])", name)
    return (match[1] + match[2].upper() if match else None), tensor.T


def adapter_digest(folder: Path) -> str:
    """Of the adapter's tensors, rank and scale. Raises Incompatible where the folder has none."""
    adapter = read_adapter(folder)
    digest = hashlib.blake2b(f"{adapter.rank} {adapter.scale}".encode(), digest_size=32)
    for name, tensor in sorted(adapter.tensors.items()):
        digest.update(f"{name} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def start_from(session: Session, folder: Path, lora: LoraSpec) -> None:
    """Take an adapter folder (PEFT or mlx-lm) as the start. Raises Incompatible when it does not fit."""
    adapter = read_adapter(folder)
    if adapter.rank != lora.rank or abs(adapter.scale - lora.scale) > 1e-9:
        raise Incompatible(
            f"lora.start_from: {folder} has rank {adapter.rank} and scale {adapter.scale:g}; the recipe has rank "
            f"{lora.rank} and scale {lora.scale:g}. Set lora.rank: {adapter.rank} and "
            f"lora.alpha: {adapter.scale * adapter.rank:g}"
        )
    try:
        session.set_state(TrainState(0, adapter.tensors, {}))
    except IncompatibleState as error:
        raise Incompatible(f"lora.start_from: {folder} does not fit this model and these targets: {error}") from None


def check_base(adapter: Path, model: ModelFolder, name: str | None = None) -> None:
    """Raises Incompatible when the adapter folder was trained on another base than `model`.

    Our adapters say the fingerprint of their base; others only its name, and that is compared where both it and
    `name` are hub ids: without the owner, as mirrors are common.
    """
    config = adapter_config(adapter)
    facts, trained = config.get("finetune"), config.get("base_model_name_or_path")
    if isinstance(facts, dict) and "base_fingerprint" in facts:
        trained_on = str(facts["base_fingerprint"])
        full = trained_on.startswith(FULL)
        if trained_on != (fingerprint(result_of(base_model(model))) if full else model.sampled_fingerprint):
            raise Incompatible(
                f"{adapter} was trained on other base weights{' or another config' * full} than those in {model.path}; "
                "give the same base"
            )
    elif isinstance(trained, str) and name and _other_name(trained, name):
        raise Incompatible(
            f"{adapter} was trained on {trained}, and model.path is {name}; give the same base, or where they are "
            f"the same weights, write {name} into base_model_name_or_path of its adapter_config.json"
        )


def _other_name(first: str, second: str) -> bool:
    if not all(is_model_id(name) and not Path(name).exists() for name in (first, second)):
        return False
    return first.split("/")[1].lower() != second.split("/")[1].lower()

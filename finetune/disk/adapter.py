"""Reads an adapter folder: ours, PEFT's or mlx-lm's."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import (
    HEAD_WEIGHT,
    MAGNITUDE,
    BackendError,
    FloatArray,
    IncompatibleState,
    LoraSpec,
    Session,
    TrainState,
)
from backends.model_folder import ModelFolder, ending, read_object, read_tensors, validate
from finetune.disk.adapter_writer import CONFIG_FILE, FILES, MLX, PEFT
from finetune.disk.base_model import FULL, base_model, fingerprint
from finetune.errors import DataError, Incompatible
from finetune.events import result_of
from finetune.recipe.names import is_model_id, near

_LARGEST = float(np.finfo(np.float32).max)  # scale; a backend's numbers hold no more


@dataclass(frozen=True)
class Adapter:
    """LoRA tensors by canonical name (`<module>.lora_A` [r, in], `.lora_B` [out, r], of DoRA `.magnitude` [out]), and
    their scale; HEAD_WEIGHT [K, D] beside them where there is a head. Or a whole model's weights, by their names in the
    base.
    """

    tensors: Mapping[str, FloatArray]
    rank: int  # 0: of a whole model
    scale: float  # alpha / rank, or alpha / sqrt(rank)

    @property
    def whole(self) -> bool:
        return self.rank == 0

    @property
    def dora(self) -> bool:
        return any(name.endswith(f".{MAGNITUDE}") for name in self.tensors)


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
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise Incompatible(f"{config_file}: {key} is set; only LoRA of one rank and scale can be a start")
    if config.get("peft_type", "LORA") != "LORA":
        raise Incompatible(f"{config_file}: peft_type is {config['peft_type']!r:.40}; only LORA can be a start")
    if (kind := config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        raise Incompatible(f"{config_file}: fine_tune_type is {kind!r:.40}; only lora and dora can be a start")
    if (folder / FILES[PEFT]).exists():
        tensors = _canonical(folder / FILES[PEFT], _from_peft)
    else:
        tensors = _canonical(folder / FILES[MLX], _from_mlx)
    rank, scale = _rank_and_scale(config, config_file)
    factors = {name: tensor for name, tensor in tensors.items() if name.endswith(("lora_A", "lora_B"))}
    wrong = [n for n, t in factors.items() if t.shape[0 if n.endswith("lora_A") else 1] != rank]
    if wrong or not factors:
        raise Incompatible(
            f"{folder}: {wrong[0] if wrong else 'no LoRA tensor'} is not of rank {rank} as its config says"
        )
    if config.get("use_dora") is True or kind == "dora" or Adapter(tensors, rank, scale).dora:
        _check_magnitudes(folder, tensors)
    return Adapter(tensors, rank, scale)


def _check_magnitudes(folder: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Raises Incompatible unless each layer of a DoRA adapter has a magnitude for every row."""
    wanted = {name.rpartition(".")[0]: t.shape[:1] for name, t in tensors.items() if name.endswith("lora_B")}
    found = {name.rpartition(".")[0]: t.shape for name, t in tensors.items() if name.endswith(MAGNITUDE)}
    if wrong := sorted(module for module in {*wanted, *found} if wanted.get(module) != found.get(module)):
        raise Incompatible(f"{folder}: {wrong[0]} has no magnitude for every row, which a DoRA adapter has")


def _rank_and_scale(config: Mapping[str, Any], file: Path) -> tuple[int, float]:
    try:
        own = config if "r" in config else config["lora_parameters"]
        rank = own["r" if "r" in config else "rank"]
        by_root = config.get("use_rslora") is True
        scale = own["lora_alpha"] / (math.sqrt(rank) if by_root else rank) if "r" in config else own["scale"]
        fits = type(rank) is int and rank > 0 and type(scale) in (int, float) and abs(scale) <= _LARGEST
    except (KeyError, TypeError, ArithmeticError):
        fits = False
    if not fits:
        raise Incompatible(f"{file}: no rank and scale in it (a positive integer, a finite number)")
    return rank, float(scale)


def checked_tensors(file: Path) -> dict[str, FloatArray]:
    """Every tensor of a file, as float32. Raises Incompatible for what cannot be read or is not finite."""
    try:
        validate(file)
        found = read_tensors(file)
    except BackendError as error:
        raise Incompatible(str(error)) from None
    except (OSError, ValueError) as error:
        raise Incompatible(f"{file}: cannot be read ({error!r:.200})") from None
    for name, tensor in found.items():
        if not np.isfinite(tensor).all():
            raise Incompatible(f"{file}: {name:.200} holds numbers that are not finite")
    return found


def _canonical(file: Path, convert: Any) -> dict[str, FloatArray]:
    tensors: dict[str, FloatArray] = {}
    for name, tensor in checked_tensors(file).items():
        canonical, value = convert(name, tensor)
        if canonical is None or value.ndim != (1 if canonical.endswith(f".{MAGNITUDE}") else 2):
            raise Incompatible(f"{file}: {name:.200} is not a LoRA factor of a linear layer")
        tensors[canonical] = np.ascontiguousarray(value, dtype=np.float32)
    return tensors


def _from_peft(name: str, tensor: FloatArray) -> tuple[str | None, FloatArray]:
    if name == f"base_model.model.{HEAD_WEIGHT}":
        return HEAD_WEIGHT, tensor
    if match := re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", name):
        return f"{match[1]}.{MAGNITUDE}", tensor
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+\.lora_[AB])(?:\.default)?\.weight", name)
    return (match[1] if match else None), tensor


def _from_mlx(name: str, tensor: FloatArray) -> tuple[str | None, FloatArray]:
    if name.endswith(".m"):
        return f"{name.removesuffix('.m')}.{MAGNITUDE}", tensor
    match = re.fullmatch(r"(.+\.lora_)([ab])", name)
    return (match[1] + match[2].upper() if match else None), tensor.T


def adapter_digest(folder: Path) -> str:
    """Of the adapter's tensors, rank and scale. Raises Incompatible where the folder has none."""
    adapter = read_adapter(folder)
    digest = hashlib.blake2b(f"{adapter.rank} {adapter.scale}".encode(), digest_size=32)
    for name, tensor in sorted(adapter.tensors.items()):
        digest.update(f"{name} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def check_there(start: Path) -> None:
    """Raises DataError where lora.start_from names no adapter folder."""
    if (start / CONFIG_FILE).exists():
        return
    close = "" if start.is_dir() or not (name := near(start)) else f"did you mean {name}? Or "
    lacks = f"has no {CONFIG_FILE}" if start.is_dir() else "no such folder"
    raise DataError(f"lora.start_from: {start}: {lacks}; {close}give an adapter folder of PEFT or mlx-lm")


def check_start(folder: Path, model: ModelFolder, lora: LoraSpec) -> None:
    """Raises Incompatible where an adapter folder does not fit the recipe, with the keys that make it fit."""
    adapter = read_adapter(folder)
    _check_scale(folder, adapter, lora)
    if HEAD_WEIGHT in adapter.tensors:
        raise Incompatible(f"lora.start_from: {folder} has a classification head, and is no start without it")
    theirs = {ending(name.rsplit(".", 1)[0]) for name in adapter.tensors}
    ours = {ending(module) for module in model.lora_modules(lora)}
    if theirs == ours:
        return
    leaves = sorted({module.rsplit(".", 1)[-1] for module in theirs})
    blocks = model.blocks - min(int(module.split(".")[1]) for module in theirs if module.startswith("layers."))
    keys = f"lora.targets: [{', '.join(leaves)}]" + (f" and lora.layers: {blocks}" if blocks < model.blocks else "")
    try:
        fitting = model.lora_modules(replace(lora, targets=tuple(leaves), layers=blocks))
    except BackendError:
        fitting = {}
    remedy = f"set {keys}" if {ending(module) for module in fitting} == theirs else "give one of this model's layers"
    raise Incompatible(
        f"lora.start_from: {folder} adapts {len(theirs)} layers ({', '.join(leaves)}), and the recipe {len(ours)}; "
        f"{remedy}"
    )


def start_from(session: Session, folder: Path, lora: LoraSpec) -> None:
    """Take an adapter folder (PEFT or mlx-lm) as the start. Raises Incompatible when it does not fit."""
    adapter = read_adapter(folder)
    _check_scale(folder, adapter, lora)
    try:
        session.set_state(TrainState(0, adapter.tensors, {}))
    except IncompatibleState as error:
        raise Incompatible(f"lora.start_from: {folder} does not fit this model and these targets: {error}") from None


def _check_scale(folder: Path, adapter: Adapter, lora: LoraSpec) -> None:
    if adapter.dora != lora.dora:
        what, remedy = ("is", "set lora.dora: true") if adapter.dora else ("is not", "remove lora.dora")
        raise Incompatible(f"lora.start_from: {folder} {what} of DoRA; {remedy}")
    if adapter.rank != lora.rank or abs(adapter.scale - lora.scale) > 1e-9:
        raise Incompatible(
            f"lora.start_from: {folder} has rank {adapter.rank} and scale {adapter.scale:g}; the recipe has rank "
            f"{lora.rank} and scale {lora.scale:g}. Set lora.rank: {adapter.rank} and "
            f"lora.alpha: {adapter.scale * (math.sqrt(adapter.rank) if lora.by_root else adapter.rank):g}"
        )


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

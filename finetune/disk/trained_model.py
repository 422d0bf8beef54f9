"""Loads a finished run's result: an adapter folder, or a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from backends.interface import FloatArray
from backends.model_folder import ModelFolder
from finetune.disk.adapter import Adapter, check_base, checked_tensors, read_adapter
from finetune.disk.atomic import write_file
from finetune.disk.base_model import base_model, fingerprint
from finetune.disk.model_writer import whole_model, write_config, write_weights
from finetune.disk.run_files import read_json
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible
from finetune.events import result_of

FACTS = "finetune.json"
_REMEDY = "train the run again"


@dataclass(frozen=True)
class _Facts:
    """What is read again of finetune.json."""

    base_fingerprint: str
    trained: list[str]  # the tensors that a session takes, in their order


def read_trained(run: RunFolder) -> Adapter:
    """What a finished run has trained: its adapter, or its whole model. Raises Incompatible as `read_adapter` does."""
    return read_model(run.model) if run.model.is_dir() else read_adapter(run.adapter)


def check_run_base(run: RunFolder, model: ModelFolder) -> None:
    """Raises Incompatible where the run was trained on another base."""
    if not run.model.is_dir():
        check_base(run.adapter, model)
    elif _facts(run.model).base_fingerprint != fingerprint(result_of(base_model(model))):
        raise Incompatible(
            f"{run.model} was trained on other base weights or another config than those in {model.path}; give the "
            "same base"
        )


def read_model(folder: Path) -> Adapter:
    """The weights that trained, of a run's model folder. Raises Incompatible."""
    trained = _facts(folder).trained
    tensors: dict[str, FloatArray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= checked_tensors(file)
    missing = [name for name in trained if name not in tensors]
    if missing:
        raise Incompatible(f"{folder}: {missing[0]:.200} is missing; {_REMEDY}")
    return Adapter({name: tensors[name] for name in trained}, 0, 0.0)


def write_model(to: Path, folder: ModelFolder, tensors: Mapping[str, FloatArray], facts: Mapping[str, Any]) -> None:
    """Weights and config of the base with these tensors in the place of its own, in float32, into the folder `to`."""
    whole: dict[str, Callable[[], FloatArray]] = dict(whole_model(folder, tensors))
    whole |= {name: partial(tensors.__getitem__, name) for name in tensors}
    files = folder.whole_shapes if folder.weights else {}  # none in the toys of a backend that needs no files
    shapes = {name: tuple(tensors[name].shape) if name in tensors else files[name] for name in whole}
    write_weights(to, shapes, whole, "f32")
    write_config(to, folder, "f32")
    values = {**facts, "trained": list(tensors)}
    write_file(to / FACTS, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _facts(folder: Path) -> _Facts:
    found = read_json(folder / FACTS, _Facts, _REMEDY, "ignore")
    if found is None:
        raise Incompatible(f"{folder / FACTS}: missing; {_REMEDY}")
    return found

"""The available backends: which of them work here, and how to open one. Imports a framework only when asked."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from statistics import median
from typing import Any, cast

from backends.interface import (
    Backend,
    BackendError,
    Batch,
    CheckedFolder,
    Device,
    FloatArray,
    LoraSpec,
    ModelSpec,
    NumberType,
    OptimSpec,
    Session,
    Unsupported,
    Wanted,
)
from backends.machine_cache import folder_stamp
from backends.matmul_speed import numpy_rate
from backends.memory import available_bytes
from backends.model_folder import ModelFolder, folder_of
from backends.predictions import Costs, Machine, Predictions
from backends.registry_process import ahead, answered_apart, asks_apart
from backends.registry_process import ask_apart as ask_apart
from backends.table import BACKENDS, row
from backends.table import NAMES as NAMES
from backends.usual_families import OTHER_MODEL, is_plain


def load(name: str) -> Backend:
    """The backend's module. Raises BackendError for an unknown name, ImportError where a library is missing."""
    return cast(Backend, import_module(row(name).session))


@answered_apart
def probe(name: str) -> str | None:
    """None: usable here; else one sentence that says why not, with the remedy. Never raises."""
    try:
        return load(name).probe()
    except BackendError as error:
        return str(error)
    except ImportError as error:
        return f'{error.name or error} cannot be imported; pip install "recipe-finetune[{name}]"'
    except Exception as error:  # a library that is there but broken: wrong driver, wrong processor
        return f'{name} does not start here ({error}); try pip install --force-reinstall "recipe-finetune[{name}]"'


def installed(name: str) -> bool:
    """Whether the framework of the backend's name is here. Loads none, so it may still not work (`probe`)."""
    return not row(name).automatic or PathFinder.find_spec(name) is not None


@answered_apart
def describe(name: str, device: Wanted = "auto") -> dict[str, Any]:
    """Device, versions and abilities (`Backend.describe`). Raises BackendError where the backend is not usable."""
    return usable(name).describe(device)


def free_bytes(name: str, device: Wanted = "auto") -> int | None:
    """Memory that the device can give, where that is known. Raises BackendError as `describe` does."""
    if asks_apart() and device_kind(describe(name, device)["device"]) == "cpu":
        return available_bytes()  # as every backend has it there
    return device_bytes(name, device)


@answered_apart
def device_bytes(name: str, device: Wanted) -> int | None:
    """As `free_bytes`, by the backend itself."""
    return usable(name).free_bytes(device)


@answered_apart
def unused_accelerator(name: str, device: Wanted = "auto") -> str | None:
    """Why an accelerator of this machine would not be used, with the remedy. Raises BackendError as `describe` does."""
    return None if device == "cpu" else usable(name).unused_accelerator()


def automatic() -> list[str]:
    """The backends that "auto" considers, the best for this machine first."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    names = [name for name, row in BACKENDS.items() if row.automatic]
    return sorted(names, key=lambda name: BACKENDS[name].apple != apple)


@answered_apart
def choose(requested: str = "auto") -> str:
    """The backend to use: `requested`, or for "auto" the first of `automatic()` that works here.

    Raises BackendError with the reason of every backend that was considered.
    """
    if requested != "auto":
        usable(requested)
        return requested
    reasons = []
    for name in automatic():
        reason = probe(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError("no backend can be used here. " + " ".join(reasons))


def usable(name: str) -> Backend:
    """The backend's module. Raises BackendError with the reason where it cannot be used."""
    reason = probe(name)
    if reason is not None:
        raise BackendError(f"{name}: {reason}")
    return load(name)


def open_session(name: str, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> Session:
    """A live session. Raises BackendError where the backend, or what is asked of it, cannot be used."""
    return usable(name).open(replace(model, folder=folder_of(model)), lora, optim, seed)


def free_dropped_models() -> None:
    """Frees the models of sessions that nobody holds any more. To be called before another is opened, or before what is
    free is asked: a model's layers refer to one another, and Python collects such circles only now and then.
    """
    gc.collect()


@answered_apart
def logprobs(name: str, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int, batch: Batch) -> FloatArray:
    """What a session of its own thinks of a batch (`Scores.logprob`). Raises BackendError as `open_session` does."""
    free_dropped_models()
    return open_session(name, model, lora, optim, seed).score(batch).logprob


def check_ahead(requested: str, model: ModelSpec, lora: LoraSpec) -> None:
    """Has another process, where there is one, begin with what `check_model` will want to know of it."""
    if asks_apart() and not is_plain(folder_of(model)):
        ahead("check_chosen", requested, replace(model, folder=None), lora, folder_stamp(model.path))


def check_model(requested: str, model: ModelSpec, lora: LoraSpec) -> None:
    """Raises BackendError for what the backend that `choose` chooses cannot do with this model, as far as config and
    shapes tell.
    """
    folder = folder_of(model)
    if row(choose(requested)).machine and is_plain(folder):
        folder.lora_modules(lora)  # raises for targets that it does not have
    elif asks_apart():
        check_chosen(requested, replace(model, folder=None), lora, folder_stamp(model.path))
    else:
        check_chosen(requested, replace(model, folder=folder), lora)


@answered_apart
def check_chosen(requested: str, model: ModelSpec, lora: LoraSpec, files: str = "") -> None:
    """The same, by the backend's own library. files: `folder_stamp`; the answer holds as long as that does."""
    chosen, folder = choose(requested), folder_of(model)
    with _other_named(chosen, folder):
        usable(chosen).check(replace(model, folder=folder), lora)


@answered_apart
def check_config(requested: str, path: Path, remote_code: bool) -> None:
    """Raises BackendError for a model that cannot be trained here, as far as the files beside its weights tell.

    Asked before these are downloaded. Where no backend works that is for the commands that need one to say.
    """
    folder = ModelFolder.open(path, remote_code, downloaded=False)
    try:
        chosen = choose(requested)
    except BackendError:
        return
    with _other_named(chosen, folder):
        usable(chosen).check_config(folder)


@contextmanager
def _other_named(chosen: str, folder: CheckedFolder) -> Iterator[None]:
    """Adds to a refused type of model the backend that runs it here, or else another model."""
    try:
        yield
    except Unsupported as error:
        others = (name for name in automatic() if name != chosen and _runs(name, folder))
        other = next((f"set backend: {name}, which runs it" for name in others), OTHER_MODEL)
        raise BackendError(f"{error}; {other}") from error


def _runs(name: str, folder: CheckedFolder) -> bool:
    if probe(name) is not None:
        return False
    try:
        load(name).check_config(folder)
    except BackendError:
        return False
    return True


@answered_apart
def describe_chosen(requested: str, device: Wanted) -> dict[str, Any]:
    """As `describe`, of the backend that `choose` chooses."""
    return describe(choose(requested), device)


def device_kind(device: str) -> Device:
    """Of a device as sessions and `describe` name it ("cpu", "cuda: ...")."""
    return "cpu" if device == "cpu" else "gpu"


def costs(name: str, device: Device) -> Costs:
    """What the backend needs on such a device, installed here or not. Raises BackendError where it cannot use one."""
    known = _predictions(name).COSTS
    if device not in known:
        raise BackendError(f"{name} does not compute on a {device}")
    return known[device]


def four_bit(name: str) -> str | None:
    """The backend's 4-bit scheme in words; None: it has none."""
    return next((costs.four_bit for costs in _predictions(name).COSTS.values()), None)


def machines() -> list[tuple[str, Machine]]:
    """Well-known machines, each with the backend that runs there."""
    return [(name, machine) for name in BACKENDS for machine in _predictions(name).MACHINES]


def shortcuts(name: str) -> tuple[str, ...]:
    """All that the `shortcuts` of the backend's sessions may name."""
    return tuple(_predictions(name).SHORTCUTS)


def measured_rate(name: str, number_type: NumberType, device: Wanted = "auto") -> float:
    """Floating-point operations per second of matrix products, timed once in a process. The backend must be usable.

    Where another process answers for this one, those of a processor are numpy's, timed here, and how many times as
    fast the backend's are.
    """
    if asks_apart() and device_kind(describe(name, device)["device"]) == "cpu":
        return _numpy_rate() * relative_rate(name, number_type)
    return timed_rate(name, number_type, device)


@answered_apart
@cache
def timed_rate(name: str, number_type: NumberType, device: Wanted) -> float:
    """As `measured_rate`, by the backend itself."""
    return _predictions(name).measured_rate(number_type, device)


@answered_apart
def relative_rate(name: str, number_type: NumberType) -> float:
    """Of a backend's products on the processor to numpy's in float32: the median of three, timed in turn."""
    return median(_predictions(name).measured_rate(number_type, "cpu") / numpy_rate() for _ in range(3))


_numpy_rate = cache(numpy_rate)


def _predictions(name: str) -> Predictions:
    return cast(Predictions, import_module(row(name).costs))

"""Checkpoints: everything that a run needs to resume, in folders that are whole or absent.

`step-00000123/` holds `state.safetensors` (adapter and moments), `best.safetensors` (the best adapter so far, if
any), `average.safetensors` (the steps' average, with `epochs: auto`), `loop.json`, `identity.json`, and, written last,
`manifest.json` with size and SHA-256 of all the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from backends.interface import FloatArray, TrainState
from finetune.disk.atomic import disk_errors, new_folder, recover, remove, rename, write_pieces
from finetune.disk.manifest import MANIFEST, Broken, Tally, json_bytes, manifest_of, newest_first, read_verified, verify
from finetune.disk.safetensors_file import tensor_pieces
from finetune.errors import Diverged, Incompatible

BEST, AVERAGE = "best.safetensors", "average.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory."""

    state: TrainState
    loop: dict[str, Any]  # the loop's own state; JSON with finite numbers
    best: Mapping[str, FloatArray] | None  # the best adapter so far
    identity: Mapping[str, Any]  # base, recipe, data, rank, ...: what a resumed run must share; JSON
    average: Mapping[str, FloatArray] | None = None  # of the steps so far; None and empty are the same


@dataclass(frozen=True)
class Checkpoints:
    """Where a run saves its checkpoints, and what a run that resumes from one must share with it."""

    folder: Path
    identity: Mapping[str, Any]

    def folder_of(self, step: int) -> Path:
        return _path(self.folder, step)

    def save(
        self,
        state: TrainState,
        loop: dict[str, Any],
        best: Mapping[str, FloatArray] | None,
        average: Mapping[str, FloatArray] | None = None,
    ) -> Path:
        """The folder of the new checkpoint. Raises Diverged, DiskError."""
        return save(self.folder, Checkpoint(state, loop, best, self.identity, average))


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Writes `folder/step-XXXXXXXX`, then removes all but the newest `keep` (>= 1) intact ones.

    No file is held whole in memory, and no tensor that is contiguous is copied.
    Raises Diverged, before anything is written, where a number is not finite; DiskError.
    """
    files = _pieces(checkpoint)
    path = _path(folder, checkpoint.state.step)
    with new_folder(path) as temporary:
        tallies = {name: Tally() for name in files}
        for name, pieces in files.items():
            write_pieces(temporary / name, tallies[name].passing(pieces))
        manifest = manifest_of({name: tally.entry() for name, tally in tallies.items()})
        write_pieces(temporary / MANIFEST, [manifest])
    with disk_errors(folder):
        _prune(folder, checkpoint.state.step, keep)
    return path


def check_tensors(checkpoint: Checkpoint, path: Path, remedy: str) -> None:
    """Raises Incompatible where a number is not finite, or an adapter beside the state's is not of its shape."""
    state, beside = checkpoint.state, {"best": checkpoint.best, "average": checkpoint.average}
    others = {name: tensors for name, tensors in beside.items() if tensors is not None}
    for tensors in (state.adapter, state.moments, *others.values()):
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise Incompatible(f"{path}: {name:.200} holds numbers that are not finite; {remedy}")
    shapes = {name: tensor.shape for name, tensor in state.adapter.items()}
    for which, tensors in others.items():
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise Incompatible(f"{path / which}.safetensors: other tensors than the adapter's; {remedy}")


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and a sentence for each broken one that is newer.

    Broken ones are renamed to `step-XXXXXXXX.broken`; what a killed run left half written is removed.
    Raises DiskError.
    """
    messages: list[str] = []
    if not folder.exists():
        return None, messages
    recover(folder)
    with disk_errors(folder):
        for step, path in newest_first(folder):
            try:
                return _parse(step, read_verified(path)), messages
            except Broken as reason:
                aside = _set_aside(path)
                messages.append(f"checkpoint {path} is broken ({reason}); it was renamed to {aside.name}")
    return None, messages


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _pieces(checkpoint: Checkpoint) -> dict[str, Iterable[bytes | memoryview]]:
    """File name -> its content, in pieces. Raises Diverged where a number is not finite, before it makes any piece."""
    state = checkpoint.state
    tensors = {
        **{f"adapter.{name}": tensor for name, tensor in state.adapter.items()},
        **{f"moments.{name}": tensor for name, tensor in state.moments.items()},
    }
    files = {"state.safetensors": _checked(tensors, state.step)}
    if checkpoint.best is not None:
        files[BEST] = _checked(checkpoint.best, state.step)
    if checkpoint.average:
        files[AVERAGE] = _checked(checkpoint.average, state.step)
    try:
        files["loop.json"] = [json_bytes({"step": state.step, "loop": checkpoint.loop})]
        files["identity.json"] = [json_bytes(checkpoint.identity)]
    except ValueError as error:
        message = f"step {state.step}: the state of the training loop holds a number that is not finite ({error})"
        raise Diverged(message) from error
    return files


def _checked(tensors: Mapping[str, FloatArray], step: int) -> Iterable[bytes | memoryview]:
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if bad:
        raise Diverged(
            f"step {step}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity ({bad[0]}, ...); "
            "nothing was written, and earlier checkpoints stay. Lower train.learning_rate."
        )
    return tensor_pieces(tensors)


def _parse(step: int, files: Mapping[str, bytes]) -> Checkpoint:
    try:
        loop = json.loads(files["loop.json"])
        if loop["step"] != step:
            raise Broken(f"it is of step {loop['step']}, not {step}")
        tensors = load(files["state.safetensors"])
        best, average = (load(files[name]) if name in files else None for name in (BEST, AVERAGE))
        state = TrainState(step, _part(tensors, "adapter."), _part(tensors, "moments."))
        return Checkpoint(state, loop["loop"], best, json.loads(files["identity.json"]), average)
    except KeyError as error:
        raise Broken(f"{error.args[0]} is missing") from error
    except (ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise Broken(f"it holds what no run writes ({error})") from error


def _part(tensors: Mapping[str, FloatArray], prefix: str) -> dict[str, FloatArray]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prune(folder: Path, newest: int, keep: int) -> None:
    """Removes checkpoints up to step `newest` when `keep` newer ones are intact."""
    intact = 0
    for _, path in [(step, path) for step, path in newest_first(folder) if step <= newest]:
        if intact >= keep:
            remove(path)
            continue
        try:
            verify(path)
            intact += 1
        except Broken:
            continue  # load_newest renames it and says so


def _set_aside(path: Path) -> Path:
    number = 1
    aside = path.with_name(f"{path.name}.broken")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.broken-{number}")
    rename(path, aside)
    return aside

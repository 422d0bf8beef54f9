"""The identity of a run: what a resumed run must share with the run that wrote the checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from backends.model_folder import ModelFolder
from finetune.data.clock import now
from finetune.data.rows import Prepared
from finetune.disk.run_files import read_json
from finetune.errors import Incompatible
from finetune.recipe.schema import Recipe
from finetune.text import shorten

CLOCK = "clock"
# Keys that change where or how fast a run goes, or whose effect the digests of rows and weights already hold.
_NOT_IDENTITY = {
    "output", "backend", "device", "model.path", "model.revision", "model.dtype", "data.train", "data.valid",
    "data.test", "data.max_dropped", "data.long_rows", "train.micro_tokens", "train.gradient_checkpointing",
    "train.checkpoint_minutes", "evaluate.generate", "evaluate.max_tokens", "evaluate.base",
}  # fmt: skip


def identity_of(recipe: Recipe, prepared: Prepared, folder: ModelFolder) -> dict[str, Any]:
    """The recipe's keys that matter, a digest of the rows, and a fingerprint of the base's weights."""
    settings = {
        f"{key}": value
        for key, value in _flat(recipe.model_dump(mode="json", exclude={"data": {"groups"}}))
        if key not in _NOT_IDENTITY
    }
    digest = hashlib.sha256()
    for split in prepared.splits:
        for example in split.examples:
            digest.update(example.tokens.tobytes() + example.weights.tobytes())
    clock = prepared.renderer.clock if prepared.renderer else None
    written = {} if clock is None else {CLOCK: clock.isoformat()}  # by a chat template; most write no date
    return {"base_model_weights": folder.fingerprint, "data_rows": digest.hexdigest()} | written | settings


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_identity(run: Path) -> dict[str, Any] | None:
    """What the run began with; None when it ended before it was written. Raises Incompatible."""
    return read_json(run / "identity.json", dict[str, Any], "start a new run")


def clock_of(run: Path) -> datetime | None:
    """The time that the run's chat template writes: its own, or now where the run has not begun.

    None for runs that have recorded none. Raises Incompatible.
    """
    identity = read_identity(run)
    if identity is None:
        return now()
    try:
        return datetime.fromisoformat(identity[CLOCK]) if CLOCK in identity else None
    except (TypeError, ValueError) as error:
        raise Incompatible(f"{run / 'identity.json'}: {CLOCK} cannot be read ({error}); start a new run") from None


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises Incompatible with every difference between a checkpoint's identity and this run's."""
    now = json.loads(json.dumps(current))  # as it would come back from a file: tuples are lists
    differences = [
        f"{key.replace('_', ' ')}: the checkpoint has {_value(saved, key)}, this run has {_value(now, key)}"
        for key in sorted({*saved, *now})
        if key not in saved or key not in now or saved[key] != now[key]
    ]
    if differences:
        lines = "\n  ".join(differences)
        raise Incompatible(
            f"the checkpoint belongs to another run:\n  {lines}\n"
            "Resume with the same recipe, data and model, or start a new run."
        )


def _value(identity: Mapping[str, Any], key: str) -> str:
    return shorten(json.dumps(identity[key], ensure_ascii=False), 60) if key in identity else "no such key"

"""Identity of a run: what must be equal for a checkpoint to be resumed."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from backends.model_folder import ModelFolder
from finetune.data.grouped_split import WORDS
from finetune.data.rows import Example, Prepared, Split
from finetune.data.template_clock import now
from finetune.disk.adapter import adapter_digest
from finetune.disk.base_model import base_differences, base_model, listed
from finetune.disk.manifest import newest_first
from finetune.disk.run_files import read_json
from finetune.errors import Incompatible
from finetune.events import Progress, result_of
from finetune.recipe.schema import Recipe
from finetune.text import shorten

CLOCK, PARTING, OPEN_END = "clock", "parting", "rate with epochs: auto"
KIND = 2  # of identity. The first, of 0.1.0, has no "kind", samples of the weights, and one digest of all rows
# Keys that change where or how fast a run goes, or whose effect the digests of rows and files already hold.
_NOT_IDENTITY = {
    "output", "backend", "device", "tracker", "model.path", "model.revision", "model.dtype", "data.train", "data.valid",
    "data.test", "data.encoding", "data.limit", "data.max_dropped", "data.long_rows", "train.micro_tokens",
    "train.gradient_checkpointing", "train.checkpoint_minutes", "evaluate.generate", "evaluate.max_tokens",
    "evaluate.answer", "evaluate.base", "evaluate.forgetting", "evaluate.swaps", "evaluate.suite",
}  # fmt: skip

# Keys that came later, with the value that says nothing: not in the identities of earlier runs.
_LATER: Mapping[str, Any] = {
    "method": "lora",
    "head": None,
    "preferences": None,
    "preferences.loss": "dpo",
    "lora.rslora": False,
    "lora.dora": False,
}


def identity_of(
    recipe: Recipe, prepared: Prepared, folder: ModelFolder, like: Mapping[str, Any] | None = None
) -> Generator[Progress, None, dict[str, Any]]:
    """All that a result depends on: the recipe's keys that matter, the rows of each split, the base, the start.

    like: an identity of this run, whose kind is kept.
    """
    values = _flat(recipe.model_dump(mode="json", exclude={"data": {"groups"}}))
    known = ((key, value) for key, value in values if key not in _LATER or value != _LATER[key])
    settings = {key: value for key, value in known if key not in _NOT_IDENTITY}
    if like is not None and "kind" not in like:
        rows = sha256(b"".join(_tokens(example) for split in prepared.splits for example in split.examples))
        return {"base_model_weights": folder.sampled_fingerprint, "data_rows": rows.hexdigest()} | settings
    settings["train.schedule"] = recipe.train.shape
    start = settings.pop("lora.start_from")
    clock = prepared.renderer.clock if prepared.renderer else None
    written = {} if clock is None else {CLOCK: clock.isoformat()}  # by a chat template; most write no date
    if prepared.parting is not None:
        written[PARTING] = prepared.parting
    if recipe.train.epochs == "auto":
        written[OPEN_END] = "an average, while the loss falls"  # earlier runs ended otherwise
    base = yield from base_model(folder)
    return {
        "kind": KIND,
        "base_model": base,
        "rows": rows_of(prepared),
        "labels": list(prepared.labels),
        "start": adapter_digest(Path(start)) if start else None,
        **written,
        **settings,
    }


def rows_of(prepared: Prepared) -> dict[str, str]:
    """A digest of each split's rows, in their order, by the split's name."""
    return {split.name: split_digest(split) for split in prepared.splits}


def split_digest(split: Split) -> str:
    """Of its rows, in their order."""
    digest = blake2b(digest_size=32)
    for example in split.examples:
        ends = [len(example), example.answer, example.answer_start, example.answer_end]
        digest.update(json.dumps(ends).encode() + _tokens(example))
        if example.rejected:
            digest.update(_tokens(example.rejected))
    return digest.hexdigest()


def _tokens(example: Example) -> bytes:
    return example.tokens.tobytes() + example.weights.tobytes()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_identity(run: Path) -> dict[str, Any] | None:
    """What the run began with; None when it ended before it was written. Raises Incompatible."""
    return read_json(run / "identity.json", dict[str, Any], "start a new run")


def known_identity(run: Path) -> dict[str, Any] | None:
    """As `read_identity`; where the run's own is lost, that of its newest checkpoint that has one."""
    identity, folder = read_identity(run), run / "checkpoints"
    if identity is None and folder.is_dir():
        for _, path in newest_first(folder):
            with suppress(Incompatible):  # `load_newest` sets a broken one aside
                if (identity := read_identity(path)) is not None:
                    break
    return identity


def clock_of(run: Path) -> datetime | None:
    """The time that the run's chat template writes: its own, or now where the run has not begun.

    None for runs that have recorded none. Raises Incompatible.
    """
    identity = known_identity(run)
    if identity is None:
        return now()
    try:
        return datetime.fromisoformat(identity[CLOCK]) if CLOCK in identity else None
    except (TypeError, ValueError) as error:
        raise Incompatible(f"{run / 'identity.json'}: {CLOCK} cannot be read ({error}); start a new run") from None


def parting_of(run: Path) -> str | None:
    """How the run's validation rows are set apart; None for runs that do not say. Raises Incompatible."""
    identity = known_identity(run)
    return WORDS if identity is None or identity.get(PARTING) == WORDS else None


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises Incompatible with every difference between a checkpoint's identity and this run's."""
    now = json.loads(json.dumps(current))  # as it would come back from a file: tuples are lists
    differences = base_differences(saved.get("base_model", {}), now.get("base_model", {})) + row_differences(saved, now)
    if saved.get("start") != now.get("start"):
        differences.append("lora.start_from: the adapter there has changed")
    differences += [
        f"{key.replace('_', ' ')}: the checkpoint has {_value(saved, key)}, this run has {_value(now, key)}"
        for key in sorted({*saved, *now} - {"base_model", "rows", "start"})
        if key not in saved or key not in now or saved[key] != now[key]
    ]
    if differences:
        raise Incompatible(
            "the checkpoint belongs to another run:",
            *listed(differences),
            "Resume with the same recipe, data and model, or start a new run.",
        )


def row_differences(saved: Mapping[str, Any], now: Mapping[str, Any], only: str | None = None) -> list[str]:
    """Each split, or that one, which has other rows than an identity says, in words."""
    before, after = saved.get("rows", {}), now.get("rows", {})
    names = [name for name in ("train", "valid", "test") if only in (None, name)]
    return [
        f"data rows of {name}: other rows than the run began with, or in another order"
        for name in names
        if before.get(name) != after.get(name)
    ]


def check_model(run: Path, folder: ModelFolder) -> None:
    """Raises Incompatible where a run's identity names another base than the folder's; one of 0.1.0 names none."""
    saved = known_identity(run)
    if saved is None or "base_model" not in saved:
        return
    now = result_of(base_model(folder))
    if lines := base_differences(saved["base_model"], now):
        what = "other base weights" if saved["base_model"].get("weights") != now["weights"] else "another model"
        raise Incompatible(
            f"{run} was trained on {what} than what is in {folder.path} now:",
            *listed(lines),
            "Put the model's files back as they were, or train a new run on the model as it is.",
        )


def check_held_out(run: Path, prepared: Prepared, remedy: str) -> None:
    """Raises Incompatible where the rows that a run held out are others now; an identity of 0.1.0 does not say."""
    check_rows(run, prepared, remedy, only=prepared.held_out.name)


def check_rows(run: Path, prepared: Prepared, remedy: str, only: str | None = None) -> None:
    """As `check_held_out`, of every split, or of that one."""
    saved = known_identity(run)
    if saved is not None and "rows" in saved:
        lines = row_differences(saved, {"rows": rows_of(prepared)}, only)
        if lines:
            raise Incompatible(f"{run}:", *listed(lines), f"{remedy}.")


def _value(identity: Mapping[str, Any], key: str) -> str:
    return shorten(json.dumps(identity[key], ensure_ascii=False), 60) if key in identity else "no such key"

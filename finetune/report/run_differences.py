"""Differences between two runs, or between a recipe and the defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from finetune.recipe.schema import Recipe
from finetune.report.finished_run import FinishedRun

# Where a run writes, and how it is cut to fit in memory, changes none of its figures.
_NO_MATTER = {"output", "train.micro_tokens", "train.gradient_checkpointing", "train.checkpoint_minutes",
              "train.checkpoint_every"}  # fmt: skip


DRAWN = ", drawn by the seed"  # of rows: after their split


@dataclass(frozen=True)
class Difference:
    """One thing that differs, with its values in words."""

    what: str
    before: str
    after: str


def differences(before: FinishedRun, after: FinishedRun) -> list[Difference]:
    """Of the recipe, the data, the base model and what the runs ran on, in this order."""
    found = [
        Difference(key, in_words(old), in_words(new))
        for key, old, new in _changed(flat(before.recipe), flat(after.recipe))
        if key not in _NO_MATTER
    ]
    found += _of_rows(before, after)
    bases = [_digest(run.identity.get("base_model")) for run in (before, after)]
    if None not in bases and bases[0] != bases[1]:
        found.append(Difference("base model", "its files", "other files"))
    machines = [{"backend": run.figures.backend, "device": run.figures.device} for run in (before, after)]
    found += [Difference(key, str(old), str(new)) for key, old, new in _changed(machines[0], machines[1])]
    versions = _changed(before.environment.libraries, after.environment.libraries)
    found += [Difference(f"version of {name}", in_words(old), in_words(new)) for name, old, new in versions]
    return found


def seed_alone(before: FinishedRun, after: FinishedRun) -> bool:
    """Whether nothing that can change the figures differs but the seed, and it does."""
    found = differences(before, after)
    no_matter = [one.what for one in found if one.what.startswith("version of ") or one.what.endswith(DRAWN)]
    changed = {one.what for one in found} - {*no_matter}
    rows = {"train rows", "valid rows", "test rows"} & changed
    same = set() if rows else {"data.train", "data.valid", "data.test"}  # other files of the same rows
    same |= set() if "base model" in changed else {"model.path", "model.revision"}
    if "rows" not in before.identity or "base_model" not in before.identity:
        same = set()
    return "seed" in changed and changed <= {"seed", *same}


def beyond_defaults(recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, default, value) of each key that the recipe sets to something else; a key without a default has None."""
    defaults = _defaults(Recipe)
    return [(key, defaults.get(key), value) for key, value in flat(recipe).items() if value != defaults.get(key)]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every key as `section.key`; what a key holds is its value, mappings included."""
    values = recipe.model_dump(mode="json")
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(getattr(recipe, key), BaseModel):
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def in_words(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_rows(before: FinishedRun, after: FinishedRun) -> list[Difference]:
    digests = [run.identity.get("rows", {}) for run in (before, after)]
    counts = [run.figures.facts.rows if run.figures.facts else {} for run in (before, after)]
    if not all(isinstance(one, Mapping) and one for one in digests):
        return []
    found = []
    for split in ("train", "valid", "test"):
        old, new = (one.get(split) for one in digests)
        if old != new and split in (*digests[0], *digests[1]):
            sizes = [f"{one[split]:,} rows" if split in one else "its rows" for one in counts]
            drawn = sizes[0] == sizes[1] and _seed_draws(before.recipe, after.recipe, split)
            what = f"{split} rows{DRAWN * drawn}"
            found.append(Difference(what, sizes[0], sizes[1] if sizes[0] != sizes[1] else f"{sizes[1]}, others"))
    return found


def _seed_draws(before: Recipe, after: Recipe, split: str) -> bool:
    """Whether another seed alone gives a split other rows: of a part that is set apart, or a limit."""
    if before.seed == after.seed or before.data != after.data:
        return False
    return before.data.limit is not None or (before.data.valid is None and split != "test")


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys((*before, *after))
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _digest(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)


def _defaults(kind: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, about in kind.model_fields.items():
        section = about.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found |= {f"{name}.{key}": value for key, value in _defaults(section).items()}
        elif not about.is_required():
            found[name] = about.get_default(call_default_factory=True)
    return found

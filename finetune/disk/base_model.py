"""Identity of the base model: digests of its files, and its config key by key."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.model_folder import ModelFolder, read_object
from finetune.disk.digests import digests
from finetune.errors import Incompatible
from finetune.events import Progress
from finetune.text import shorten

FULL = "full:"  # what a fingerprint of every byte begins with; those of 0.1.0 are of samples
# Beside the weights, what changes a model's results: how texts become tokens, and how weights are to be read. In the
# first, neither the order of keys nor spaces matter; `folder.written` is config.json.
_OBJECTS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "quantize_config.json", "model.safetensors.index.json",
)  # fmt: skip
_BYTES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja",
          "additional_chat_templates/*.jinja")  # fmt: skip
_HARMLESS = {"_name_or_path", "transformers_version", "_commit_hash"}  # of config.json: where it came from
_LONG = 200  # characters of a value that is kept as it is
_SHOWN = 12  # differences


def base_model(folder: ModelFolder) -> Generator[Progress, None, dict[str, Any]]:
    """The base's files by name, each as a digest, and the values of its config. JSON-able.

    Raises BackendError where the folder has no weights, and Incompatible for a file that cannot be read.
    """
    assert folder.shapes  # raises where there are no weights
    patterns = (*_BYTES, *(["*.py"] if folder.remote_code else []))
    beside = sorted(file for pattern in patterns for file in folder.path.glob(pattern))
    try:
        made = yield from digests([*folder.weights, *beside])
        objects = {name: _object(folder.path / name) for name in _OBJECTS if (folder.path / name).exists()}
        generation = folder.path / "generation_config.json"
        asked = _settings(read_object(generation)) if generation.exists() else {}
    except (OSError, ValueError) as error:
        raise Incompatible(f"{folder.path}: cannot be read ({error!s:.200}); download the model again") from None
    named = [file.relative_to(folder.path).as_posix() for file in (*folder.weights, *beside)]
    everything = dict(zip(named, made, strict=True))
    return {
        "weights": {name: everything.pop(name) for name in named[: len(folder.weights)]},
        "files": everything | objects,
        "config.json": _settings(folder.written),
        "generation_config.json": asked,
    }


def fingerprint(base: Mapping[str, Any]) -> str:
    """Of the weights and the config: which base an adapter is for."""
    text = json.dumps([base["weights"], base["config.json"]], sort_keys=True)
    return FULL + hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def base_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every file and every key of a config that differs, in words."""
    lines = [f"base model weights: {line}" for line in _files(saved.get("weights", {}), now.get("weights", {}))]
    lines += _files(saved.get("files", {}), now.get("files", {}))
    for name in ("config.json", "generation_config.json"):
        before, after = saved.get(name, {}), now.get(name, {})
        lines += [
            f"{name}, {key}: the run has {_said(before, key)}, the model now has {_said(after, key)}"
            for key in sorted({*before, *after})
            if (key in before, before.get(key)) != (key in after, after.get(key))
        ]
    return lines


def listed(lines: list[str]) -> list[str]:
    """As many as a person reads, a line each."""
    more = [f"and {len(lines) - _SHOWN} more differences"] if len(lines) > _SHOWN else []
    return [f"  {line}" for line in (*lines[:_SHOWN], *more)]


def _files(saved: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*saved, *now}):
        if name not in now:
            yield f"{name} is gone"
        elif name not in saved:
            yield f"{name} is new"
        elif saved[name] != now[name]:
            yield f"{name} has changed"


def _object(file: Path) -> str:
    """A digest of what a JSON file says."""
    text = json.dumps(read_object(file), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their keys; lists, long texts and numbers that are not finite as short texts."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _settings(value, f"{prefix}{key}.")
        elif key not in _HARMLESS:
            flat[f"{prefix}{key}"] = _short(value)
    return flat


def _short(value: Any) -> Any:
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= _LONG:
        return text
    return f"{text[:40]}... (blake2b {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()})"


def _said(values: Mapping[str, Any], key: str) -> str:
    return shorten(json.dumps(values[key], ensure_ascii=False), 60) if key in values else "no such key"

"""A model folder: its config, tensor shapes and identity, read and checked once and without any framework."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from backends.interface import BackendError, CheckedFolder, LoraSpec, ModelSpec
from backends.untrusted import (
    WEIGHTS,
    Shapes,
    check_claims,
    check_code,
    check_files,
    check_switches,
    needs_code,
    read_object,
    validate,
)

__all__ = ["ModelFolder", "folder_of", "legacy_rope", "read_object", "validate"]

_IN_BLOCK = re.compile(r"\blayers\.(\d+)\.(.+)\.weight$")
_POSITIONS = re.compile(r"\b(wpe|embed_positions|position_embeddings|positions_embed)\.weight$")
_NOT_ADAPTED = re.compile(r"\bexperts\b|\brouter\b|(^|\.)gate$|norm")  # experts are chosen by token, not by layer


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A folder with `config.json` and, but for the reference backend's toys, weights. Make it with `open`."""

    path: Path
    remote_code: bool  # whether Python code that comes with the model may run
    config: dict[str, Any]  # with the rotary settings in both spellings
    weights: Mapping[Path, Shapes]  # the weight files, each with the shapes of its tensors; may be empty
    written: dict[str, Any]  # config.json as it stands
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)  # size and time of the files when opened

    @classmethod
    def open(cls, path: Path, remote_code: bool = False) -> ModelFolder:
        """Reads and checks the folder by the rules of `untrusted`. Raises BackendError where it breaks one."""
        checked = check_files(path)
        written = _read_config(path)
        config = written | _rope_of(path, written)
        check_code(path, config, remote_code)
        weights = {file: checked[file] for file in sorted(path.glob(WEIGHTS))}
        stamps = {file: _stamp(file) for file in (path / "config.json", *weights)}
        folder = cls(path, remote_code, config, weights, written, stamps)
        check_switches(path, (config, folder.text_config))
        if folder.weights:
            check_claims(path, (config, folder.text_config), folder.shapes)
        return folder

    def changed(self) -> Path | None:
        """A file of the model that was changed, replaced or deleted since the folder was opened.

        Weights may be mapped from their files for as long as the model is used.
        """
        return next((file for file, stamp in self.stamps.items() if _stamp(file) != stamp), None)

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model: `text_config` where models are nested."""
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else self.config

    @cached_property
    def shapes(self) -> Shapes:
        """Every tensor's shape by its name. Raises BackendError where the folder has no weights."""
        if not self.weights:
            raise BackendError(f"{self.path}: no {WEIGHTS}; other weight formats are not read")
        return {name: shape for shapes in self.weights.values() for name, shape in shapes.items()}

    @cached_property
    def vocabulary(self) -> int | None:
        """How many tokens the model knows, by its config or else its embeddings; None where neither says."""
        size = self.text_config.get("vocab_size")
        if type(size) is int:
            return size
        embeddings = (shape[0] for name, shape in self.shapes.items() if name.endswith("embed_tokens.weight"))
        return max(embeddings, default=None)

    @cached_property
    def positions(self) -> int | None:
        """How many positions the model has learned embeddings for (GPT-2, OPT); None where it computes them."""
        learned = [shape[0] for name, shape in self.shapes.items() if _POSITIONS.search(name) and len(shape) == 2]
        stated = (self.text_config.get(key) for key in ("max_position_embeddings", "n_positions"))
        return min([*learned, *(count for count in stated if type(count) is int)]) if learned else None

    @cached_property
    def context(self) -> int | None:
        """Tokens of the longest text that the model was made for, by its config; None where that does not say."""
        stated = self.text_config.get("max_position_embeddings")
        rope = self.text_config.get("rope_scaling")
        scaling = rope if isinstance(rope, dict) else {}
        factor, before = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        if type(stated) is not int or stated < 1:
            return None
        if not isinstance(factor, int | float) or not 1 <= factor < 1e6:
            return stated
        # Where the context before the scaling is not said, `stated` is that; else it may be either.
        return max(stated, int(factor * (before if type(before) is int else stated)))

    @property
    def blocks(self) -> int:
        """How many transformer blocks the model has."""
        count = self.text_config.get("num_hidden_layers")
        if type(count) is int:
            return count
        return 1 + max((int(match[1]) for name in self.shapes if (match := _IN_BLOCK.search(name))), default=0)

    @cached_property
    def sampled_fingerprint(self) -> str:
        """What 0.1.0 knew a base by: sha256 over every weight file's size, header and 64 samples of 4 KiB."""
        digest = hashlib.sha256()
        assert self.shapes  # raises where there are no weights
        for file in self.weights:
            size = file.stat().st_size
            digest.update(f"{size}\n".encode())
            with file.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
                digest.update(opened.read(min(header, 100_000_000)))
                for sample in range(64):
                    opened.seek(8 + header + max(0, size - 8 - header - 4096) * sample // 63)
                    digest.update(opened.read(4096))
        return digest.hexdigest()

    def lora_modules(self, lora: LoraSpec) -> dict[str, tuple[int, int]]:
        """Modules to adapt -> (out, in), in the model's order. Every backend adapts exactly these.

        Raises BackendError where a target names no linear layer of the blocks, or nothing is left.
        """
        linear: dict[str, tuple[int, int]] = {}
        blocks: dict[str, int] = {}
        for name, shape in self.shapes.items():
            match = _IN_BLOCK.search(name)
            if match is None or len(shape) != 2 or _NOT_ADAPTED.search(match[2]):
                continue
            module = name.removesuffix(".weight")
            if 0 in shape:
                raise BackendError(f"{self.path}: {name} is empty ({list(shape)})")
            packed = f"{module}.scales" in self.shapes
            linear[module] = (shape[0], shape[1] * (self._packing(module) if packed else 1))
            blocks[module] = int(match[1])
        names = sorted({_leaf(module) for module in linear})
        unknown = [target for target in lora.targets if target not in names]
        if unknown or not linear:
            missing = ", ".join(unknown) or "anything"
            raise BackendError(f"{self.path}: no linear layer named {missing}; there are {', '.join(names) or 'none'}")
        if lora.rank > (most := max(max(shape) for shape in linear.values())):
            raise BackendError(
                f"{self.path}: lora.rank {lora.rank:,}, and its largest layer is {most:,} wide; lower it"
            )
        first = 0 if lora.layers is None else max(blocks.values()) + 1 - lora.layers
        chosen = [m for m in linear if blocks[m] >= first and (not lora.targets or _leaf(m) in lora.targets)]
        return {module: linear[module] for module in sorted(chosen, key=lambda m: (blocks[m], m))}

    def _packing(self, module: str) -> int:
        """How many inputs MLX packs into one word: 32 / bits."""
        quantization = self.config.get("quantization")
        shared = quantization if isinstance(quantization, dict) else {}
        special = shared.get(module)
        bits = (special if isinstance(special, dict) else shared).get("bits", shared.get("bits", 4))
        if bits not in (2, 3, 4, 5, 6, 8):
            raise BackendError(f"{self.path}: config.json says quantization of {bits!r:.20} bits")
        return 32 // int(bits)

    def needs_code(self, why: object) -> BackendError:
        """The refusal of a model that comes with code which the recipe does not allow."""
        return needs_code(self.path, why)


def folder_of(model: ModelSpec) -> CheckedFolder:
    """The folder of a spec, opened here where that was not done before. Raises BackendError."""
    return model.folder or ModelFolder.open(model.path, model.remote_code)


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file; (-1, 0) where there is none."""
    try:
        state = file.stat()
    except OSError:
        return -1, 0
    return state.st_size, state.st_mtime_ns


def _leaf(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / "config.json")
    except (OSError, ValueError) as error:
        raise BackendError(f"{path}: config.json cannot be read ({error!s:.200}); is this a model folder?") from None


def _rope_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in the other spelling.

    transformers 5 writes `rope_parameters`; mlx-lm 0.32 reads `rope_theta` and `rope_scaling` and takes
    a default where they are missing, in silence.
    """
    try:
        return legacy_rope(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise BackendError(f"{path}: rope_parameters in config.json are not valid ({error!s:.200})") from None


def legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The older keys that say what `rope_parameters` says, as mlx-lm 0.32 reads them; for a nested text model too.

    Where layers differ ("full_attention" and "sliding_attention"), mlx-lm reads the second base from
    `rope_local_base_freq` and the pattern from `sliding_window_pattern`.
    """
    text = config.get("text_config")
    nested = {"text_config": text | legacy_rope(text)} if isinstance(text, dict) and legacy_rope(text) else {}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return nested
    if "full_attention" in rope:
        keys = _older_keys(rope["full_attention"])
        local = rope.get("sliding_attention", {}).get("rope_theta")
        kinds = config.get("layer_types") or []
        pattern = {"sliding_window_pattern": kinds.index("full_attention") + 1} if "full_attention" in kinds else {}
        return nested | keys | pattern | ({"rope_local_base_freq": local} if local else {})
    return nested | _older_keys(rope)


def _older_keys(rope: dict[str, Any]) -> dict[str, Any]:
    same = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    keys = {key: rope[key] for key in same if key in rope}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return keys | {"rope_scaling": None if kind == "default" else scaling | {"rope_type": kind, "type": kind}}

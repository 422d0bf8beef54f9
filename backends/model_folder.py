"""A model folder: its config, tensor shapes and identity, read and checked once and without any framework."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from backends.config_keys import completed, rope_of
from backends.formats import (
    TRAINED,
    bitsandbytes_shapes,
    float16_scales,
    quantised_by,
    refuse_format,
    unwritten_method,
)
from backends.interface import BackendError, CheckedFolder, LoraSpec, ModelSpec
from backends.tensor_file import NUMBERS, read_header, read_tensor, read_tensors
from backends.text_blocks import ending, layers_of, no_layers, parts_beside, stack_of, text_only
from backends.untrusted import (
    WEIGHTS,
    Shapes,
    check_claims,
    check_code,
    check_files,
    check_names,
    check_switches,
    files_to_download,
    indexed,
    needs_code,
    read_object,
    used_files,
    validate,
)

__all__ = [
    "NUMBERS", "ModelFolder", "ending", "files_to_download", "folder_of", "read_header", "read_object", "read_tensor",
    "read_tensors", "validate",
]  # fmt: skip

_BITS = (2, 3, 4, 5, 6, 8)
_POSITIONS = re.compile(r"\b(wpe|embed_positions|position_embeddings|positions_embed)\.weight$")


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A folder with `config.json` and, but for the reference backend's toys, weights. Make it with `open`."""

    path: Path
    remote_code: bool  # whether Python code that comes with the model may run
    config: dict[str, Any]  # with the rotary settings in both spellings, and the method of quantised weights
    weights: Mapping[Path, Shapes]  # the weight files, each with the shapes of its tensors; may be empty
    written: dict[str, Any]  # config.json as it stands
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)  # size and time of the files when opened

    @classmethod
    def open(cls, path: Path, remote_code: bool = False, downloaded: bool = True) -> ModelFolder:
        """Reads and checks the folder by the rules of `untrusted`. Raises BackendError where it breaks one.

        downloaded: False: of a model whose weights are not there yet.
        """
        checked = check_files(path, downloaded)
        written = _read_config(path)
        used = used_files(path, written) if downloaded else []
        weights = {path / name: checked[path / name] for name in used}
        check_names(weights)
        names = [name for shapes in weights.values() for name in shapes] if downloaded else indexed(path)
        said = rope_of(path, written) | unwritten_method(path, written, names)
        config = completed(written | said, weights.values())
        check_code(path, config, remote_code)
        stamps = {file: _stamp(file) for file in (path / "config.json", *weights)}
        folder = cls(path, remote_code, config, weights, written, stamps)
        check_switches(path, (written, config, folder.text_config))
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
    def text_shapes(self) -> Shapes:
        """The shapes of the language model's tensors: all, but for towers and heads beside it."""
        return text_only(self.shapes, self.stack)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What of the folder is not used, in words: left-over files, and parts beside the text model."""
        unused = sorted({file.name for file in self.path.glob(WEIGHTS)} - {file.name for file in self.weights})
        files = [f"{self.path}: not part of the model, and not read: {', '.join(unused)}"] if unused else []
        beside = parts_beside(self.shapes, self.stack) if self.weights else []
        parts = [f"the model's {', '.join(beside)}: not part of its language model, and not trained"] if beside else []
        return (*files, *parts)

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
        return count if type(count) is int else 1 + max((block for block, _ in self._layers.values()), default=0)

    @cached_property
    def stack(self) -> str:
        """What the names of the language model's blocks begin with: "model.layers."."""
        size = self.text_config.get("vocab_size")
        return stack_of(self.shapes, size if type(size) is int else None)

    @cached_property
    def _layers(self) -> dict[str, tuple[int, str]]:
        return layers_of(self.shapes, self.stack, self.text_config)

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
        refuse_format(self, TRAINED)
        unpacked = self._unpacked
        linear: dict[str, tuple[int, int]] = {}
        blocks = {module: block for module, (block, _) in self._layers.items()}
        for module in blocks:
            outputs, inputs = unpacked.get(module) or self.shapes[f"{module}.weight"]
            if 0 in (outputs, inputs):
                raise BackendError(f"{self.path}: {module}.weight is empty ({[outputs, inputs]})")
            linear[module] = outputs, self._inputs(module, inputs)
        names = sorted({_leaf(module) for module in linear})
        unknown = [target for target in lora.targets if target not in names]
        if unknown or not linear:
            if not linear:
                raise BackendError(f"{self.path}: {no_layers(self.shapes)}")
            missing = ", ".join(unknown)
            raise BackendError(f"{self.path}: no linear layer named {missing}; there are {', '.join(names)}")
        if lora.rank > (most := max(max(shape) for shape in linear.values())):
            raise BackendError(
                f"{self.path}: lora.rank {lora.rank:,}, and its largest layer is {most:,} wide; lower it"
            )
        first = 0 if lora.layers is None else max(blocks.values()) + 1 - lora.layers
        chosen = [m for m in linear if blocks[m] >= first and (not lora.targets or _leaf(m) in lora.targets)]
        return {module: linear[module] for module in sorted(chosen, key=lambda m: (blocks[m], m))}

    @cached_property
    def _unpacked(self) -> dict[str, tuple[int, int]]:
        """The shapes of layers that bitsandbytes has packed into bytes; empty where it has not."""
        return bitsandbytes_shapes(self.weights) if quantised_by(self.config) == "bitsandbytes" else {}

    @cached_property
    def whole_shapes(self) -> Shapes:
        """The shapes of the model's own tensors; of those that are packed, as they are when they are unpacked."""
        whole = {}
        for name, shape in self.shapes.items():
            module, _, part = name.rpartition(".")
            if ".weight." in name and name.partition(".weight.")[0] in self._unpacked:
                continue  # beside a layer that bitsandbytes has packed
            if part in ("scales", "biases") and f"{module}.scales" in self.shapes:
                continue  # beside one that MLX has
            if part == "weight" and module in self.packed:
                shape = self._unpacked.get(module) or (*shape[:-1], self._inputs(module, shape[-1]))
            whole[name] = shape
        return whole

    @cached_property
    def packed(self) -> frozenset[str]:
        """The layers whose weights stand quantised in the files, by MLX or by bitsandbytes."""
        ends = (".scales", ".weight.absmax")
        return frozenset(name.removesuffix(end) for name in self.shapes for end in ends if name.endswith(end))

    @cached_property
    def float16_scales(self) -> bool:
        """Whether its weights were quantised with scales in float16; in bfloat16 they would not be the same."""
        return quantised_by(self.config) == "mlx-lm" and float16_scales(self.weights)

    def _inputs(self, module: str, columns: int) -> int:
        """The inputs of a linear layer whose weight has so many columns; MLX packs 32 / bits of them into a word."""
        scales = self.shapes.get(f"{module}.scales")
        if scales is None:
            return columns
        quantization = self.config.get("quantization")
        shared = quantization if isinstance(quantization, dict) else {}
        special = shared.get(module)
        settings = shared | (special if isinstance(special, dict) else {})
        bits, group = settings.get("bits", 4), settings.get("group_size", 64)
        if bits not in _BITS:
            raise BackendError(f"{self.path}: config.json says quantization of {bits!r:.20} bits")
        # Layers that differ from the rest are not always named: then the scales tell, of which each group has one.
        if isinstance(group, int) and (stored := columns * 32 / max(scales[-1] * group, 1)) in _BITS:
            bits = int(stored)
        return columns * 32 // int(bits)  # a word holds no whole number of 3, 5 or 6 bits

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

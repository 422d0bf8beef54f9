"""What a model folder says of itself, read without any framework: config, tensor shapes, identity."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.interface import BackendError, LoraSpec
from backends.untrusted import check_claims, check_folder, read_object, validate

_IN_BLOCK = re.compile(r"\blayers\.(\d+)\.(.+)\.weight$")
_NOT_ADAPTED = re.compile(r"\bexperts\b|\brouter\b|(^|\.)gate$|norm")  # experts are chosen by token, not by layer


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, with the rotary settings in both spellings.

    transformers 5 writes `rope_parameters`; mlx-lm 0.32 reads `rope_theta` and `rope_scaling` and takes
    a default where they are missing, in silence. Whichever is there, the other is added.
    """
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise BackendError(f"{folder}: config.json cannot be read ({error!s:.200}); is this a model folder?") from None
    try:
        return config | legacy_rope(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise BackendError(f"{folder}: config.json has rope_parameters that are none ({error!s:.200})") from None


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
        keys = _one_rope(rope["full_attention"])
        local = rope.get("sliding_attention", {}).get("rope_theta")
        kinds = config.get("layer_types") or []
        pattern = {"sliding_window_pattern": kinds.index("full_attention") + 1} if "full_attention" in kinds else {}
        return nested | keys | pattern | ({"rope_local_base_freq": local} if local else {})
    return nested | _one_rope(rope)


def _one_rope(rope: dict[str, Any]) -> dict[str, Any]:
    own = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    keys = {key: rope[key] for key in own if key in rope}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return keys | {"rope_scaling": None if kind == "default" else scaling | {"rope_type": kind, "type": kind}}


def weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BackendError(f"{folder}: no model*.safetensors; other weight formats are not read")
    return files


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, from the safetensors headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= validate(file)
    return shapes


def lora_modules(folder: Path, lora: LoraSpec, remote_code: bool = False) -> dict[str, tuple[int, int]]:
    """Modules to adapt -> (out, in), in the model's order. Every backend adapts exactly these.

    The first thing a backend asks of a folder, so the folder itself is looked at here (`untrusted.check_folder`).
    Raises BackendError when it breaks a rule, a target names no linear layer of the blocks, or nothing is left.
    """
    check_folder(folder, remote_code)
    shapes, config = tensor_shapes(folder), read_config(folder)
    check_claims(folder, config, shapes)
    found: dict[str, tuple[int, int]] = {}
    blocks: dict[str, int] = {}
    for name, shape in shapes.items():
        match = _IN_BLOCK.search(name)
        if match is None or len(shape) != 2 or _NOT_ADAPTED.search(match[2]):
            continue
        module = name.removesuffix(".weight")
        if 0 in shape:
            raise BackendError(f"{folder}: {name} is empty ({list(shape)})")
        packed = f"{module}.scales" in shapes
        found[module] = (shape[0], shape[1] * (_packing(folder, config, module) if packed else 1))
        blocks[module] = int(match[1])
    names = sorted({module.rsplit(".", 1)[-1] for module in found})
    unknown = [target for target in lora.targets if target not in names]
    if unknown or not found:
        missing = ", ".join(unknown) or "anything"
        raise BackendError(f"{folder}: no linear layer named {missing}; there are {', '.join(names) or 'none'}")
    first = 0 if lora.layers is None else max(blocks.values()) + 1 - lora.layers
    chosen = [m for m in found if blocks[m] >= first and (not lora.targets or m.rsplit(".", 1)[-1] in lora.targets)]
    return {module: found[module] for module in sorted(chosen, key=lambda m: (blocks[m], m))}


def _packing(folder: Path, config: Mapping[str, Any], module: str) -> int:
    """How many inputs MLX packs into one word: 32 / bits."""
    quantization = config.get("quantization")
    shared = quantization if isinstance(quantization, dict) else {}
    own = shared.get(module)
    bits = (own if isinstance(own, dict) else shared).get("bits", shared.get("bits", 4))
    if bits not in (2, 3, 4, 5, 6, 8):
        raise BackendError(f"{folder}: config.json says quantization of {bits!r:.20} bits")
    return 32 // int(bits)


def fingerprint(folder: Path) -> str:
    """Identity of the base weights: sha256 over every file's size, header and 64 samples of 4 KiB."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
            digest.update(opened.read(min(header, 100_000_000)))
            for sample in range(64):
                opened.seek(8 + header + max(0, size - 8 - header - 4096) * sample // 63)
                digest.update(opened.read(4096))
    return digest.hexdigest()


def vocabulary_of(model: Path) -> int | None:
    """How many tokens the model knows, by its config or else its embeddings; None where neither says."""
    config = read_config(model)
    text = config.get("text_config")
    said = (text if isinstance(text, dict) else config).get("vocab_size")
    if type(said) is int:
        return said
    embeddings = (shape[0] for name, shape in tensor_shapes(model).items() if name.endswith("embed_tokens.weight"))
    return max(embeddings, default=None)

"""How a model folder's weights are stored: plain numbers, or quantised by a known library."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open

from backends.interface import BackendError
from backends.tensor_file import read_header

_SPELT = {
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "modelopt": "ModelOpt",
}  # fmt: skip
# files beside config.json in which older tools say it, and the names of tensors that tell it too
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_PACKED = {
    ".g_idx": "gptq", ".qweight": "awq", ".weight_packed": "compressed-tensors", ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8",
}  # fmt: skip
_NOTES = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__")
# what some backend trains on; others are read by none
TRAINED = {"mlx-lm", "mxfp4", "mxfp8", "bitsandbytes"}


def bitsandbytes_shapes(weights: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Linear layers that bitsandbytes has packed -> (out, in), as its notes beside the bytes say."""
    shapes: dict[str, tuple[int, int]] = {}
    for file in weights:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if match := _NOTES.match(name):
                    try:
                        outputs, inputs = json.loads(tensors.get_tensor(name).tobytes())["shape"]
                        shapes[match[1]] = int(outputs), int(inputs)
                    except (ValueError, TypeError, LookupError) as error:
                        raise BackendError(f"{file}: {name} cannot be read ({error!s:.100})") from None
    return shapes


def float16_scales(weights: Iterable[Path]) -> bool:
    """Whether there are scales of quantised weights, all of them in float16."""
    headers = (read_header(file)[0] for file in weights)
    kinds = {entry["dtype"] for header in headers for name, entry in header.items() if name.endswith(".scales")}
    return kinds == {"F16"}


def unwritten_method(path: Path, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """`quantization_config` for a config.json that lacks it, or its method; empty where weights are plain numbers.

    names: of the folder's tensors; none where they are not known. They tell more than a file that was left over.
    """
    if quantised_by(config) not in (None, "unknown"):
        return {}
    if isinstance(settings := config.get("compression_config"), dict):  # of compressed-tensors before 0.6
        return {"quantization_config": settings | {"quant_method": "compressed-tensors"}}
    told = [method for end, method in _PACKED.items() if any(name.endswith(end) for name in names)]
    if names and not told:
        return {}
    said = [method for file, method in _BESIDE.items() if (path / file).is_file()]
    method = next(iter((*said, *told)), None)
    return {"quantization_config": {"quant_method": method}} if method else {}


class Described(Protocol):
    """A model folder's path and config."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...


def quantised_by(config: dict[str, Any]) -> str | None:
    """The method that a config names; "mlx-lm" for its own formats; None where weights are plain numbers."""
    if "quantization" in config:
        return "mlx-lm"
    text = config.get("text_config")
    settings = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if not settings:
        return None
    return str(settings.get("quant_method", "unknown")).lower() if isinstance(settings, dict) else "unknown"


def refuse_format(folder: Described, reads: Collection[str], who: str = "", packed: str = "") -> None:
    """Raises BackendError where the weights are quantised by a method that is not among `reads`.

    who: the library that does not read it; "": no backend does. packed: where there are 4-bit models that it reads.
    """
    method = quantised_by(folder.config)
    if method is None or method in reads:
        return
    reason = f"which {who} does not train on" if who else "which is not trained on here"
    remedy = "give the unquantised model (quantize: 4bit makes it small again)" + (f", or {packed}" if packed else "")
    if who and method in TRAINED:
        remedy = "use another backend, or " + remedy
    raise BackendError(
        f"{folder.path}: its weights are already quantised by {_SPELT.get(method, method)}, {reason}; {remedy}"
    )

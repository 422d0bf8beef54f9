"""mlx-lm, which loads adapter folders into its own models. Importing this loads no framework."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from backends.config_sizes import number_of
from backends.formats import quantised_by
from backends.interface import BackendError, CheckedFolder, ModelSpec, Modules, NumberType
from backends.layer_names import Names, Tensors, under
from backends.model_folder import folder_of

NAME = "mlx-lm"
HEADS = False
_LINES = """import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import hf_repo_to_path, load_model
from pathlib import Path

base = Path({base!r})
model, config = load_model(base if base.exists() else hf_repo_to_path({base!r}), lazy=True{config})
{cast}{quantised}model = load_adapters(model, {adapter!r})
model.eval()
"""
ROUTERS = r"gate$|router\b"  # the paths of layers that choose experts, and of gates, which stay unquantised
_CAST = "model.set_dtype(mx.{number_type})\n"
# but for tensors that mlx-lm never casts
_CAST_REST = f"""from mlx.utils import tree_flatten

kept = [(name, x.astype(mx.float32)) for name, x in tree_flatten(model.parameters()) if not model.cast_predicate(name)]
{_CAST}model.load_weights(kept, strict=False)
"""
_QUANTISED = f"""import re


def four_bit(path, layer):
    packable = hasattr(layer, "to_quantized") and not isinstance(layer, nn.Embedding)
    if not packable or re.search(r"{ROUTERS}", path) or layer.weight.shape[-1] % 32:
        return False
    return {{"bits": 4, "group_size": 64 if layer.weight.shape[-1] % 64 == 0 else 32}}


for block in model.layers:
    nn.quantize(block, class_predicate=four_bit)
"""


def names(folder: CheckedFolder, modules: Modules) -> Names:
    """As `layer_names.Library` says."""
    try:
        from backends.mlx_backend.tree import parts_of

        return parts_of(folder, modules)
    except (ImportError, BackendError):
        # a model inside another has that name in mlx-lm, whatever the checkpoint says
        nested = folder.text_config is not folder.config or folder.config["model_type"] != folder.written["model_type"]
        return under("language_model.model.layers." if nested else folder.stack, modules)


def looks_for(folder: CheckedFolder, config: Mapping[str, Any]) -> Tensors:
    """As `layer_names.Library` says."""
    from backends.mlx_backend.tree import looks_for

    return looks_for(folder, config)


def differs(folder: CheckedFolder) -> str:
    """As `layer_names.Library` says: what `rotary`, `time_steps` and `embedding_scale` correct in a session."""
    scaling = folder.text_config.get("rope_scaling") or {}
    if "short_factor" in scaling:
        return "it turns short texts by the factors for long ones"
    if scaling.get("truncate") is False:
        return "it rounds the ends of YaRN's ramp, which this model does not"
    if folder.text_config.get("model_type") == "nemotron_h":
        return "it has no least time step"
    fraction, _ = math.frexp(math.sqrt(number_of(folder.text_config, "hidden_size", 1)))
    if folder.text_config.get("model_type") == "gemma3_text" and fraction * 256 % 1:  # more than bfloat16's 8 bits
        return "in float32 it rounds the scale of embeddings to bfloat16"
    return ""


def lines(model: ModelSpec, base: str, adapter: str, number_type: NumberType, labels: Sequence[str] = ()) -> str:
    """As `layer_names.Library` says."""
    from backends.mlx_backend.tree import build

    folder = folder_of(model)
    packed = model.quantize == "4bit" and quantised_by(folder.config) is None
    whole = folder.config.get("model_file") or not hasattr(build(folder), "cast_predicate")
    # what mlx-lm would not read in the config under the key that stands there
    said = {key: value for key, value in folder.config.items() if folder.written.get(key, ...) != value}
    return _LINES.format(
        base=base,
        adapter=adapter,
        cast=(_CAST if whole else _CAST_REST).format(number_type=number_type),
        config=f", model_config={said!r}" if said else "",
        quantised=_QUANTISED if packed else "",
    )


def whole_lines(folder: CheckedFolder) -> str:
    """As `layer_names.Library` says."""
    return 'from mlx_lm import load\n\nmodel, tokenizer = load(".")\n'

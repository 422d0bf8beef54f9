"""Models in MLX: loading, 4-bit weights, checkpointed blocks, sliding windows."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import _get_classes, load_model

from backends.interface import BackendError, CheckedFolder, ModelSpec
from backends.mlx_backend.library import ROUTERS
from backends.mlx_backend.rotary import as_transformers_rotates
from backends.mlx_backend.time_steps import as_transformers_steps
from backends.mlx_backend.tree import cannot, check_format, check_taken
from backends.model_folder import folder_of

_BITS = 4
_GROUPS = (64, 32)  # the finest scales that the width divides by, starting from the cheapest


def load(spec: ModelSpec, dtype: mx.Dtype) -> tuple[nn.Module, str]:
    """The frozen model in evaluation mode, and its 4-bit scheme.

    Tensors are read, cast and quantised one after another, so no two copies of the model are ever held.
    Raises BackendError for a folder that mlx-lm cannot run as it is.
    """
    model = unread(spec, dtype)
    for module in outside_blocks(model):  # the widest first: they are cast while little else is held
        read(module)
    for block in model.layers:
        read(block)
    return finished(spec, model), scheme_of(spec, model)


def unread(spec: ModelSpec, dtype: mx.Dtype) -> nn.Module:
    """The model as it will be, none of whose tensors is read yet. Raises BackendError as `load` does."""
    folder = folder_of(spec)
    check_format(folder)
    printed = io.StringIO()
    # The folder was checked before: it needs code of its own only where the recipe allows that. mlx-lm 0.31, the
    # last for Python 3.10, has no such parameter.
    trust = {"trust_remote_code": True} if spec.remote_code else {}
    try:
        with contextlib.redirect_stdout(printed):  # mlx-lm prints what it leaves out of a config
            model, loaded = load_model(
                spec.path, lazy=True, model_config=dict(folder.config), **trust, **_reading(folder)
            )
    except Exception as error:
        check_taken(folder)  # what it says of weights without a place names no file
        raise cannot(folder, error) from error
    if printed.getvalue():
        raise BackendError(f"{spec.path}: mlx-lm cannot run this model as it is ({printed.getvalue().strip():.300})")
    cast(model, dtype)
    if spec.quantize == "4bit" and "quantization" not in loaded:
        for block in model.layers:
            nn.quantize(block, bits=_BITS, class_predicate=_quantisation)
        cast(model, dtype)
    return model


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Its numbers in this type, but for those that mlx-lm never casts, such as what is added to experts' scores."""
    may_cast = getattr(model, "cast_predicate", lambda name: True)
    kept = [(n, value.astype(mx.float32)) for n, value in tree_flatten(model.parameters()) if not may_cast(n)]
    model.set_dtype(dtype)
    model.load_weights(kept, strict=False)


def read(module: nn.Module) -> None:
    """Its tensors, one at a time."""
    for _, tensor in tree_flatten(module.parameters()):
        mx.eval(tensor)


def finished(spec: ModelSpec, model: nn.Module) -> nn.Module:
    """The same, once what is to be held of it is read."""
    mx.eval(model.parameters())
    mx.clear_cache()  # of what was cast and quantised
    as_transformers_rotates(model, folder_of(spec).text_config)
    as_transformers_steps(model, folder_of(spec).text_config)
    return model.freeze()


def _reading(folder: CheckedFolder) -> dict[str, Any]:
    """How mlx-lm is told to take exactly the files that are the model; by itself it takes all called model*."""
    if folder.config.get("model_file"):  # a class that comes with the model is not asked for by name
        return {}

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        base, settings = _get_classes(config=config)

        def sanitize(self: Any, _: Any) -> Any:
            weights: dict[str, Any] = {}
            for file in folder.weights:
                weights |= mx.load(str(file))  # type: ignore[arg-type]
            return base.sanitize(self, weights) if hasattr(base, "sanitize") else weights

        return type(base.__name__, (base,), {"sanitize": sanitize}), settings

    return {"get_model_classes": classes}


def outside_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules before and after the blocks that have tensors of their own: embedding, norm, output layer."""
    inside = {id(module) for block in model.layers for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside and not module.children()]


def _quantisation(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """`nn.quantize` settings: linear layers, each expert's among them, and not the choice of experts."""
    packable = hasattr(module, "to_quantized") and not isinstance(module, nn.Embedding)
    if not packable or re.search(ROUTERS, path):
        return False
    groups = [group for group in _GROUPS if module.weight.shape[-1] % group == 0]
    return {"bits": _BITS, "group_size": groups[0]} if groups else False


def scheme_of(spec: ModelSpec, model: nn.Module) -> str:
    """The blocks' quantisation: `none`, `affine4/64`, `mxfp4/32`, or with counts where their linear layers differ.

    Raises BackendError where nothing can be quantised that should be.
    """
    modules = [module for block in model.layers for module in block.modules()]
    quantised = Counter(
        f"{m.mode}{m.bits if m.mode == 'affine' else ''}/{m.group_size}" for m in modules if hasattr(m, "bits")
    )
    total = quantised.total() + sum(hasattr(m, "to_quantized") for m in modules)
    if len(quantised) == 1 and quantised.total() == total:
        return next(iter(quantised))
    if spec.quantize == "4bit" and not quantised:
        raise BackendError(
            f"{spec.path}: 4-bit needs input widths divisible by {_GROUPS[-1]}, and no linear layer has one"
        )
    return ", ".join(f"{kind} ({n} of {total} linear layers)" for kind, n in quantised.most_common()) or "none"


def ignored_window(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """How many tokens a row may have, if mlx-lm ignores the config's sliding window; up to it nothing differs.

    A model of mlx-lm that knows its window has a cache of another type than KVCache. mlx-lm 0.32 ignores the window
    of Mistral, Mixtral, Gemma 2, Phi 3, Starcoder 2, Qwen 2 and 3.
    """
    window = config.get("sliding_window")
    switch = config.get("use_sliding_window", not str(config.get("model_type")).startswith("qwen"))
    kinds = config.get("layer_types") or ["sliding_attention"]
    if not window or not switch or config.get("model_type") == "llama" or "sliding_attention" not in kinds:
        return None
    return int(window) if all(type(cache) is KVCache for cache in make_prompt_cache(model)) else None


def check_window(tokens: int, window: int | None) -> None:
    """Raises BackendError where a row of so many tokens is longer than an ignored window."""
    if window is not None and tokens > window:
        raise BackendError(
            f"a row of {tokens} tokens is longer than this model's sliding window of {window}, which mlx-lm "
            f"ignores; set train.max_length to at most {window}, or use another backend"
        )

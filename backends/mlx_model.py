"""Models in MLX: loading, 4-bit weights, adapters, checkpointed blocks, and a head for chosen positions only."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import SuScaledRoPE
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_model

from backends.interface import BackendError, LoraSpec, ModelSpec
from backends.model_files import legacy_rope, read_config

_BITS = 4
_GROUPS = (64, 32)  # the finest scales that the width divides by, starting from the cheapest


def load(spec: ModelSpec, dtype: mx.Dtype) -> tuple[nn.Module, str]:
    """The frozen model in evaluation mode, and its 4-bit scheme.

    Blocks are read, cast and quantised one after another, so the whole float model is never held
    beside the quantised one. Raises BackendError for a folder that mlx-lm cannot run as it is.
    """
    config = read_config(spec.path)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitsandbytes":
        raise BackendError(f"{spec.path}: quantised by bitsandbytes, which MLX cannot read; give the unquantised model")
    said = io.StringIO()
    # The folder was checked before: it needs code of its own only where the recipe allows that. mlx-lm 0.31, the
    # last for Python 3.10, has no such parameter.
    trust = {"trust_remote_code": True} if spec.remote_code else {}
    try:
        with contextlib.redirect_stdout(said):  # mlx-lm prints what it leaves out of a config
            model, loaded = load_model(spec.path, lazy=True, model_config=legacy_rope(config), **trust)
    except Exception as error:  # whatever a model's own code makes of a config or weights it was not written for
        raise BackendError(f"{spec.path}: mlx-lm cannot load this model ({type(error).__name__}: {error})") from error
    if said.getvalue():
        raise BackendError(f"{spec.path}: mlx-lm cannot run this model as it is ({said.getvalue().strip()})")
    quantise = spec.quantize == "4bit" and "quantization" not in loaded
    for block in model.layers:
        block.set_dtype(dtype)
        if quantise:
            nn.quantize(block, bits=_BITS, class_predicate=_how_to_quantise)
        mx.eval(block.parameters())
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    _use_short_factors(model, loaded)
    model.freeze()
    scheme = _scheme(model)
    if spec.quantize == "4bit" and scheme == "none":
        raise BackendError(
            f"{spec.path}: 4-bit needs input widths divisible by {_GROUPS[-1]}, and no linear layer has one"
        )
    return model, scheme


def _how_to_quantise(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """`nn.quantize` settings; as in bitsandbytes only linear layers, and not the choice of experts."""
    if not isinstance(module, nn.Linear) or path.endswith(("gate", "router")):
        return False
    fitting = [group for group in _GROUPS if module.weight.shape[-1] % group == 0]
    return {"bits": _BITS, "group_size": fitting[0]} if fitting else False


def _scheme(model: nn.Module) -> str:
    """The blocks' quantisation: `none`, `affine4/64`, or with counts where their linear layers differ."""
    modules = [module for block in model.layers for module in block.modules()]
    quantised = Counter(f"{m.mode}{m.bits}/{m.group_size}" for m in modules if hasattr(m, "bits"))
    total = quantised.total() + sum(hasattr(m, "to_quantized") for m in modules)
    if len(quantised) == 1 and quantised.total() == total:
        return next(iter(quantised))
    return ", ".join(f"{kind} ({n} of {total} linear layers)" for kind, n in quantised.most_common()) or "none"


class _LongRope(SuScaledRoPE):  # type: ignore[misc]
    """Rotary embedding with its short factors up to the original length (Ding et al., 2024), as transformers has it.

    mlx-lm takes the long factors at every length.
    """

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        long = x.shape[-2] + offset > self.original_max_position_embeddings
        scaled = x.at[..., : self.dim].multiply(self._scale)
        freqs = self._freqs if long else self._short_freqs
        turned: mx.array = mx.fast.rope(
            scaled, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs
        )
        return turned


def _use_short_factors(model: nn.Module, config: Mapping[str, Any]) -> None:
    scaling = config.get("rope_scaling") or {}
    for module in model.modules():
        if isinstance(module, SuScaledRoPE) and "short_factor" in scaling:
            ratio = mx.array(scaling["short_factor"]) / mx.array(scaling["long_factor"])
            module._short_freqs = module._freqs * ratio
            module.__class__ = _LongRope


class DropoutKeys:
    """Random keys that are a function of seed, step, micro-batch and module alone.

    A checkpointed block draws the same mask again when it is recomputed, which a global random state would not give.
    """

    def __init__(self, seed: int) -> None:
        self._place = (seed, 0, 0)

    def at(self, step: int, micro: int) -> None:
        self._place = (self._place[0], step, micro)

    def key(self, module: int) -> mx.array:
        seed = np.random.SeedSequence((*self._place, module)).generate_state(1, np.uint64)[0]
        key: mx.array = mx.random.key(int(seed))
        return key


class _Dropout(nn.Module):  # type: ignore[misc]
    def __init__(self, rate: float, keys: DropoutKeys, module: int) -> None:
        super().__init__()
        self._keep, self._keys, self._module = 1.0 - rate, keys, module

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self._keep == 1.0:
            return x
        kept = mx.random.bernoulli(self._keep, x.shape, key=self._keys.key(self._module))
        return kept * x * (1.0 / self._keep)


def attach(
    model: nn.Module, modules: Mapping[str, tuple[int, int]], lora: LoraSpec, keys: DropoutKeys
) -> dict[str, LoRALinear]:
    """A LoRA layer round each of `modules` -> (out, in). Raises BackendError for names that MLX's model lacks."""
    there = dict(model.named_modules())
    missing = [name for name in modules if not isinstance(there.get(name), nn.Linear | nn.QuantizedLinear)]
    if missing:
        raise BackendError(f"mlx-lm's model has no linear layers named {', '.join(missing)}")
    adapters: dict[str, LoRALinear] = {}
    for index, name in enumerate(modules):
        parent, _, leaf = name.rpartition(".")
        adapters[name] = LoRALinear.from_base(there[name], r=lora.rank, scale=lora.scale)
        adapters[name].dropout = _Dropout(lora.dropout, keys, index)
        setattr(there[parent], leaf, adapters[name])
    return adapters


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass; in this model only, other models keep their classes."""
    for block in model.layers:
        base = type(block)

        def call(self: Any, *args: Any, base: Any = base, **kwargs: Any) -> Any:
            run = partial(base.__call__, self)
            return nn.utils.checkpoint(self, run)(*args, **kwargs) if self.training else run(*args, **kwargs)

        block.__class__ = type(base.__name__, (base,), {"__call__": call})


class Head:
    """The model's forward pass with only chosen positions reaching the output head."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._positions: mx.array | None = None
        inside = {id(module) for block in model.layers for module in block.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        embeddings = [module for module in outside if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]
        vocabularies = {module.weight.shape[0] for module in embeddings}
        for module in embeddings:
            _pass_through(module, "as_linear", self._choose)
        for module in outside:
            if isinstance(module, nn.Linear | nn.QuantizedLinear) and module.weight.shape[0] in vocabularies:
                _pass_through(module, "__call__", self._choose)

    def logits(self, inputs: mx.array, positions: mx.array, cache: list[Any] | None = None) -> mx.array:
        """float32 [N, vocab] at the flat `positions` [N] of `inputs` [B, T]."""
        self._positions = positions
        try:
            logits: mx.array = self._model(inputs, cache=cache)
            if self._positions is not None:  # an architecture whose head was not recognised
                logits = self._choose(logits)
        finally:
            self._positions = None
        return logits.reshape(-1, logits.shape[-1]).astype(mx.float32)

    def _choose(self, hidden: mx.array) -> mx.array:
        """[B, T, D] -> [1, N, D], once in a forward pass."""
        if self._positions is None:
            return hidden
        positions, self._positions = self._positions, None
        return hidden.reshape(-1, hidden.shape[-1])[positions][None]


def _pass_through(module: nn.Module, method: str, change: Callable[[mx.array], mx.array]) -> None:
    """Put `change` before one instance's `method`."""
    base = type(module)

    def changed(self: Any, x: mx.array) -> Any:
        return getattr(base, method)(self, change(x))

    module.__class__ = type(base.__name__, (base,), {method: changed})

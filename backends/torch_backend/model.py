"""A transformers model from a folder: loaded, frozen, quantised."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from backends.interface import BackendError, ModelSpec
from backends.memory import returning_freed
from backends.model_folder import folder_of
from backends.torch_backend.device import device_kind, half_type, says_no_memory

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels


def load_frozen(spec: ModelSpec, device: torch.device) -> Any:
    """The base model, frozen. Raises BackendError where the folder is not a whole model."""
    folder = folder_of(spec)
    config = folder.config
    if "quantization" in config or "quantization_config" in config:
        kind = (config.get("quantization_config") or {}).get("quant_method", "mlx-lm")
        raise BackendError(f"{spec.path}: already quantised ({kind}), and torch quantises itself; give the original")
    with _quiet(), returning_freed():
        model, info = _loaded(spec, device)
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:  # transformers would fill them with random numbers
        more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
        raise BackendError(f"{spec.path}: weights are missing or misshapen: {', '.join(sorted(missing)[:10])}{more}")
    if spec.checkpointing:
        _recompute_activations(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights on the first evaluation and compute otherwise from then on
            module.support_avx512bf16_for_cpu = False
    model.generation_config = transformers.GenerationConfig()
    return model.requires_grad_(False)


def _loaded(spec: ModelSpec, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says of its weights."""
    dtype = getattr(torch, spec.number_type(device_kind(device), half_type(device)))
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            spec.path,
            config=_without_dropout(spec),
            dtype=dtype,
            device_map={"": device},
            quantization_config=_four_bit(device, dtype) if spec.quantize == "4bit" else None,
            local_files_only=True,
            trust_remote_code=spec.remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (BackendError, MemoryError):
        raise
    except Exception as error:  # a model's own code may fail in many ways on a config or weights not made for it
        if says_no_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise folder_of(spec).needs_code("auto_map in config.json") from None
        kind = type(error).__name__
        raise BackendError(f"{spec.path}: transformers cannot load this model ({kind}: {error!s:.300})") from error
    return model, info


def _recompute_activations(model: Any) -> None:
    # the first name came with a later transformers 5, and the second warns from then on
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def scheme_of(model: Any) -> str:
    """What the frozen linear layers really are, read from the layers themselves."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            # Blocks run over the flattened weight, so the input size need not be a multiple of the block.
            double = " double" if state.nested else ""
            return f"{state.quant_type}/{state.blocksize}{double}"
    return "none"


def _four_bit(device: torch.device, dtype: torch.dtype) -> Any:
    if device.type == "mps":
        raise BackendError("no 4-bit on Apple GPUs with bitsandbytes here; use backend: auto or quantize: none")
    try:
        with _without_kernels():
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise BackendError('4-bit needs bitsandbytes; pip install "recipe-finetune[torch]"') from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _without_dropout(spec: ModelSpec) -> Any:
    """The model's configuration with its own dropouts at zero: only the adapter's input is dropped."""
    config = transformers.AutoConfig.from_pretrained(
        spec.path, local_files_only=True, trust_remote_code=spec.remote_code
    )
    for key, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("_pdrop")):
            setattr(config, key, 0.0)
    config.use_cache = False
    return config


@contextmanager
def _without_kernels() -> Iterator[None]:
    """In here the package `kernels` cannot be imported: bitsandbytes would fetch native code with it, and run it."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no reports where all went well, while a model is loaded."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

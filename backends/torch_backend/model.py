"""A transformers model from a folder: loaded, frozen, quantised."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from backends.formats import quantised_by
from backends.interface import BackendError, CheckedFolder, ModelSpec
from backends.layer_names import refuse_untaken
from backends.memory import returning_freed
from backends.model_folder import folder_of
from backends.torch_backend.device import device_kind, half_type, says_no_memory
from backends.torch_backend.quiet import quiet
from backends.torch_backend.tree import auto_class, cannot, check_format, config_of

for _name in ("bitsandbytes", "transformers.integrations.hub_kernels"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they report optional kernels


LeaveOut = Callable[[Any], None]  # takes parts away from a model that has no weights yet


def load_frozen(spec: ModelSpec, device: torch.device, leave_out: LeaveOut | None = None) -> Any:
    """The base model, frozen. Raises BackendError where the folder is not a whole model.

    leave_out: only what it leaves of the model is read.
    """
    folder = folder_of(spec)
    check_format(folder)
    with quiet(), returning_freed():
        model, info = _loaded(spec, device, leave_out)
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:  # transformers would fill them with random numbers
        more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
        raise BackendError(f"{spec.path}: weights are missing or misshapen: {', '.join(sorted(missing)[:10])}{more}")
    if leave_out is None:
        refuse_untaken(folder, "transformers", info["unexpected_keys"], model.state_dict())
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights on the first evaluation and compute otherwise from then on
            module.support_avx512bf16_for_cpu = False
    model.generation_config = transformers.GenerationConfig()
    return model.requires_grad_(False)


def _loaded(spec: ModelSpec, device: torch.device, leave_out: LeaveOut | None) -> tuple[Any, dict[str, Any]]:
    """The language model, and what transformers says of its weights.

    Beside towers for images or sound, only the text model is loaded where transformers has it as a model of its own.
    """
    dtype, folder = getattr(torch, spec.number_type(device_kind(device), half_type(device))), folder_of(spec)
    whole = _without_dropout(config_of(folder))
    text, packed = _text_model(folder, whole), quantised_by(folder.config) == "bitsandbytes"
    config = whole if text is None else text
    if packed:
        _four_bit(device, dtype)  # raises where bitsandbytes cannot be had
        config.quantization_config = whole.quantization_config | {"bnb_4bit_compute_dtype": str(dtype).split(".")[1]}
    elif quantised_by(folder.config) == "mxfp4":  # its kernels would be fetched from the hub, and have no gradient
        config.quantization_config = whole.quantization_config | {"dequantize": True}
    try:
        kind = auto_class(folder, config) if leave_out is None else _lacking(type(config), leave_out)
        model, info = kind.from_pretrained(
            spec.path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_four_bit(device, dtype) if spec.quantize == "4bit" and not packed else None,
            key_mapping=None if text is None else _renamed(folder.stack),
            local_files_only=True,
            trust_remote_code=spec.remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (BackendError, MemoryError):
        raise
    except Exception as error:
        if says_no_memory(error):
            raise
        raise cannot(folder, error) from error
    if text is None and whole.get_text_config() is not whole:  # the towers are let go
        setattr(model, model.base_model_prefix, model.get_decoder())
    return model, info


def _lacking(config: type, leave_out: LeaveOut) -> Any:
    """The text model's class for such a config, of whose models parts are taken away before weights are read."""
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]

    def init(self: Any, *args: Any, **named: Any) -> None:
        base.__init__(self, *args, **named)
        leave_out(self)

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def _text_model(folder: CheckedFolder, config: Any) -> Any:
    """The config of the text model alone; None where there is no other, or transformers has no class for it."""
    text = config.get_text_config()
    if folder.text_config is folder.config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    text.tie_word_embeddings = bool(folder.text_config.get("tie_word_embeddings", text.tie_word_embeddings))
    return text


def _renamed(stack: str) -> dict[str, str]:
    """From the checkpoint's names of the text model to those that it has alone."""
    before = stack.removesuffix("layers.")
    head = before.removesuffix("model.")
    return {f"^{re.escape(before)}": "model."} | ({f"^{re.escape(head)}lm_head": "lm_head"} if head else {})


def scheme_of(model: Any) -> str:
    """What the frozen linear layers really are, read from the layers themselves.

    Experts are one tensor together, which bitsandbytes leaves as it is: then the share that is quantised is said.
    """
    kind, packed, plain = "none", 0, 0
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            # Blocks run over the flattened weight, so the input size need not be a multiple of the block.
            kind = f"{state.quant_type}/{state.blocksize}{' double' if state.nested else ''}"
            packed += state.shape.numel()
        elif "layers." in name and weight.ndim > 1 and "lora_" not in name:
            plain += weight.numel()
    share = packed / max(packed + plain, 1)
    return kind if kind == "none" or share > 0.99 else f"{kind} ({share:.0%} of the blocks' weights; the rest is not)"


def _four_bit(device: torch.device, dtype: torch.dtype) -> Any:
    if device.type == "mps":
        raise BackendError(
            "4-bit on Apple GPUs with PyTorch was not tried yet, though bitsandbytes has kernels for them since 0.50; "
            "use backend: mlx, or quantize: none"
        )
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


def _without_dropout(config: Any) -> Any:
    """The configuration with the model's own dropouts at zero: only the adapter's input is dropped."""
    for part in {id(one): one for one in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("_pdrop")):
                setattr(part, key, 0.0)
        part.use_cache = False
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

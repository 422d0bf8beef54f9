"""A model's layers in transformers, from its config alone, on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from backends.formats import quantised_by, refuse_format
from backends.interface import HEAD_WEIGHT, BackendError, CheckedFolder, LoraSpec, ModelSpec, Unsupported
from backends.layer_names import Tensors, Tree
from backends.text_blocks import expert_numbers
from backends.torch_backend.quiet import quiet
from backends.usual_families import EXAMPLE

# PEFT refuses these layers in models of these types (peft.tuners.tuners_utils), since they are not called as layers
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_CALLED = {"out_proj", "conv1d"}
# and takes these for layers of experts, wherever they are, in models that transformers converts as these types
# (peft.utils.transformers_weight_conversion)
_OF_EXPERTS = {"qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}, "mixtral": {"gate", "w1", "w2", "w3"}}
_PACKED = "its repository whose name ends in -bnb-4bit"


def config_of(folder: CheckedFolder) -> Any:
    """The model's config as transformers reads it. Raises BackendError."""
    try:
        return transformers.AutoConfig.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=folder.remote_code
        )
    except Exception as error:
        raise cannot(folder, error) from error


def check_format(folder: CheckedFolder) -> None:
    """Raises BackendError where transformers' models of these weights are not trained here."""
    refuse_format(folder, ("bitsandbytes", "mxfp4"), "PyTorch here", _PACKED)
    settings = folder.config.get("quantization_config") or {}
    if quantised_by(folder.config) == "bitsandbytes" and not settings.get("load_in_4bit"):
        raise BackendError(
            f"{folder.path}: its weights are quantised by bitsandbytes to 8 bits, and 4 are trained on here; give the "
            f"unquantised model (quantize: 4bit makes it small again), or {_PACKED}"
        )


def check_type(folder: CheckedFolder) -> None:
    """Raises BackendError where transformers has no text model of the type that the config names."""
    kind = folder.written.get("model_type")
    if folder.remote_code or not isinstance(kind, str):
        return
    if kind in CONFIG_MAPPING:
        _text_class(folder, CONFIG_MAPPING[kind])
    elif "auto_map" in folder.config:
        raise folder.needs_code("auto_map in config.json")
    else:
        raise _no_text_model(folder, kind)


def check_experts(model: ModelSpec, folder: CheckedFolder) -> None:
    """Raises BackendError where 4 bits would leave most of the blocks as they are."""
    experts = expert_numbers(folder.shapes)
    if model.quantize == "none" or not experts:
        return
    share = experts / (experts + sum(out * inputs for out, inputs in folder.lora_modules(LoraSpec(1, 1.0)).values()))
    raise BackendError(
        f"{folder.path}: bitsandbytes does not quantise experts, which are {share:.0%} of this model's blocks; set "
        f"quantize: none, use another backend, or choose a model without experts, such as {EXAMPLE}"
    )


def auto_class(folder: CheckedFolder, config: Any, classes: int = 0) -> Any:
    """The class that loads a text model for this config, or one with a head of so many classes.

    Raises BackendError where transformers has none.
    """
    if classes and (folder.remote_code or type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING):
        return transformers.AutoModelForSequenceClassification
    if classes:
        raise BackendError(f"transformers has no model with a classification head for model_type {config.model_type}")
    return _text_class(folder, type(config))


def _text_class(folder: CheckedFolder, config_class: Any) -> Any:
    """The class that loads a text model for configs of this class. Raises Unsupported where there is none."""
    if folder.remote_code or config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise _no_text_model(folder, config_class.model_type)


def _no_text_model(folder: CheckedFolder, kind: str) -> Unsupported:
    version = transformers.__version__
    return Unsupported(f"{folder.path}: transformers {version} has no model that writes text for model_type {kind}")


def cannot(folder: CheckedFolder, error: Exception) -> BackendError:
    """That transformers cannot load the model. A model's own code may fail in many ways."""
    if "trust_remote_code" in str(error):
        return folder.needs_code("auto_map in config.json")
    return Unsupported(f"{folder.path}: transformers cannot load this model ({type(error).__name__}: {error!s:.300})")


def model_of(folder: CheckedFolder, classes: int = 0) -> Any:
    """The model as users load it, whole, on the meta device; with a head of so many classes. Raises BackendError."""
    config = config_of(folder)
    auto = auto_class(folder, config, classes)
    if classes:
        config.num_labels = classes
    try:
        with quiet(), torch.device("meta"):
            return auto.from_config(config, trust_remote_code=folder.remote_code)
    except Exception as error:
        raise cannot(folder, error) from error


def tree_of(folder: CheckedFolder) -> Tree:
    """Raises BackendError where transformers cannot build the model."""
    model = model_of(folder)
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    decoder = model.get_decoder()
    before = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    stacks = (match[0] for name in linear if (match := re.match(rf"{re.escape(before)}(?:.*?\.)?layers\.", name)))
    return Tree(linear, next(stacks, f"{before}layers."))


def looks_for(folder: CheckedFolder, config: Mapping[str, Any]) -> Tensors:
    """The tensors that PEFT reads for an adapter with this config. Raises BackendError where PEFT would refuse it."""
    check_format(folder)
    classes = len(config["finetune"]["labels"]) if config["task_type"] == "SEQ_CLS" else 0
    model, rank, tensors = model_of(folder, classes), config["r"], {}
    if classes:
        tensors[f"base_model.model.{HEAD_WEIGHT}"] = tuple(model.score.weight.shape)
    for name, module in model.named_modules():
        if not _is_target(name, config):
            continue
        leaf = name.rsplit(".", 1)[-1]
        if leaf in _NOT_CALLED and model.config.model_type in _MAMBA:
            raise BackendError(f"it does not adapt {leaf} in models of type {model.config.model_type}")
        if not isinstance(module, torch.nn.Linear):
            raise BackendError(f"it would adapt {name}, which is no linear layer there but {type(module).__name__}")
        tensors[f"base_model.model.{name}.lora_A.weight"] = (rank, module.in_features)
        tensors[f"base_model.model.{name}.lora_B.weight"] = (module.out_features, rank)
        if config["use_dora"]:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = (module.out_features,)
    _refuse_taken_for_experts(model.config.model_type, tensors)
    return tensors


def _refuse_taken_for_experts(model_type: str, tensors: Tensors) -> None:
    """Raises BackendError where PEFT would adapt experts in the place of layers that these tensors are of."""
    converted_as = conversion_mapping._MODEL_TO_CONVERSION_PATTERN | {"mixtral": "mixtral"}
    known = _OF_EXPERTS.get(converted_as.get(model_type), set())
    layers = (name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors)
    lost = sorted({layer for layer in layers if layer.rsplit(".", 1)[-1] in known})
    if lost:
        leaves, more = sorted({layer.rsplit(".", 1)[-1] for layer in lost}), len(lost) - 1
        raise BackendError(
            f"in models of type {model_type} it takes {', '.join(leaves)} for layers of experts, and does not find "
            f"{lost[0]}{f' and {more} more' if more else ''}; leave these out of lora.targets, or export the run as "
            "one model"
        )


def _is_target(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts the module (peft.tuners.tuners_utils.check_target_module_exists, of names in a list)."""
    targets, blocks, pattern = config["target_modules"], config["layers_to_transform"], config["layers_pattern"]
    if name in targets:
        return True
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    if blocks is None:
        return True
    match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
    return match is not None and int(match[1]) in blocks

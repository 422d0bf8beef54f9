"""PEFT, which loads adapter folders into transformers' models. Importing this loads no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backends.formats import quantised_by
from backends.interface import BackendError, CheckedFolder, ModelSpec, Modules, NumberType
from backends.layer_names import Names, Tensors, matched, under
from backends.model_folder import folder_of

NAME = "PEFT"
HEADS = True
_QUANTISED = """    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.{number_type},
    ),
"""


def names(folder: CheckedFolder, modules: Modules) -> Names:
    """As `layer_names.Library` says."""
    try:
        from backends.torch_backend.tree import tree_of

        return matched(tree_of(folder), modules, "transformers", folder.path)
    except (ImportError, BackendError):
        return under(_stack(folder), modules)


def looks_for(folder: CheckedFolder, config: Mapping[str, Any]) -> Tensors:
    """As `layer_names.Library` says."""
    from backends.torch_backend.tree import looks_for

    return looks_for(folder, config)


def differs(_: CheckedFolder) -> str:
    """As `layer_names.Library` says."""
    return ""


def lines(model: ModelSpec, base: str, adapter: str, number_type: NumberType, labels: Sequence[str] = ()) -> str:
    """As `layer_names.Library` says."""
    from backends.torch_backend.tree import auto_class, config_of

    folder = folder_of(model)
    kind = auto_class(folder, config_of(folder), len(labels)).__name__
    packed = model.quantize == "4bit" and quantised_by(folder.config) is None
    more = ", BitsAndBytesConfig" if packed else ""
    settings = _QUANTISED.format(number_type=number_type) if packed else ""
    trust = "    trust_remote_code=True,\n" if folder.remote_code else ""
    if labels:
        settings += f"    num_labels={len(labels)},\n    id2label={dict(enumerate(labels))!r},\n"
    return (
        f"import torch\nfrom peft import PeftModel\nfrom transformers import {kind}{more}\n\n"
        f"base = {kind}.from_pretrained(\n    {base!r},\n    dtype=torch.{number_type},\n{settings}{trust})\n"
        f"model = PeftModel.from_pretrained(base, {adapter!r}).eval()\n"
    )


def whole_lines(folder: CheckedFolder) -> str:
    """As `layer_names.Library` says."""
    from backends.torch_backend.tree import auto_class, config_of

    kind = auto_class(folder, config_of(folder)).__name__
    trust = ", trust_remote_code=True" if folder.remote_code else ""
    return (
        f"import torch\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained(".", dtype=torch.float32{trust}).eval()\n'
    )


def _stack(folder: CheckedFolder) -> str:
    """What the names of the blocks begin with, as far as transformers says it without a framework.

    Where the text model has a config of its own, it stands alone in a class "...ForCausalLM", and else inside another.
    """
    if folder.text_config is folder.config:
        return folder.stack
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    alone = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(folder.config.get("model_type"))).endswith("ForCausalLM")
    return "model.layers." if alone else "model.language_model.layers."

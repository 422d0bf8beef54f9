"""What a training step keeps for its backward pass, a token and block, at the true shapes of large models.

    python tests/benchmarks/kept.py [--dropout 0.05] [--recompute]

Nothing is computed: blocks run on torch's meta device, forward and backward, while every operation and every piece of
memory is counted. Attention is taken to keep what flash attention keeps: queries, keys, values, its result and a number
per head. The weights are not counted.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from backends.dropout import places
from backends.interface import LoraSpec
from backends.torch_backend.layers import use_own_layers
from backends.torch_backend.lora import LoraLinear, add_adapter
from backends.torch_backend.masks import Dropout
from backends.torch_backend.recompute import recompute_blocks

META = torch.device("meta")
SHAPES: dict[str, Any] = {
    "Llama 8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=64
    ),
    "Qwen3 4B": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=64,
    ),
    "Gemma 3 4B": Gemma3TextConfig(
        hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        vocab_size=64,
    ),
    "Phi-4 mini": Phi3Config(
        hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8, vocab_size=64,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """Of one block: bytes per token, and operations that a GPU would launch a kernel for."""

    kept: float  # after the forward pass
    peak: float  # in the backward pass, beside what other blocks keep
    forward: float
    backward: float

    def __sub__(self, other: Counted) -> Counted:
        names = ("kept", "peak", "forward", "backward")
        return Counted(*(getattr(self, name) - getattr(other, name) for name in names))


class Counter(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations that compute, and the bytes of what they made and what is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.most, self.operations = 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t.untyped_storage() for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        new = [storage for storage in made if storage._cdata not in given | self._known]
        for storage in new:
            self._add(storage)
        in_place = any(argument.alias_info and argument.alias_info.is_write for argument in function._schema.arguments)
        if (new or in_place) and "empty" not in function._schema.name:
            self.operations += 1
        return results

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class _Flash(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    return _Flash.apply(query, key, value), None


def count(config: Any, blocks: int, tokens: int, lora: LoraSpec, recompute: bool = False) -> Counted:
    """Of a model of so many blocks, with micro-batches of `tokens`."""
    AttentionInterface.register("counted", _attention)
    config.num_hidden_layers, config._attn_implementation = blocks, "counted"
    config.layer_types = None if not hasattr(config, "layer_types") else ["full_attention"] * blocks
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()
    modules = {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "layers." in name
    }
    masks = Dropout(lora.dropout, 0, modules, META)
    add_adapter(model, modules, lora, masks)
    use_own_layers(model)
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLinear)):
        layer.siblings.factors(torch.bfloat16)  # cast once per step, and not in each pass
    if recompute:
        recompute_blocks(model, masks, META)
    masks.at(0, places([0], np.zeros(1, int), tokens, 0))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    angles = tuple(torch.empty(1, tokens, head, dtype=torch.bfloat16, device=META) for _ in range(2))
    x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, device=META)
    with Counter() as counter:
        for block in model.model.layers:
            x = block(x, position_embeddings=angles, attention_mask=None)
        kept, forward = counter.bytes, counter.operations
        counter.most = 0
        grad = torch.empty_like(x)
        x.backward(grad)
    return Counted(kept / tokens, counter.most / tokens, forward, counter.operations - forward)


def per_block(config: Any, tokens: int, lora: LoraSpec, recompute: bool = False) -> Counted:
    """The difference that one more block makes; of the peak, what one block needs beside what others keep."""
    two, three = (count(config, blocks, tokens, lora, recompute) for blocks in (2, 3))
    block = three - two
    return Counted(block.kept, three.peak - 3 * block.kept, block.forward, block.backward)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--recompute", action="store_true", help="blocks are computed again in the backward pass")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args(arguments)
    lora = LoraSpec(16, 32.0, dropout=options.dropout)
    print("| model | kept, kB per token and block | beside it in the backward pass | operations forward | backward |")
    print("|---|---|---|---|---|")
    for name, config in SHAPES.items():
        found = per_block(config, options.tokens, lora, options.recompute)
        figures = f"{found.kept / 1e3:.1f} | {found.peak / 1e3:.1f} | {found.forward:.0f} | {found.backward:.0f}"
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()

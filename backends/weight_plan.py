"""Memory of the frozen weights, held whole or streamed."""

from __future__ import annotations

from backends.predictions import MXFP4, Architecture, Costs


def weight_bytes(architecture: Architecture, quantize: str, number: int, costs: Costs) -> float:
    """Of all frozen weights in memory; `number`: bytes of one that is not quantised."""
    if architecture.quantised:
        return float(architecture.stored)
    return _in_blocks(architecture, quantize, number, costs) + architecture.other * number


def streamed_bytes(architecture: Architecture, quantize: str, number: int, costs: Costs, frozen: int) -> float:
    """Of a model whose first `frozen` blocks are read when they compute: what is held, and the largest part of those.

    An embedding that is not the output layer too is such a part.
    """
    of_block = _in_blocks(architecture, quantize, number, costs) / architecture.blocks
    embedding = architecture.embedding * float(number)
    held = weight_bytes(architecture, quantize, number, costs) - frozen * of_block - embedding
    return held + max(of_block, embedding)


def frozen_file_bytes(architecture: Architecture, frozen: int) -> float:
    """Of the weight files, what is read in a pass through the frozen blocks; the rest is held."""
    inside = architecture.linear + architecture.experts
    share = inside / max(inside + architecture.other, 1)
    return architecture.stored * share * frozen / architecture.blocks


def _in_blocks(architecture: Architecture, quantize: str, number: int, costs: Costs) -> float:
    """Of all blocks; of weights that stand quantised in the files as much as 4 bits take, if not more."""
    packed = costs.four_bit_weight.bytes(number)
    if architecture.quantised:
        return min(float(architecture.stored), architecture.linear * packed)
    of_linear = packed if quantize == "4bit" else float(number)
    of_expert = of_linear if costs.packs_experts else float(number)
    if architecture.experts_packed and costs.packs_experts:
        of_expert = MXFP4
    return architecture.linear * of_linear + architecture.experts * of_expert

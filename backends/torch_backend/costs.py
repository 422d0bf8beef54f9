"""What PyTorch with bitsandbytes needs of memory and time. Loads none of them: predictions need no torch.

Measured with torch 2.13, transformers 5.23 and Python 3.11 on Linux. A GPU's rate is assumed.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from backends.interface import Device, LoraSpec, Modules, NumberType, Wanted
from backends.matmul_speed import SIZES, operations_per_second
from backends.predictions import (
    A_NUMBER,
    ATTENTION,
    DELTA_RULE,
    FROZEN_BLOCKS,
    HEAD,
    LORA,
    NOTHING,
    SHARED_PREFIXES,
    Architecture,
    Costs,
    Elementwise,
    Machine,
    Recurrence,
    Size,
    cuda_libraries,
)
from backends.streaming import STREAMED

NORMS = "own norms"
GATED_LAYERS = "own gated layers"
ROTARY = "own rotary positions"
RECOMPUTED = "blocks computed again"
KERNELS = "own kernels by Triton"
DELTA_KERNEL = "gated delta rule by flash-linear-attention"
SHORTCUTS = (
    SHARED_PREFIXES, FROZEN_BLOCKS, HEAD, LORA, NORMS, GATED_LAYERS, ROTARY, ATTENTION, DELTA_RULE, DELTA_KERNEL,
    RECOMPUTED, STREAMED, KERNELS,
)  # fmt: skip

MACHINES = (
    Machine("RTX 4060, 8 GB", 7.6 * 2**30, 30e12, "NVIDIA: 15 shader TFLOPS, twice that in bf16"),
    Machine("RTX 4070, 12 GB", 11.5 * 2**30, 58e12, "NVIDIA: 29 shader TFLOPS, twice that in bf16"),
    Machine("RTX 4090, 24 GB", 23.5 * 2**30, 165e12, "NVIDIA Ada whitepaper: 165 TFLOPS bf16, dense"),
)


def saved(architecture: Architecture, adapted: Modules, lora: LoraSpec, number: int) -> float:
    """Counted by hand, and by tests/benchmarks/kept.py: the norms' inputs, what attention needs, gate and up.

    What a norm makes is made again in the backward pass, and so are dropout's masks, of a word per token and layer.
    Where the whole model trains, autograd keeps the inputs of all layers: each norm's before its weight and after it,
    and what the gated layer makes of gate and up.
    """
    if lora.whole:
        own, hidden = 2.0 * architecture.head_norms, 6.0 + 4.0 * architecture.norms_after
        queries, keys = (3.0 + own) * architecture.queries, (2.0 + own) * architecture.keys
        return (hidden * architecture.hidden + queries + keys + 4.0 * architecture.inner) * number
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    # the norms' inputs; queries, keys and values, and the attention's result
    hidden, queries, keys = 2.0 + 2.0 * architecture.norms_after, 2.0, 2.0
    inner = 2.0 if "down_proj" in leaves else 3.0  # gate and up; without an adapter also their product's factor
    # what a norm of heads reads, or values that are a part of the layer which makes queries and keys too (Phi)
    again = architecture.head_norms or any(name.endswith(".qkv_proj") for name in architecture.modules)
    queries, keys = queries + again, keys + again
    wide = hidden * architecture.hidden + queries * architecture.queries + keys * architecture.keys
    words = 4.0 * len(adapted) / architecture.blocks if lora.dropout else 0.0
    return (wide + inner * architecture.inner + lora.rank * len(leaves)) * number + words


def recurrent(recurrence: Recurrence, number: int) -> float:
    """Of transformers' chunks of 64 tokens, read off what autograd saves: float32 copies for each value head, four
    matrices [64, 64] and the state of every chunk. flash-linear-attention's kernels save less."""
    of_head = recurrence.keys * (20 + 6 * number) + recurrence.values * (24 + 4 * number) + 4 * 4 * 64
    states = 4 * recurrence.keys * recurrence.values / 64
    shared = recurrence.key_heads * recurrence.keys * 8 * (number - 1)  # before the convolution
    return float(recurrence.heads * (of_head + states) + shared)


_CPU = Costs(
    device="cpu",
    runtime=490e6 + cuda_libraries(),
    saved=saved,
    scores={"softcap": Size(8.0), "sinks": A_NUMBER},  # eager attention: tanh and softmax; softmax
    recurrent=recurrent,
    reached=0.95,
    host=0.45e-3,  # two threads that wait for each other at each product (tests/benchmarks/README.md, "Predicted time")
    four_bit_host=1.6,
    unpacking=80.0,
    masking=480.0,  # the products with A that layers of one input do not share then counted in
    spread=Elementwise(number=190.0, score=360.0, logit=120.0, weight=75.0),
    update=13.0,  # a checkpoint copies weights and moments, 12; an update makes the weights anew, in groups: 6
    whole_update=8.0,  # a checkpoint's copy, 12, when the gradient, 4, is gone
    held=1.5,  # glibc keeps what lies freed between the tensors that stay: 1.4 to 1.6
    whole_held=1.2,
    tokens_at_once=1024,  # more are no faster on a CPU, and need more memory
    logits_at_once=2**23,
    recomputed_blocks=2.0,  # one block's own, and what is still there of the last one's
    streams=True,
    four_bit="NF4 with double quantisation (bitsandbytes)",
    four_bit_runtime=50e6,
    # 4 bits, a scale of 8 bits for 64 weights, and one of 32 bits for 256 of those scales
    four_bit_weight=Size(0.5 + 1 / 64 + 4 / (64 * 256)),
    unpacked_weight=Size(12.0),  # bitsandbytes makes indices of 32 bits and float32 of it on the way
    bfloat16_products=1e5,  # what oneDNN keeps of its last products, and what lies between them
    maps_files=True,
    quantising=16.0,
)
NVIDIA = replace(
    _CPU,
    device="gpu",
    update=6.0,  # a checkpoint's copy lies beside it, in the machine's memory
    whole_update=0.0,  # weights anew, 4; the best ones lie there too
    average=0.0,  # and so does the average
    runtime=450e6,
    reached=0.35,  # assumed
    unpacking=0.0,
    masking=0.0,
    spread=NOTHING,
    four_bit_host=1.0,
    host=0.6e-3,  # an H200's host: 0.5 to 0.7 a layer of an answer's token, 1.7 to 2.2 of a step; desktops are faster
    held=1.1,
    whole_held=None,
    gated_working=2.0,  # the other two in place, by tests/benchmarks/kept.py
    tokens_at_once=None,
    logits_at_once=2**25,  # a fourth of the chunks, each of which costs the host a dozen operations
    recomputed_blocks=1.0,  # measured on an H200: 0.94 to 1.09 of what was reserved, with all else here
    parked_inputs=3,  # one that is used, one that comes, and one that goes
    four_bit_runtime=0.0,
    unpacked_weight=Size(fixed=0.25, numbers=1.0),  # a kernel writes it at once; beside it scales
    bfloat16_products=0.0,
    expands_keys=True,
    maps_files=False,
)
# Its memory is the machine's: nothing is copied out of the way. torch's kernels for Metal have no gradient, so that in
# training attention is plain products there, with all weights in float32.
APPLE = replace(NVIDIA, parked_inputs=None, whole_update=8.0, average=4.0, scores={**_CPU.scores, "": Size(4.0)})
COSTS: dict[Device, Costs] = {"cpu": _CPU, "gpu": APPLE if sys.platform == "darwin" else NVIDIA}


def measured_rate(number_type: NumberType, device: Wanted = "auto") -> float:
    """Floating-point operations per second of torch's matrix products here."""
    import torch

    from backends.torch_backend.device import device_kind, pick_device

    picked = pick_device(device)
    rows, width = SIZES[device_kind(picked)]
    dtype = getattr(torch, number_type)
    x = torch.ones(rows, width, dtype=dtype, device=picked)
    weight = torch.full((width, width), 1 / width, dtype=dtype, device=picked)
    return operations_per_second(x, weight, lambda y: y[0, 0].item())

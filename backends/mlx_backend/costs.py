"""MLX's memory and time costs. Does not import MLX: a MacBook can be predicted anywhere.

Measured with MLX 0.32 and Python 3.11 on a Linux CPU. On a GPU nothing was measured yet.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from backends.interface import Device, LoraSpec, Modules, NumberType, Wanted
from backends.matmul_speed import SIZES, numpy_rate, operations_per_second
from backends.predictions import (
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

NUMPY_PRODUCTS = "numpy products (BLAS bridge)"
SHORTCUTS = (SHARED_PREFIXES, FROZEN_BLOCKS, HEAD, LORA, ATTENTION, DELTA_RULE, NUMPY_PRODUCTS, STREAMED)

MACHINES = (
    Machine("MacBook M1, 8 GB", 5.33 * 2**30, 2.6e12, "Apple, 10 November 2020: 2.6 TFLOPS; Metal gives 2/3"),
    Machine("MacBook M2, 16 GB", 10.67 * 2**30, 3.6e12, "Apple, 6 June 2022: 3.6 TFLOPS; Metal gives 2/3"),
)


def saved(architecture: Architecture, adapted: Modules, lora: LoraSpec, number: int) -> float:
    """MLX's tape holds every result, also those that the formulas do not need; read off its peak."""
    sizes = 6 * architecture.queries + 4 * architecture.keys + 3 * architecture.inner
    sizes += (8 + 2 * architecture.norms_after) * architecture.hidden
    ranks = 0 if lora.whole else lora.rank * len({name.rsplit(".", 1)[-1] for name in adapted})
    return float((sizes + ranks) * number)


def saved_at_once(architecture: Architecture, adapted: Modules, lora: LoraSpec, number: int) -> float:
    """Where numpy computes the products while MLX traces: all that led to them stays too. Read off the peak."""
    return saved(architecture, adapted, lora, number) * (2.5 if number == 4 and sys.platform == "linux" else 1.0)


def recurrent(recurrence: Recurrence, number: int) -> float:
    """Of one token: the convolution's steps over queries, keys and values, their norms, and the gated result;
    read off the peak of tiny models."""
    keys, values = recurrence.key_heads * recurrence.keys, recurrence.heads * recurrence.values
    return float((6 * keys + 8 * values) * number)


def recurrent_working(recurrence: Recurrence, tokens: int) -> float:
    """Of the gradient of 256 tokens in chunks of 32, in float32: five states of each chunk, and what is beside them."""
    keys, values = recurrence.keys, recurrence.values
    of_token = 5 * keys * values / 32 + 8 * (keys + values) + 10 * 32
    return 4.0 * recurrence.heads * min(tokens, 256) * of_token


_CPU = Costs(
    device="cpu",
    runtime=410e6 + cuda_libraries(),  # transformers loads torch where it is there
    saved=saved_at_once,
    scores={"softcap": Size(numbers=2.0), "sinks": Size(numbers=2.0)},  # tanh and softmax; softmax with sinks, without
    recurrent=recurrent,
    recurrent_working=recurrent_working,
    reached=1.0,  # numpy's products; what is beside them follows (tests/benchmarks/README.md, "Predicted time")
    host=0.45e-3,
    unpacking=330.0,
    masking=200.0,
    elementwise=Elementwise(number=5.7e-9, score=88e-9, logit=21e-9),  # by one thread, however many there are
    held=1.05,
    widest_update=20.0,  # the clipped gradient, its square, both corrected moments and the quotient
    whole_sum=4.0,
    tokens_at_once=512,  # more are no faster on a CPU, and need more memory
    logits_at_once=2**22,
    streams=True,
    packs_experts=True,
    four_bit="MLX's affine 4-bit, groups of 64",
    four_bit_weight=Size(0.5, numbers=2 / 64),  # 4 bits, and a scale and a bias for 64 weights
)
_GPU = replace(
    _CPU,
    device="gpu",
    runtime=100e6,
    saved=saved,
    reached=0.35,  # assumed, as that nothing is beside the products
    host=0.0,
    unpacking=0.0,
    masking=0.0,
    elementwise=NOTHING,
    held=1.1,
    widest_update=0.0,  # compiled to one kernel
    tokens_at_once=None,
    few_widths=True,  # MLX gives a freed buffer only to an array of nearly its size: few sizes leave less unused
    logits_at_once=2**24,  # MLX's GPUs are slow where they read the head for few positions
)
COSTS: dict[Device, Costs] = {"cpu": _CPU, "gpu": _GPU}


def measured_rate(number_type: NumberType, device: Wanted = "auto") -> float:
    """Floating-point operations per second of MLX's matrix products here, or of numpy's where it uses those."""
    import mlx.core as mx

    on_cpu = device == "cpu" or mx.default_device() == mx.Device(mx.cpu)
    kind: Device = "cpu" if on_cpu else "gpu"
    rows, width = SIZES[kind]
    if on_cpu and number_type == "float32" and sys.platform != "darwin":
        return numpy_rate()
    dtype = getattr(mx, number_type)
    with mx.stream(mx.cpu if on_cpu else mx.gpu):
        x, weight = mx.ones((rows, width), dtype), mx.full((width, width), 1 / width, dtype)
        return operations_per_second(x, weight, mx.eval)

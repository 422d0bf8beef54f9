"""Compiles our own kernels for NVIDIA's cards of these compute capabilities: `python tests/compile_kernels.py 75 89`.

No card is needed. An error of Triton's ends it, and so does a kernel that needs more fast memory than a card has.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from backends.torch_backend import triton_elementwise, triton_head, triton_products
from backends.torch_backend.masks import Mask

BYTES, WORDS = ("packed", "scales"), ("keys", "features")
FLOATS = ("code", "group_scales", "group_offsets", "levels", "inverse_rms", "shares", "losses")
HALVES = ("x", "factor", "out", "low", "gate", "up", "grad", "grad_up", "cos", "sin", "weight", "logits")
NUMBERS = ("scale", "eps", "added", "cap")
# NVIDIA, "CUDA C++ Programming Guide", technical specifications: shared memory of a block
FAST_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


class Launches:
    """In the place of `launch`: takes down what each kernel is launched with."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[Any, list[Any], dict[str, Any], dict[str, Any]]] = {}

    def __call__(
        self, kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, relied_on: Any, **tuning: Any
    ) -> None:
        tiles = " ".join(f"{name} {value}" for name, value in constants.items())
        self.seen[f"{kernel.__name__}, {tiles}"] = kernel, [*tensors, *numbers], constants, tuning


def launches() -> Launches:
    """Of every kernel with the tiles of narrow and wide layers and ranks; tensors of no memory stand in."""
    seen = Launches()
    triton_products.launch = triton_elementwise.launch = triton_head.launch = seen  # type: ignore[assignment]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    for width, rank in ((2048, 48), (16384, 16)):
        x, weight, low, factor = empty(1024, width), empty(width), empty(1024, rank), empty(rank, width)
        mask = Mask(empty(1024), empty(width // 2), width, -100) if rank == 48 else None
        triton_products.down(low, x, factor.T, 1.0, mask)
        triton_products.add_up(x, low, factor, mask)
        triton_products.gradient(torch.empty(rank, width, device="meta"), low, x, mask)
        inverse_rms = triton_elementwise.rms_norm(x, weight, 1e-6, 1.0)[1]
        triton_elementwise.rms_norm_back(x, weight, inverse_rms, x, 1.0)
    for second in (False, True):
        triton_head.cross_entropy(empty(16, 128256), empty(16), empty(16), 1.0, 30.0 if second else None)
        triton_elementwise.gated(x, x, second)
        triton_elementwise.gated_back(x, x, x, x, second)
        triton_elementwise.rotate(empty(1, 32, 512, 128), empty(1, 1, 512, 128), empty(1, 1, 512, 128), second)
    triton_products.unpack(x, x, x, x, (x, x), x, 64)
    return seen


def source(kernel: Any, given: list[Any], constants: dict[str, Any], half: str) -> ASTSource:
    """What Triton would compile for such a launch: numbers of 1 and multiples of 16 are known to it."""
    types, known, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        types[name] = kind(kernel.__name__, name, half, constants)
        number = given[place] if place < len(given) else None
        if types[name] == "i32" and number == 1:
            types[name], known[name] = "constexpr", 1
        elif types[name].startswith("*") or (types[name] == "i32" and number % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, known, attributes)


def kind(kernel: str, argument: str, half: str, constants: dict[str, Any]) -> str:
    """The type of a kernel's argument, as Triton writes it."""
    if argument in constants:
        return "constexpr"
    if argument in FLOATS or (kernel, argument) == ("_gradient", "out"):
        return "*fp32"
    if argument in BYTES:
        return "*u8"
    if argument in WORDS:
        return "*i32"
    if argument == "targets":
        return "*i64"
    return f"*{half}" if argument in HALVES else "fp32" if argument in NUMBERS else "i32"


def main() -> None:
    seen = launches().seen
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        # before 8.0 float16 is usual, and models that outgrow it are in bfloat16 there too
        for half in ("fp16", "bf16") if capability < 80 else ("bf16",):
            for name, (kernel, given, constants, tuning) in seen.items():
                made = compile(source(kernel, given, constants, half), target=target, options=tuning)
                share = made.metadata.shared / FAST_MEMORY[capability]
                print(f"{capability / 10}, {half}: {name}: {share:.0%} of the fast memory", flush=True)
                assert share <= 1, "a kernel needs more fast memory than such a card has"


if __name__ == "__main__":
    main()

"""Compiles our own kernels for NVIDIA's cards of these compute capabilities: `python tests/compile_kernels.py 75 89`.

No card is needed. An error of Triton's ends it.
"""

from __future__ import annotations

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from backends.torch_backend import triton_kernels

BYTES = ("packed", "scales")
FLOATS = ("code", "group_scales", "group_offsets", "levels")
HALVES = ("x", "factor", "out", "low", "gate", "up", "grad", "grad_up", "cos", "sin")
CONSTANTS = {
    "BN": 32, "BM": 64, "BR": 16, "BLOCK": 1024, "SHARING": 32, "HALF": 64, "HEADS": 32, "WIDTH": 64, "BACK": True,
}  # fmt: skip


def kind(kernel: str, argument: str, half: str) -> str:
    """The type of a kernel's argument, as Triton writes it."""
    if argument in CONSTANTS:
        return "constexpr"
    if argument in FLOATS or (kernel, argument) == ("_gradient", "out"):
        return "*fp32"
    if argument in BYTES:
        return "*u8"
    return f"*{half}" if argument in HALVES else "fp32" if argument == "scale" else "i32"


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        # before 8.0 float16 is usual, and models that outgrow it are in bfloat16 there too
        for half in ("fp16", "bf16") if capability < 80 else ("bf16",):
            compile_all(capability, half)


def compile_all(capability: int, half: str) -> None:
    for name in ("_down", "_add_up", "_gradient", "_unpack", "_swiglu", "_swiglu_back", "_rotate"):
        kernel = getattr(triton_kernels, name)
        types = {argument: kind(name, argument, half) for argument in kernel.arg_names}
        constants = {argument: CONSTANTS[argument] for argument in types if argument in CONSTANTS}
        compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32))
        print(f"compute capability {capability / 10}, {half}: {name}", flush=True)


if __name__ == "__main__":
    main()

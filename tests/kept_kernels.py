"""Whether a kernel that was kept is the one that Triton chooses for such arguments; without a card, and nothing runs.

`python tests/kept_kernels.py CASES`: calls of our kernels with sizes, strides and addresses of many kinds. Triton is
given a card that is not there, and compiles for it. The keys by which kernels are kept must tell apart what it does.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Hashable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from backends.torch_backend import triton_kernels, triton_launch
from backends.torch_backend.masks import Mask


class NoCard:
    """A driver that loads nothing and launches nothing."""

    utils = property(lambda self: self)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**18}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 0, 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None


class Watched(dict[Hashable, Any]):
    """Never gives a kernel back, so that Triton chooses each time, and wants the same choice for the same key."""

    again = 0

    def get(self, key: Hashable, default: Any = None) -> None:
        return None

    def __setitem__(self, key: Hashable, chosen: Any) -> None:
        before = super().setdefault(key, chosen)
        assert before is chosen, f"two kernels for one key: {key}"
        self.again += 1


def case(draw: random.Random) -> None:
    dtype, rank = draw.choice([torch.bfloat16, torch.float16]), draw.choice([1, 8, 48])
    rows, width = draw.choice([1, 16, 515]), draw.choice([264, 256])
    low = torch.zeros(rows, draw.choice([rank, 64]), dtype=dtype)[:, :rank]
    factor = torch.zeros(rank, width, dtype=dtype) if draw.random() < 0.5 else torch.zeros(width, rank, dtype=dtype).T
    wider = torch.zeros(rows, width + draw.choice([16, 3]), dtype=dtype)
    for start in (0, 1):  # the second address is no multiple of 16
        x = wider[:, start : start + width]
        words = [torch.zeros(size + start, dtype=torch.int32)[start:] for size in (rows, width // 2)]
        mask = draw.choice([None, Mask(words[0], words[1], width, draw.choice([16, 7]))])
        triton_kernels.down(low, x, factor.T, 0.5, mask)
        triton_kernels.add_up(x, low, factor, mask)
        triton_kernels.gradient(torch.empty(rank, width), low, x, mask)
    flat = torch.zeros(rows, width, dtype=dtype)
    gelu = draw.random() < 0.5
    triton_kernels.gated(flat, flat, gelu)
    triton_kernels.gated_back(flat, flat, flat, flat, gelu)
    _, inverse_rms = triton_kernels.rms_norm(flat, flat[0], 1e-6, 1.0)
    triton_kernels.rms_norm_back(flat, flat[0], inverse_rms, flat, 1.0)
    targets, shares = torch.zeros(rows, dtype=torch.long), torch.zeros(rows)
    triton_kernels.cross_entropy(flat, targets, shares, 1.0, draw.choice([None, 2.0]))
    heads = torch.zeros(2, rows, draw.choice([1, 4]), 64, dtype=dtype).transpose(1, 2)
    angles = torch.zeros(draw.choice([1, 2]), 1, rows, 64, dtype=dtype)
    triton_kernels.rotate(heads, angles, angles, draw.random() < 0.5)


def main() -> None:
    driver.set_active(NoCard())
    watched = triton_launch._COMPILED = Watched()
    draw = random.Random(0)
    for _ in range(int(sys.argv[1])):
        case(draw)
    assert watched.again > len(watched) // 2, "few keys came twice"
    print(f"{watched.again} launches, {len(watched)} keys, one kernel each")


if __name__ == "__main__":
    main()

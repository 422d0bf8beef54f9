"""Training through Qwen3.5's recurrence on MLX's CPU: in chunks, beside mlx-lm's loop over tokens.

    python -m tests.benchmarks.recurrence [TOKENS]

Forward and backward in float32, in turns; medians of CPU seconds on one thread, and the peak of memory beside the
inputs. "own products" run over OpenBLAS where it can be put before the reference BLAS of MLX's Linux wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import mlx.core as mx

from backends.mlx_backend import blas_bridge
from backends.mlx_backend.delta_rule import delta_rule
from tests.benchmarks.openblas import preload
from tests.unit.test_delta_rule import Arrays, Rule, by_token, inputs

HEADS = [(8, 8), (16, 16), (16, 32)]  # of keys and of values; Qwen3.5 has 16 and 16 to 64, of 128 x 128
TURNS = 5


def measured(rule: Rule, given: Arrays) -> tuple[float, float]:
    """CPU seconds and peak megabytes of one forward and backward pass."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, began = mx.get_active_memory(), time.process_time()
    mx.eval(mx.grad(lambda *x: (rule(*x)[0] ** 2).sum(), argnums=range(5))(*given))
    return time.process_time() - began, (mx.get_peak_memory() - before) / 1e6


def median_of(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def row(name: str, rule: Rule, tokens: int, heads: tuple[int, int]) -> str:
    given = inputs(1, tokens, *heads, 128, 128)
    mx.eval(given)
    turns = [(measured(rule, given), measured(by_token, given)) for _ in range(TURNS)]
    (ours, memory), (loop, of_loop) = (median_of([turn[which] for turn in turns]) for which in (0, 1))
    ratio = median(other[0] / one[0] for one, other in turns)
    sizes = f"{memory:,.0f} | {of_loop:,.0f}"
    return f"| {heads[0]}, {heads[1]} | {name} | {ours:.2f} | {loop:.2f} | {ratio:.1f} | {sizes} |"


def rows(own: bool, tokens: int) -> None:
    blas_bridge.ENABLED = blas_bridge.ENABLED and not own
    for heads in HEADS:
        print(row("own products" if own else "as it runs here", delta_rule, tokens, heads), flush=True)


def main() -> None:
    """Each kind of products in a process of its own: a BLAS is chosen when a process starts."""
    if len(sys.argv) == 3:
        return rows(sys.argv[2] == "own", int(sys.argv[1]))
    tokens = sys.argv[1] if len(sys.argv) > 1 else "512"
    print(
        "| heads of keys, of values | chunks | CPU s | loop, CPU s | ratio | MB | loop, MB |\n|" + "---|" * 7,
        flush=True,
    )
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        library = preload(Path(folder))
        for kind in ("here", "own"):
            over = {"LD_PRELOAD": str(library)} if library and kind == "own" else {}
            command = [sys.executable, "-m", "tests.benchmarks.recurrence", tokens, kind]
            subprocess.run(command, env=os.environ | one | over, check=True)
    return None


if __name__ == "__main__":
    main()

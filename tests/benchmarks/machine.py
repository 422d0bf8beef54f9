"""What a table must say of the machine it was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_FLAGS = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "peft", "trl", "bitsandbytes", "numpy")


def machine(threads: int) -> str:
    """Processor, cores, memory and versions in one line."""
    cores = f"{os.cpu_count()} cores, {threads} threads"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    system = f"{platform.system()}; Python {platform.python_version()}"
    return f"{_processor()}, {cores}, {memory:.0f} GiB, {system}, {versions}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor() or platform.machine()
    lines = information.read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return ", ".join([name, *(words for flag, words in _FLAGS.items() if flag in flags)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

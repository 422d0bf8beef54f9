"""Who is compared with whom: ourselves, and the rivals in their usual settings. Imports none of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

NOBODY = "none"
PREFIX = ("layers",)  # workloads for ourselves with and without the kept activations of frozen blocks
QUANTISED = ("nf4",)


@dataclass(frozen=True)
class Contender:
    """One program in one setting. Those of the same kind are compared."""

    key: str
    title: str
    kind: str  # mlx, float32, bfloat16 or nf4
    worker: str
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # packages
    ours: bool = False
    blas: bool = False  # on Linux, with a real BLAS before MLX's reference one
    usual: bool = True  # runs unless others are asked for
    only: tuple[str, ...] | None = None  # the workloads it is for; None: all but the special ones

    def runs(self, workload: str) -> bool:
        return workload in self.only if self.only is not None else workload not in (*PREFIX, *QUANTISED)

    def missing(self, with_blas: bool) -> str | None:
        """Why it cannot run here. with_blas: there is a BLAS to put before MLX's own."""
        absent = [name for name in self.needs if find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        lacks = self.blas and not with_blas and sys.platform != "darwin"
        return "no C compiler, or no scipy, to put OpenBLAS before MLX's reference BLAS" if lacks else None


def _ours(key: str, title: str, kind: str, backend: str, needs: Sequence[str], **more: Any) -> Contender:
    settings = {"backend": backend, "patches": more.pop("patches", [])}
    settings |= {name: more.pop(name) for name in ("dtype", "quantize") if name in more}
    return Contender(key, title, kind, "worker_ours.py", settings, tuple(needs), **{"ours": True} | more)


def _trainer(key: str, title: str, kind: str, library: str, **more: Any) -> Contender:
    needs = (library, "transformers", "torch", "peft", *(("bitsandbytes",) if kind == "nf4" else ()))
    dtype = "float32" if kind == "float32" else "bfloat16"
    chosen = {"library": library, "dtype": dtype, "arguments": more.pop("arguments", {})}
    chosen |= {"quantize": "4bit"} if kind == "nf4" else {}
    return Contender(key, title, kind, "worker_trainer.py", chosen, needs, **more)


TORCH, MLX = ("torch",), ("mlx", "mlx_lm")
PRODUCTS = "ours, MLX, its own products"
BARE = {"gradient_checkpointing": False}
GROUPED = {"train_sampling_strategy": "group_by_length"}

OURS = (
    _ours("ours-fp32", "ours, torch float32", "float32", "torch", TORCH, dtype="float32"),
    _ours("ours-bf16", "ours, torch bfloat16", "bfloat16", "torch", TORCH, dtype="bfloat16"),
    _ours("ours-mlx", "ours, MLX", "mlx", "mlx", MLX),
    _ours("ours-mlx-products", PRODUCTS, "mlx", "mlx", MLX, blas=True, patches=["mlx-products"]),
    _ours("ours-mlx-wheel", f"{PRODUCTS}, its wheel's BLAS", "mlx", "mlx", MLX, patches=["mlx-products"], usual=False),
    _ours("ours-nf4", "ours, torch NF4", "nf4", "torch", ("torch", "bitsandbytes"), quantize="4bit", only=QUANTISED),
    _ours(
        "ours-nf4-bf16",
        "ours, torch NF4, bfloat16",
        "nf4",
        "torch",
        ("torch", "bitsandbytes"),
        quantize="4bit",
        dtype="bfloat16",
        only=QUANTISED,
    ),
)
TOP = tuple(
    _ours(
        f"{one}-top{suffix}",
        f"ours, {title}, top blocks{words}",
        kind,
        backend,
        needs,
        only=PREFIX,
        patches=[*(["mlx-products"] if kind == "mlx" else []), *([f"keep-nothing-{backend}"] if computed else [])],
        ours=not computed,
        blas=kind == "mlx",
        dtype="bfloat16" if kind == "bfloat16" else "float32",
    )
    for one, title, kind, backend, needs in (
        ("ours-fp32", "torch float32", "float32", "torch", TORCH),
        ("ours-bf16", "torch bfloat16", "bfloat16", "torch", TORCH),
        ("ours-mlx", "MLX's own products", "mlx", "mlx", MLX),
    )
    for computed, suffix, words in ((False, "", ""), (True, "-computed", ", nothing kept"))
)
RIVALS = (
    Contender("mlx-lm", "mlx_lm.lora", "mlx", "worker_mlx_lm.py", {}, MLX, blas=True),
    Contender("mlx-lm-wheel", "mlx_lm.lora, its wheel's BLAS", "mlx", "worker_mlx_lm.py", {}, MLX, usual=False),
    _trainer("trl-fp32", "TRL, float32", "float32", "trl", arguments={"bf16": False}),
    _trainer("trl-fp32-bare", "TRL, float32, no checkpointing", "float32", "trl", arguments=BARE | {"bf16": False}),
    _trainer("trl-bf16", "TRL, bfloat16", "bfloat16", "trl"),
    _trainer("trl-bf16-bare", "TRL, bfloat16, no checkpointing", "bfloat16", "trl", arguments=BARE),
    _trainer("trl-bf16-grouped", "the same, grouped by length", "bfloat16", "trl", arguments=BARE | GROUPED),
    _trainer("trainer-fp32", "Trainer, float32", "float32", "transformers"),
    _trainer("trainer-fp32-grouped", "Trainer, float32, grouped", "float32", "transformers", arguments=GROUPED),
    _trainer("trainer-bf16", "Trainer, bfloat16", "bfloat16", "transformers"),
    _trainer("trainer-bf16-grouped", "Trainer, bfloat16, grouped", "bfloat16", "transformers", arguments=GROUPED),
    _trainer("trl-nf4", "TRL, NF4", "nf4", "trl", only=QUANTISED),
    _trainer("trl-nf4-bare", "TRL, NF4, no checkpointing", "nf4", "trl", arguments=BARE, only=QUANTISED),
    _trainer("trainer-nf4-grouped", "Trainer, NF4, grouped", "nf4", "transformers", arguments=GROUPED, only=QUANTISED),
)
ALL = {one.key: one for one in (*OURS, *TOP, *RIVALS)}


def chosen(workload: str, ours: Sequence[str], rivals: Sequence[str]) -> list[Contender]:
    """Those for one workload. Names that are given run whatever the workload; without names the usual ones do."""
    usual = [one for one in ALL.values() if one.usual and one.runs(workload)]
    return [*_named(ours, [one for one in usual if one.ours]), *_named(rivals, [one for one in usual if not one.ours])]


def _named(keys: Sequence[str], usual: list[Contender]) -> list[Contender]:
    return [ALL[key] for key in keys if key != NOBODY] if keys else usual

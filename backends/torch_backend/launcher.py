"""Starting processes with torchrun. Imports no framework."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from backends.nvidia import driver
from backends.process_rank import ProcessRank

NAME, RANK = "torchrun", "RANK"


def find_place(environment: Mapping[str, str]) -> ProcessRank | None:
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return None
    rank, size = int(environment[RANK]), int(environment["WORLD_SIZE"])
    return ProcessRank(
        rank, size, int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", size))
    )


def command(processes: int, arguments: Sequence[str]) -> list[str]:
    """`--standalone` finds a free port by itself."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*run, "--module", "finetune", *arguments]


def variables() -> Mapping[str, str]:
    """gloo would ask for the address of the machine's name, which may have none; and torchrun logs much."""
    return {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def cards() -> int:
    found = driver()
    return found.cards if found else 0

"""Starting processes with mlx.launch. Imports no framework."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from backends.process_rank import ProcessRank

NAME, RANK = "mlx.launch", "MLX_RANK"
_MAIN = "from mlx._distributed_utils.launch import main; main()"  # what the script mlx.launch does
_PORTS = range(20000, 60000, 64)  # the first that are tried


def find_place(environment: Mapping[str, str]) -> ProcessRank | None:
    """The number of processes stands in a file that lists them (ring, JACCL), or in a variable (NCCL)."""
    if RANK not in environment:
        return None
    rank = int(environment[RANK])
    if size := environment.get("MLX_WORLD_SIZE"):
        return ProcessRank(rank, int(size), rank, int(size))
    file = environment.get("MLX_HOSTFILE") or environment.get("MLX_IBV_DEVICES")
    text = Path(file).read_text(encoding="utf-8").strip() if file else ""
    hosts = json.loads(text) if text else [None]
    machines = [str(host[0]).rpartition(":")[0] if isinstance(host, list) and host else None for host in hosts]
    same = [number for number, machine in enumerate(machines) if machine and machine == machines[rank]] or [rank]
    return ProcessRank(rank, len(hosts), same.index(rank), len(same))


def command(processes: int, arguments: Sequence[str]) -> list[str]:
    run = [sys.executable, "-c", _MAIN, "--backend", "ring", "-n", str(processes)]
    return [*run, "--starting-port", str(_free_ports(processes)), "--", sys.executable, "-m", "finetune", *arguments]


def variables() -> Mapping[str, str]:
    return {}


def cards() -> int:
    """A Mac has one, and other processes on it gain nothing."""
    return 0


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that are free now. Raises OSError.

    Two commands that begin at the same time start looking at different ones.
    """
    start = os.getpid() % len(_PORTS)
    first: int
    for first in [*_PORTS[start:], *_PORTS[:start]]:
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no free ports on this machine")

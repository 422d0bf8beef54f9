"""mx.distributed: the processes of a run as MLX's ring joins them over TCP, or JACCL over Thunderbolt."""

from __future__ import annotations

import os
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from backends.interface import Wanted
from backends.process_rank import ProcessRank
from backends.team import exchange, not_met
from backends.timeouts import FOREVER, PATIENCE

_ENGINES = {"ring": "ring", "jaccl": "JACCL", "mpi": "MPI", "nccl": "NCCL"}


def engines() -> list[str]:
    """The engines of this build of MLX, in words."""
    return [name for engine, name in _ENGINES.items() if mx.distributed.is_available(engine)]


def join(here: ProcessRank, wanted: Wanted) -> MlxGroup:
    """Every process of the run must call it. Raises Lost."""
    named = {"MLX_IBV_DEVICES": "jaccl", "NCCL_HOST_IP": "nccl", "MLX_HOSTFILE": "ring"}
    engine = next((engine for variable, engine in named.items() if os.environ.get(variable)), "any")
    try:
        group = mx.distributed.init(strict=True, backend=engine)
    except (RuntimeError, ValueError) as error:
        raise not_met(error) from None
    return MlxGroup(group)


class MlxGroup:
    """`team.Group`. MLX's collectives are arrays like any other, and are computed at once here."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.rank, self.size, self._group = group.rank(), group.size(), group

    def sum(
        self, tensors: Sequence[mx.array], tail: NDArray[np.float32]
    ) -> tuple[Sequence[mx.array], NDArray[np.float32]]:
        parts = [*(tensor.reshape(-1) for tensor in tensors), mx.array(tail)]
        flat = self._summed(mx.concatenate(parts))
        ends = np.cumsum([part.size for part in parts])[:-1].tolist()
        whole = mx.split(flat, ends)
        heard = np.array(whole[-1])
        return [part.reshape(tensor.shape) for part, tensor in zip(whole, tensors, strict=False)], heard

    def zeros(self, numbers: int) -> Sequence[mx.array]:
        return [mx.zeros(numbers)]

    def broadcast(self, message: bytes | None) -> bytes:
        """A sum to which only the first process adds: MLX has no broadcast."""
        patience = FOREVER if message is None else PATIENCE
        size = int(np.array(self._summed(mx.array([len(message or b"")], mx.int32), patience))[0])
        data = mx.zeros(size, mx.uint8) if message is None else mx.array(np.frombuffer(message, np.uint8))
        return np.array(self._summed(data)).tobytes()

    def gather(self, message: bytes) -> list[bytes]:
        sizes = np.array(self._gathered(mx.array([len(message)], mx.int32))).tolist()
        padded = np.frombuffer(message + bytes(max(sizes) - len(message)), np.uint8)
        parts = np.array(self._gathered(mx.array(padded))).reshape(self.size, -1)
        return [part[:size].tobytes() for part, size in zip(parts, sizes, strict=True)]

    def close(self) -> None:
        """MLX closes its sockets with the process."""

    def _summed(self, values: mx.array, patience: float = PATIENCE) -> mx.array:
        with exchange(patience):
            total = mx.distributed.all_sum(values, group=self._group)
            mx.eval(total)
        return total

    def _gathered(self, values: mx.array) -> mx.array:
        with exchange():
            total = mx.distributed.all_gather(values, group=self._group)
            mx.eval(total)
        return total

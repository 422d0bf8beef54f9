"""torch.distributed: the processes of a run as gloo joins them, and NCCL for sums between NVIDIA's GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from backends.interface import BackendError, Wanted
from backends.process_rank import ProcessRank
from backends.team import exchange, not_met
from backends.timeouts import FOREVER, PATIENCE
from backends.torch_backend.device import pick_device


def engines() -> list[str]:
    """The engines of this build of torch, in words."""
    if not dist.is_available():
        return []
    cards = dist.is_nccl_available() and torch.cuda.is_available()
    return [*(["gloo"] if dist.is_gloo_available() else []), *(["NCCL"] if cards else [])]


def join(here: ProcessRank, wanted: Wanted) -> TorchGroup:
    """Every process of the run must call it. Raises BackendError, Lost."""
    if not engines():
        raise BackendError("this build of torch has no torch.distributed; install one that has: pip install torch")
    device = pick_device(wanted)
    if device.type == "cuda":
        if here.local_rank >= torch.cuda.device_count():
            cards = torch.cuda.device_count()
            raise BackendError(f"{here.local_size} processes and {cards} GPU; start {cards}, or add device=cpu")
        torch.cuda.set_device(here.local_rank)
        device = pick_device(wanted)
    patience = timedelta(seconds=FOREVER if here.rank else PATIENCE)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise not_met(error) from None
    return TorchGroup(here, device)


class TorchGroup:
    """`team.Group`."""

    def __init__(self, here: ProcessRank, device: torch.device) -> None:
        self.rank, self.size = here.rank, here.size
        self._device = device if device.type == "cuda" else torch.device("cpu")

    def sum(
        self, tensors: Sequence[torch.Tensor], tail: NDArray[np.float32]
    ) -> tuple[Sequence[torch.Tensor], NDArray[np.float32]]:
        parts = [*(tensor.reshape(-1) for tensor in tensors), torch.from_numpy(tail).to(tensors[0].device)]
        flat = torch.cat(parts).to(self._device)
        with exchange():
            dist.all_reduce(flat)
            heard = flat[-tail.size :].cpu().numpy()
        whole = flat.to(tensors[0].device).split([part.numel() for part in parts])
        return [part.view(tensor.shape) for part, tensor in zip(whole, tensors, strict=False)], heard

    def zeros(self, numbers: int) -> Sequence[torch.Tensor]:
        return [torch.zeros(numbers, device=self._device)]

    def broadcast(self, message: bytes | None) -> bytes:
        size = torch.tensor([len(message or b"")])
        with exchange(FOREVER if message is None else PATIENCE):
            dist.broadcast(size, 0)
            data = _as_tensor(message) if message is not None else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0)
        received: bytes = data.numpy().tobytes()
        return received

    def gather(self, message: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with exchange():
            dist.all_gather(sizes, torch.tensor([len(message)]))
            longest = max(int(size) for size in sizes)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, _as_tensor(message + bytes(longest - len(message))))
        return [part.numpy()[: int(size)].tobytes() for part, size in zip(parts, sizes, strict=True)]

    def close(self) -> None:
        dist.destroy_process_group()


def _as_tensor(message: bytes) -> Any:
    return torch.from_numpy(np.frombuffer(message, np.uint8).copy())

"""Offloads tensors to the machine's memory while a CUDA card recomputes blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import finalize

import torch

from backends.memory import available_bytes


class Parking:
    """Copies go beside the card's own work, in a stream of their own; at most half of the machine's free memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._room = available_bytes() // 2

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Returns what gives the tensor back. Where it cannot be parked, it stays where it is."""
        size = 1 << (tensor.nbytes - 1).bit_length()  # torch rounds memory that cannot move up to such sizes
        host = self._copied(tensor) if self._stream and size <= self._room else None
        if host is not None:
            self._room -= size
            finalize(host, self._given_back, size)
        return partial(_itself, tensor) if host is None else partial(self._back, host, tensor.requires_grad)

    def _given_back(self, size: int) -> None:
        self._room += size

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor | None:
        try:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:  # some systems let a program have little memory that cannot move
            return None
        assert self._stream
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def _back(self, host: torch.Tensor, requires_grad: bool) -> torch.Tensor:
        assert self._stream
        with torch.cuda.stream(self._stream):
            tensor = host.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        return tensor.requires_grad_(requires_grad)


def keep_embedding_on_host(model: Any, device: torch.device) -> None:
    """An embedding that is not the head too: only the rows that a batch needs go to the card.

    The host waits for the card in each pass, to read the tokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.requires_grad:
        return
    if device.type == "cuda" and type(embedding) is torch.nn.Embedding and head.weight is not embedding.weight:
        embedding.weight.data = embedding.weight.data.cpu()
        embedding.forward = partial(_looked_up, embedding.weight, device)


def _looked_up(weight: torch.Tensor, device: torch.device, ids: torch.Tensor) -> torch.Tensor:
    """[...] -> [..., D] on the device."""
    rows = torch.empty(ids.numel(), weight.shape[1], dtype=weight.dtype, pin_memory=True)
    torch.index_select(weight.data, 0, ids.flatten().cpu(), out=rows)
    return rows.to(device, non_blocking=True).view(*ids.shape, -1)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

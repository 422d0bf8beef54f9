"""What frozen blocks below the adapter make of a row, kept for the whole run: it never changes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from backends.interface import Batch
from backends.torch_patch import blocks_of, forward_as


class _Reached(Exception):  # it is no error, and carries what was asked for
    """The first adapted block was reached, with these hidden states."""


class KeptPrefix:
    """The hidden states that enter the first adapted block, by the tokens of a row.

    They lie in a temporary file without a name, which is gone with the session, however that ends. Each row is
    computed alone, so that its numbers do not depend on the rows it first came with.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        blocks, first = blocks_of(model)
        self._body, self._device = model.base_model, device
        self._frozen, self._adapted = list(blocks)[:first], blocks[first]
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (as long as the session)
        weakref.finalize(self, self._file.close)
        self._places: dict[bytes, tuple[int, int, torch.dtype]] = {}  # digest of the tokens -> offset, D, type
        self._end = 0
        self._most = shutil.disk_usage(tempfile.gettempdir()).free // 2

    @contextmanager
    def skipping(self, batch: Batch) -> Iterator[None]:
        """In here a pass over the batch begins at the first adapted block, with what was kept."""
        entering, own = self._entering(batch).to(self._device), self._adapted.forward
        with ExitStack() as replaced:
            for block in self._frozen:
                replaced.enter_context(forward_as(block, _passing))
            replaced.enter_context(forward_as(self._adapted, lambda _, *rest, **named: own(entering, *rest, **named)))
            yield

    def _entering(self, batch: Batch) -> torch.Tensor:
        """[B, T, D]; zero after a row's last supervised position, where nothing is asked of it."""
        rows: list[torch.Tensor] = []
        for tokens, weights in zip(batch.inputs, batch.weights, strict=True):
            needed = np.flatnonzero(weights)
            rows.append(self._row(np.ascontiguousarray(tokens[: needed[-1] + 1 if needed.size else 1])))
        whole = rows[0].new_zeros(*batch.inputs.shape, rows[0].shape[-1])
        for place, row in zip(whole, rows, strict=True):
            place[: len(row)] = row
        return whole

    def _row(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> torch.Tensor:
        """[n] -> [n, D] on the CPU, from the file or, the first time, from the frozen blocks."""
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        if digest in self._places:
            start, width, dtype = self._places[digest]
            row = torch.empty(len(tokens), width, dtype=dtype)
            self._file.seek(start)
            self._file.readinto(_bytes(row))
            return row
        row = self._computed(tokens)
        if self._end + row.nbytes <= self._most:
            self._file.seek(self._end)
            self._file.write(_bytes(row))
            self._places[digest] = self._end, row.shape[1], row.dtype
            self._end += row.nbytes
        return row

    def _computed(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> torch.Tensor:
        def stop(states: torch.Tensor, *_: Any, **__: Any) -> None:
            raise _Reached(states)

        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        with torch.no_grad(), forward_as(self._adapted, stop):
            try:
                self._body(input_ids=ids, use_cache=False)
            except _Reached as reached:
                states: torch.Tensor = reached.args[0]
                return states[0].cpu().contiguous()
        raise RuntimeError("the model's blocks were never reached")


def _passing(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return states


def _bytes(row: torch.Tensor) -> memoryview:
    return memoryview(row.view(torch.uint8).numpy()).cast("B")

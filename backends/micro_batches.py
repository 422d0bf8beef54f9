"""A micro-batch in smaller parts, where memory is dear and small products are no slower than large ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from backends.interface import Batch

# What is computed at a time, from which a run's memory is foretold too. Tokens on a CPU, where more are no faster and
# need more memory; and logits, a number for each position and token of the vocabulary: more on MLX's GPUs, which are
# slow where they read the head for few positions.
CPU_TOKENS = {"torch": 1024, "mlx": 512}
LOGITS = {("torch", "cpu"): 2**23, ("torch", "gpu"): 2**23, ("mlx", "cpu"): 2**22, ("mlx", "gpu"): 2**24}

Rows = NDArray[np.int64]


def parts(batch: Batch, tokens: int) -> Iterator[tuple[Rows, Batch]]:
    """The rows in which anything is supervised, the longest first, so many tokens at a time: (rows, their batch).

    What stands after a row's last supervised position changes nothing, and goes where the whole part allows. A row
    longer than `tokens` is alone.
    """
    ends = batch.inputs.shape[1] - np.argmax(batch.weights[:, ::-1] != 0, axis=1)  # one past the last supervised
    order = np.argsort(-ends, kind="stable")
    waiting = order[(batch.weights[order] != 0).any(axis=1)]
    while waiting.size:
        width = int(ends[waiting[0]])
        rows, waiting = np.split(waiting, [max(tokens // width, 1)])
        prefix_of = tuple(batch.prefix_of[row] for row in rows) if batch.prefixes else ()
        inputs, targets = batch.inputs[rows, :width], batch.targets[rows, :width]
        yield rows, Batch(inputs, targets, batch.weights[rows, :width], batch.prefixes, prefix_of)

"""The classification head after it was trained alone: where the adapter begins, and the model it is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from backends.interface import HEAD_WEIGHT, BackendError, FloatArray
from backends.model_folder import read_tensors, validate
from finetune.disk.atomic import write_pieces
from finetune.disk.run_folder import RunFolder
from finetune.disk.safetensors_file import tensor_pieces
from finetune.errors import Incompatible

_REMEDY = "delete it, and the head is trained again"


def write_head(run: RunFolder, weight: FloatArray) -> None:
    """head.safetensors, whole or absent. Raises DiskError."""
    write_pieces(run.head, tensor_pieces({HEAD_WEIGHT: weight}))


def read_head(run: RunFolder) -> Mapping[str, FloatArray] | None:
    """What `base_weights` takes; None where the run has no head. Raises Incompatible for what no run writes."""
    if not run.head.exists():
        return None
    try:
        validate(run.head)
        tensors = read_tensors(run.head)
    except BackendError as error:
        raise Incompatible(f"{error}; {_REMEDY}") from None
    except (OSError, ValueError) as error:
        raise Incompatible(f"{run.head}: cannot be read ({error!s:.200}); {_REMEDY}") from None
    weight = tensors.get(HEAD_WEIGHT)
    if weight is None or len(tensors) > 1 or weight.ndim != 2 or not np.isfinite(weight).all():
        raise Incompatible(f"{run.head}: not what a run writes; {_REMEDY}")
    return tensors

"""A merged folder quantised by mlx-lm, as `mlx_lm.server` and LM Studio load it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from finetune.errors import EnvironmentProblem

BITS = (4, 6, 8)


def quantise(merged: Path, to: Path, bits: int, remote_code: bool) -> None:
    """Writes the folder `to`, which must not exist. Raises EnvironmentProblem where mlx-lm is missing or fails."""
    try:
        from mlx_lm import convert
    except ImportError as error:
        raise EnvironmentProblem(
            f'{error.name or error} cannot be imported; pip install "recipe-finetune[mlx]"'
        ) from None
    trust = {"trust_remote_code": True} if remote_code else {}  # mlx-lm 0.31 has no such parameter
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            convert(str(merged), str(to), quantize=True, q_bits=bits, q_group_size=64, **trust)
    except Exception as error:  # whatever a model's own code makes of weights it was not written for
        raise EnvironmentProblem(
            f"mlx-lm cannot quantise this model ({type(error).__name__}: {error!s:.200})"
        ) from error

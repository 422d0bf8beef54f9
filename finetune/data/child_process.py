"""Runs Python in an isolated child process: no environment variables, no user site-packages."""

from __future__ import annotations

import os
import sys

_KEPT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "TEMP")
_ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def bare_python(code: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs `code` where our modules are found, and its environment. One thread in each library."""
    path = [one for one in sys.path if one]
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _ALONE
    return [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {path!r}; {code}"], environment

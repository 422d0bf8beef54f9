"""The optional packages of exports, loaded when they are needed, and the processors for them."""

from __future__ import annotations

import importlib
import os
from typing import Any

from finetune.errors import EnvironmentProblem


def optional(name: str, instead: str = "", extra: str = "gguf") -> Any:
    """A module of one of our extras. Raises EnvironmentProblem, which says how to install it.

    instead: what can be done where there is none for this machine.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f'this export needs the package {name} ({error!s:.120}): pip install "recipe-finetune[{extra}]"{instead}'
        ) from None


def processors() -> int:
    """Those that this process may run on: more threads would wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

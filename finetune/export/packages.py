"""Optional packages for exports, imported when needed."""

from __future__ import annotations

import importlib
from typing import Any

from finetune.errors import EnvironmentProblem


def optional(name: str, instead: str = "", extra: str = "gguf") -> Any:
    """A module of one of our extras. instead: what can be done without it. Raises EnvironmentProblem."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f'this export needs the package {name} ({error!s:.120}): pip install "recipe-finetune[{extra}]"{instead}'
        ) from None

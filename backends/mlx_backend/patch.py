"""Replaces how modules of one model compute, in that model only."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.nn as nn


def subclassed(module: nn.Module, call: Callable[..., Any]) -> None:
    """Replace one module's `__call__` by `call(the class's own __call__, module, ...)`."""
    base = type(module)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(base.__call__, self, *args, **kwargs)

    module.__class__ = type(base.__name__, (base,), {"__call__": changed})


def rebound(model: nn.Module, name: str, function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Where this model's modules call the global `name`, which is `function`, let them call `other`.

    Returns whether any module does.
    """
    changed: dict[type, type] = {}
    for module in model.modules():
        base = type(module)
        calls_it = getattr(base.__call__, "__globals__", {}).get(name) is function
        if not calls_it or name not in base.__call__.__code__.co_names:
            continue
        if base not in changed:
            code = base.__call__
            copy = FunctionType(
                code.__code__,
                {**code.__globals__, name: other},
                name=code.__name__,
                argdefs=code.__defaults__,
                closure=code.__closure__,
            )
            copy.__kwdefaults__ = code.__kwdefaults__
            changed[base] = type(base.__name__, (base,), {"__call__": copy})
        module.__class__ = changed[base]
    return bool(changed)

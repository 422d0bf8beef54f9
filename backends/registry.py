"""Which backends there are, which of them work on this machine, and how to open one. Loads none before it is asked."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from backends.interface import Backend, BackendError, LoraSpec, ModelSpec, OptimSpec, Session
from backends.model_folder import folder_of

NAMES: dict[str, str] = {
    "mlx": "backends.mlx_backend",
    "torch": "backends.torch_backend",
    "reference": "backends.reference",
}


def load(name: str) -> Backend:
    """The backend's module. Raises BackendError for an unknown name, ImportError where a library is missing."""
    if name not in NAMES:
        raise BackendError(f"there is no backend {name!r}; there are {', '.join(NAMES)}")
    return cast(Backend, import_module(NAMES[name]))


def probe(name: str) -> str | None:
    """None: usable here; else one sentence that says why not, with the remedy. Never raises."""
    try:
        return load(name).probe()
    except BackendError as error:
        return str(error)
    except ImportError as error:
        return f'{error.name or error} cannot be imported; pip install "recipe-finetune[{name}]"'
    except Exception as error:  # a library that is there but broken: wrong driver, wrong processor
        return f'{name} does not start here ({error}); try pip install --force-reinstall "recipe-finetune[{name}]"'


def describe(name: str) -> dict[str, Any]:
    """Device and versions. Raises BackendError where the backend is not usable."""
    return usable(name).describe()


def choose(requested: str = "auto") -> str:
    """The backend to use: `requested`, or for "auto" the machine's own; the reference only when it is named.

    Raises BackendError with the reason of every backend that was considered.
    """
    if requested != "auto":
        usable(requested)
        return requested
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    reasons = []
    for name in ("mlx", "torch") if apple else ("torch", "mlx"):
        reason = probe(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendError("no backend can be used here. " + " ".join(reasons))


def usable(name: str) -> Backend:
    """The backend's module. Raises BackendError with the reason where it cannot be used."""
    reason = probe(name)
    if reason is not None:
        raise BackendError(f"{name}: {reason}")
    return load(name)


def open_session(name: str, model: ModelSpec, lora: LoraSpec, optim: OptimSpec, seed: int) -> Session:
    """A live session. Raises BackendError where the backend, or what is asked of it, cannot be used."""
    return usable(name).open(replace(model, folder=folder_of(model)), lora, optim, seed)

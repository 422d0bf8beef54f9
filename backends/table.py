"""The backends, and the modules that make one. A new backend is a row here."""

from __future__ import annotations

from dataclasses import dataclass

from backends.interface import BackendError


@dataclass(frozen=True)
class Row:
    """One backend."""

    session: str  # the module that is a `Backend`
    costs: str  # the module that is its `Predictions`
    machine: str = ""  # the module that is a `ThisMachine`, where what the session's loads is not needed for that
    library: str = ""  # the module that is a `Library`, where another library loads adapters into the same models
    apple: bool = False  # made for Apple silicon: there `auto` tries it first, and elsewhere last
    automatic: bool = True  # False: used only where it is named
    launcher: str = ""  # the module that is a `Launcher`, where several processes can share a run
    group: str = ""  # the module that joins them


BACKENDS: dict[str, Row] = {
    "mlx": Row(
        "backends.mlx_backend.session",
        "backends.mlx_backend.costs",
        "backends.mlx_backend.machine",
        "backends.mlx_backend.library",
        apple=True,
        launcher="backends.mlx_backend.launcher",
        group="backends.mlx_backend.group",
    ),
    "torch": Row(
        "backends.torch_backend.session",
        "backends.torch_backend.costs",
        "backends.torch_backend.machine",
        "backends.torch_backend.library",
        launcher="backends.torch_backend.launcher",
        group="backends.torch_backend.group",
    ),
    "reference": Row("backends.reference", "backends.reference", automatic=False),
}
NAMES = tuple(BACKENDS)


def row(name: str) -> Row:
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]

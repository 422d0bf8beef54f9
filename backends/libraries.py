"""The libraries beside us that load adapters and models (PEFT, mlx-lm): what each is told, and how."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import cast

from backends.interface import BackendError, CheckedFolder, Half, ModelSpec
from backends.layer_names import Library
from backends.registry import device_kind
from backends.table import BACKENDS, row


def by_name() -> dict[str, Library]:
    """The libraries that load adapter folders, by their names. Loads none of them."""
    modules = (cast(Library, import_module(row.library)) for row in BACKENDS.values() if row.library)
    return {module.NAME: module for module in modules}


def loading_lines(
    name: str, model: ModelSpec, base: str, adapter: str, device: str, half: Half, labels: Sequence[str] = ()
) -> str | None:
    """Python that loads base and adapter as a session on this device held them (`Library.lines`); None: no library.

    labels: those that a head chooses among; a library that has such models loads it.
    """
    if not (own := row(name).library):
        return None
    library = cast(Library, import_module(own))
    if labels and not library.HEADS:
        library = next(one for one in by_name().values() if one.HEADS)
    return library.lines(model, base, adapter, model.number_type(device_kind(device), half), labels)


def whole_lines(folder: CheckedFolder) -> list[str]:
    """For each library that is here, Python that loads a whole model (`Library.whole_lines`)."""
    lines = []
    for library in by_name().values():
        with suppress(ImportError, BackendError):
            lines.append(library.whole_lines(folder))
    return lines

"""transformers without its search: on import it reads its own 2,500 files for the names of models, twice.

What the search found is kept in a file, and holds for the same version with the same files. Elsewhere, and where
transformers is built otherwise, it searches as ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from backends.machine_cache import digest, read_json, write_json

PACKAGE = "transformers"


class _Finder(MetaPathFinder):
    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == PACKAGE else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self.file)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, file: Path) -> None:
        super().__init__(fullname, path)
        self.file = file

    def exec_module(self, module: ModuleType) -> None:
        with suppress(Exception):  # what is wrong with it, it says itself below
            from importlib.metadata import version

            module.__version__ = version(PACKAGE)  # type: ignore[attr-defined]  # what its utils ask for
            from transformers.utils import import_utils

            models = Path(self.path).parent / "models"
            search = import_utils.create_import_structure_from_path
            import_utils.create_import_structure_from_path = _kept(search, models, self.file)
        super().exec_module(module)


def keep(file: Path) -> None:
    """From now on an import of transformers takes from `file` what it would search for, or leaves it there."""
    if kept_in() is None and PACKAGE not in sys.modules:
        sys.meta_path.insert(0, _Finder(file))


def kept_in() -> Path | None:
    """The file of this process, for one that it starts."""
    return next((finder.file for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def _kept(search: Any, models: Path, file: Path) -> Any:
    """search: of transformers, which takes a file or folder. Of `models` it is asked once for all processes."""

    @cache
    def structure() -> Any:
        stamp, told = _stamp(models), read_json(file)
        if told.get("stamp") == stamp and isinstance(told.get("found"), dict):
            return told["found"]
        packed = _packed(search(str(models)))
        write_json(file, {"stamp": stamp, "found": packed})
        return packed

    def kept(module_path: str | Path) -> Any:
        folder = Path(module_path).parent if Path(module_path).name == "__init__.py" else Path(module_path)
        return _unpacked(structure()) if folder == models else search(module_path)

    return kept


def _stamp(models: Path) -> str:
    """Of the version, and of every folder: a file that is added, replaced or removed changes the time of its folder."""
    from importlib.metadata import version

    folders = sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(models))
    return digest([version(PACKAGE), str(models), models.stat().st_mtime_ns, folders])


def _packed(whole: Any) -> Any:
    """As JSON has it: a set of libraries as a key begins with a comma, and no module's name does."""
    if not isinstance(whole, dict):
        return sorted(whole)
    names = {key: key if isinstance(key, str) else "," + ",".join(sorted(key)) for key in whole}
    return {names[key]: _packed(value) for key, value in whole.items()}


def _unpacked(packed: Any) -> Any:
    if not isinstance(packed, dict):
        return set(packed)
    keys = {name: frozenset(filter(None, name.split(","))) if name.startswith(",") else name for name in packed}
    return {keys[name]: _unpacked(value) for name, value in packed.items()}

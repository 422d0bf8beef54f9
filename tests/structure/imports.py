"""The imports of `backends/` and `finetune/`, read from the source: who imports whom, where, and in which circles.

Imports inside functions and those for types alone count as well. What is loaded by a name in a string does not: the
backends (`backends/registry.py`), and the child that renders chat templates.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("backends", "finetune")
# From left to right, floor by floor: a room imports only rooms of floors to the left of its own, or of its own room.
# `disk` stands right of `data`, not beside it: the identity of a run is a digest of its prepared rows.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("text", "options", "signals", "backends"),
    ("errors", "streams", "team_folder"),
    ("console", "connections", "terminal"),
    ("recipe", "events"),
    ("data",),
    ("disk",),
    ("evaluation", "crashes"),
    ("supervisor",),
    ("training", "startup", "launch"),
    ("report",),
    ("check",),
    ("export",),
    ("run",),
    ("commands",),
    ("cli_examine", "cli_use"),
    ("cli",),
    ("__main__",),
)


@dataclass(frozen=True)
class Import:
    """One module of ours that is imported by another."""

    importer: str  # the file, relative to the root, with slashes
    line: int
    target: str  # the module, dotted
    late: bool  # inside a function

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class House:
    """Every file of both packages, as module -> its path relative to the root; and every import between them."""

    root: Path
    files: Mapping[str, str]
    imports: tuple[Import, ...]

    def arrows(self) -> dict[str, set[str]]:
        """Room -> the other rooms that it imports."""
        found: dict[str, set[str]] = {room_of(module): set() for module in self.files}
        for one in self.imports:
            found[room_of(_module(one.importer))].add(room_of(one.target))
        return {room: targets - {room} for room, targets in found.items()}

    def file_arrows(self) -> dict[str, set[str]]:
        """Module -> the modules that it imports."""
        found: dict[str, set[str]] = {module: set() for module in self.files}
        for one in self.imports:
            found[_module(one.importer)].add(one.target)
        return found

    def upward(self, floors: Iterable[Iterable[str]] = FLOORS) -> list[Import]:
        """Imports of a room on the importer's own floor or to the right of it; rooms that have no floor count too."""
        floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
        found = []
        for one in self.imports:
            here, there = (_floor_room(module) for module in (_module(one.importer), one.target))
            if here != there and floor.get(there, len(floor)) >= floor.get(here, -1):
                found.append(one)
        return found

    def lines(self, module: str) -> int:
        return len((self.root / self.files[module]).read_text(encoding="utf-8").splitlines())


def read_house(root: Path = ROOT) -> House:
    """Reads every .py file of both packages under `root`."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    files = {_module(relative): relative for path in paths for relative in [path.relative_to(root).as_posix()]}
    imports = [
        Import(relative, line, target, late)
        for module, relative in files.items()
        for line, target, late in _imports(ast.parse((root / relative).read_text(encoding="utf-8")), set(files))
        if target != module
    ]
    return House(root, files, tuple(imports))


def room_of(module: str) -> str:
    """`finetune.data.read` -> `data`; of `backends`, each file and each folder is a room: `backends.interface`."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if package == "backends":
        return f"backends.{name}" if name else "backends"
    return name or "finetune"


def _floor_room(module: str) -> str:
    return "backends" if module.partition(".")[0] == "backends" else room_of(module)


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach one another: the strongly connected components of two names or more, sorted."""
    reach = {name: _reached(name, arrows) for name in arrows}
    groups = {frozenset(other for other in reach[name] if name in reach.get(other, ())) | {name} for name in arrows}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(arrows.get(name, ()))
    return found


def _module(relative: str) -> str:
    return relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(tree: ast.AST, known: set[str], late: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, module, inside a function) of every import of a module of ours."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in whole]
        else:
            inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, known, late or inner)
            continue
        for name in dict.fromkeys(names):
            if name.partition(".")[0] in PACKAGES:
                assert name in known, f"line {node.lineno}: there is no {name}"
                yield node.lineno, name, late

"""Draws the house as it stands, in text: `python -m tests.structure.draw [ROOT]`.

A room is a folder, or a file that stands beside the folders. Its floor is the longest way down from it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.structure.imports import ROOT, House, circles, read_house, room_of


def main(arguments: Sequence[str] = ()) -> None:
    house = read_house(Path(arguments[0]).resolve() if arguments else ROOT)
    arrows = {room: targets for room, targets in house.arrows().items() if room not in ("backends", "finetune")}
    round_trips, files_round = circles(arrows), circles(house.file_arrows())
    upward, late = house.upward(), [one for one in house.imports if one.late]
    floors = _floors(arrows)
    print(
        f"{len(arrows)} rooms, {sum(map(len, arrows.values()))} arrows, {max(floors.values())} floors; "
        f"{len(house.files)} files, {sum(map(house.lines, house.files)):,} lines"
    )
    for number in range(max(floors.values()), 0, -1):
        print(f"\nfloor {number}")
        for room in sorted(room for room, floor in floors.items() if floor == number):
            print(f"  {_described(house, room)}")
    print("\narrows")
    for room in sorted(arrows, key=lambda room: (-floors[room], room)):
        if arrows[room]:
            print(f"  {room} -> {', '.join(sorted(arrows[room]))}")
    print("\ncircles:", "; ".join(", ".join(names) for names in [*round_trips, *files_round]) or "none")
    print("arrows upward:", "; ".join(map(str, upward)) or "none")
    print(f"imports inside functions: {len(late)}")
    for one in late:
        print(f"  {one}")


def _floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """The bottom is 1. Rooms of one circle stand on one floor."""
    whole = {room: frozenset(group) for group in circles(arrows) for room in group}
    floors: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in floors:
            same = whole.get(room, frozenset({room}))
            below = {target for one in same for target in arrows[one] if target in arrows} - same
            floors.update(dict.fromkeys(same, 1 + max((floor(target) for target in below), default=0)))
        return floors[room]

    for room in arrows:
        floor(room)
    return floors


def _described(house: House, room: str) -> str:
    """`data/ 2,310: chat_template 201, ...`, the files by their size; of a single file its lines."""
    sizes = {module: house.lines(module) for module in house.files if room_of(module) == room}
    if len(sizes) == 1 and not any(house.files[module].endswith("/__init__.py") for module in sizes):
        return f"{room} {sum(sizes.values()):,}"
    names = {module: module.rsplit(".", 1)[-1] for module in sizes if not house.files[module].endswith("/__init__.py")}
    files = ", ".join(f"{names[module]} {sizes[module]}" for module in sorted(names, key=lambda name: -sizes[name]))
    return f"{room}/ {sum(sizes.values()):,}: {files}"


if __name__ == "__main__":
    main(sys.argv[1:])

"""The walls of the house: which folder may import which, no circles, nothing imported late without a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.structure import draw
from tests.structure.imports import FLOORS, ROOT, House, circles, read_house

# What `finetune` may know of `backends`: the boundary, which backends there are, how processes share a run, a model's
# folder, its memory, models larger than that, how transformers is imported, and which libraries load what we write.
ALLOWED = {
    "backends", "backends.interface", "backends.registry", "backends.process_group", "backends.model_folder",
    "backends.memory_plan", "backends.streaming", "backends.transformers_names", "backends.libraries",
}  # fmt: skip
_LIGHT = "`--help` and a mistake in a recipe load nothing of the rest (tests/unit/test_startup.py)"
# Imports inside functions, each with its reason. All others stand at the top.
LATE = {
    ("finetune/cli.py", "finetune.commands.check"): _LIGHT,
    ("finetune/cli.py", "finetune.commands.doctor"): _LIGHT,
    ("finetune/cli.py", "finetune.commands.init"): _LIGHT,
    ("finetune/cli.py", "finetune.commands.plan"): _LIGHT,
    ("finetune/cli.py", "finetune.commands.train"): _LIGHT,
    ("finetune/cli.py", "finetune.launch"): f"{_LIGHT}; only `--devices` needs it",
    ("finetune/startup.py", "finetune.connections"): _LIGHT,
    ("finetune/startup.py", "finetune.supervisor"): f"{_LIGHT}; the parent of a run loads nothing more",
    ("finetune/startup.py", "finetune.crashes"): _LIGHT,
    ("finetune/startup.py", "backends.registry"): _LIGHT,
    ("finetune/startup.py", "backends.transformers_names"): _LIGHT,
    ("finetune/startup.py", "finetune.disk.digests"): _LIGHT,
    ("finetune/cli.py", "finetune.connections"): _LIGHT,
    ("finetune/cli.py", "finetune.console"): f"{_LIGHT}; a console on a terminal",
    ("finetune/cli.py", "finetune.disk.run_folder"): f"{_LIGHT}; it is needed before a command is loaded",
    ("finetune/cli.py", "finetune.recipe.load"): f"{_LIGHT}; it is needed before a command is loaded",
    ("finetune/cli.py", "finetune.recipe.locate"): f"{_LIGHT}; it is needed before a command is loaded",
    ("finetune/cli.py", "finetune.recipe.schema"): "`schema` needs nothing else, and `--help` not even that",
    ("finetune/cli.py", "finetune.commands.search"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.benchmark"): _LIGHT,
    ("finetune/cli_use.py", "finetune.commands.chat"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.compare"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.curve"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.duel"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.evaluate"): _LIGHT,
    ("finetune/cli_use.py", "finetune.commands.export"): _LIGHT,
    ("finetune/cli_use.py", "finetune.commands.predict"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.next"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.report"): _LIGHT,
    ("finetune/cli_use.py", "finetune.commands.runs"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.suite"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.commands.suspects"): _LIGHT,
    ("finetune/cli_examine.py", "finetune.disk.run_folder"): f"{_LIGHT}; it is needed before a command is loaded",
    ("finetune/cli_use.py", "finetune.disk.run_folder"): f"{_LIGHT}; it is needed before a command is loaded",
    ("finetune/errors.py", "backends.interface"): "numpy: only an error from behind the boundary needs it",
    (
        "backends/torch_backend/costs.py",
        "backends.torch_backend.device",
    ): "a framework is loaded when its backend is asked for",
    ("backends/torch_backend/fused.py", "backends.torch_backend.triton_kernels"): "Triton is not on every machine",
    ("backends/torch_backend/library.py", "backends.torch_backend.tree"): "names are had without a framework, too",
    ("backends/mlx_backend/library.py", "backends.mlx_backend.tree"): "names are had without a framework, too",
}


@pytest.fixture(scope="module")
def house() -> House:
    return read_house()


def test_a_folder_imports_only_what_stands_to_its_left(house: House) -> None:
    assert not [str(one) for one in house.upward()]


def test_no_circle_between_rooms_nor_between_files(house: House) -> None:
    assert circles(house.arrows()) == []
    assert circles(house.file_arrows()) == []


def test_backends_never_import_finetune(house: House) -> None:
    assert not [
        str(one)
        for one in house.imports
        if one.importer.startswith("backends/") and one.target.partition(".")[0] == "finetune"
    ]


def test_finetune_knows_of_backends_only_the_boundary(house: House) -> None:
    beside = {
        (one.importer, one.target)
        for one in house.imports
        if one.importer.startswith("finetune/")
        and one.target.partition(".")[0] == "backends"
        and one.target not in ALLOWED
    }
    assert not beside


def test_ruff_bans_every_other_module_of_backends() -> None:
    banned = set(
        re.findall(r'^"(backends\.\w+)"', (ROOT / "finetune/ruff.toml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    modules = {
        f"backends.{path.stem}" for path in (ROOT / "backends").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert banned == modules - ALLOWED - {"backends.__init__", "backends.__pycache__"}


def test_imports_stand_at_the_top(house: House) -> None:
    assert {(one.importer, one.target) for one in house.imports if one.late} == set(LATE)


@pytest.mark.parametrize("file", sorted(read_house().files.values()))
def test_a_file_says_what_it_is_for(file: str) -> None:
    assert (ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or "").strip()


def test_the_root_holds_the_run_and_what_everyone_needs(house: House) -> None:
    found = {Path(file).stem for file in house.files.values() if Path(file).parent == Path("finetune")}
    assert found == {
        "__init__",
        "__main__",
        "cli",
        "cli_use",
        "cli_examine",
        "startup",
        "run",
        "supervisor",
        "signals",
        "launch",
        "team_folder",
        "crashes",
        "errors",
        "events",
        "options",
        "text",
        "connections",
        "streams",
        "terminal",
        "console",
    }


def test_every_room_has_a_floor(house: House) -> None:
    rooms = {room for room in house.arrows() if room != "finetune" and not room.startswith("backends")}
    assert rooms | {"backends"} == {room for floor in FLOORS for room in floor}


def planted(folder: Path, **files: str) -> House:
    """A house of these files, named `finetune__data__read` for finetune/data/read.py."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_house(folder)


def test_a_planted_import_upward_is_found(tmp_path: Path) -> None:
    late = "def read():\n    from finetune.report.tables import shown\n"
    house = planted(tmp_path, finetune__data__read=late, finetune__report__tables="import finetune.data.read\n")
    assert [str(one) for one in house.upward()] == ["finetune/data/read.py:2 imports finetune.report.tables"]
    assert [one.late for one in house.imports] == [True, False]


def test_a_planted_import_on_the_same_floor_is_found(tmp_path: Path) -> None:
    house = planted(tmp_path, finetune__events="from finetune.recipe import load\n", finetune__recipe__load="")
    assert [str(one) for one in house.upward()] == ["finetune/events.py:1 imports finetune.recipe.load"]


def test_a_folder_without_a_floor_is_found(tmp_path: Path) -> None:
    house = planted(tmp_path, finetune__run="from finetune.cellar import wine\n", finetune__cellar__wine="")
    assert [one.target for one in house.upward()] == ["finetune.cellar.wine"]


def test_planted_circles_are_found(tmp_path: Path) -> None:
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from finetune.check.show import x\n"
    house = planted(
        tmp_path,
        finetune__check__show="from finetune.check.survey import y\nfrom finetune.report import tables\n",
        finetune__check__survey=types,
        finetune__report__tables="from finetune.report.plot import z\n",
        finetune__report__plot="def draw():\n    import finetune.check.survey\n",
    )
    assert circles(house.arrows()) == [["check", "report"]]
    assert circles(house.file_arrows()) == [
        ["finetune.check.show", "finetune.check.survey", "finetune.report.plot", "finetune.report.tables"]
    ]


def test_backends_that_import_finetune_are_found(tmp_path: Path) -> None:
    house = planted(tmp_path, backends__memory="from finetune import errors\n", finetune__errors="")
    assert [str(one) for one in house.upward()] == ["backends/memory.py:1 imports finetune.errors"]


def test_the_drawing_names_rooms_arrows_and_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(
        tmp_path,
        finetune__data__read="from finetune.report import tables\n",
        finetune__report__tables="from finetune.data import read\n",
    )
    draw.main([str(tmp_path)])
    shown = capsys.readouterr().out
    for said in ("2 rooms, 2 arrows", "data -> report", "circles: data, report", "finetune/data/read.py:1 imports"):
        assert said in shown

"""A run's list of exports: verification for the report, and the commands that serve them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.disk.atomic import write_file
from finetune.disk.run_files import read_json
from finetune.disk.run_folder import RunFolder

FILE, COMMANDS = "exports/exports.json", "exports.txt"
_MARK = "\nexports, each verified against the run's model:\n"


@dataclass(frozen=True)
class Made:
    """An export that was verified."""

    path: str
    kind: str
    verified: str  # in a line
    commands: list[str]
    notes: list[str]


def remember(run: RunFolder, made: Made) -> None:
    """Raises DiskError, and Incompatible for an exports.json that no run writes."""
    exports = [one for one in exports_of(run) if one.path != made.path] + [made]
    run.write_json(FILE, [asdict(one) for one in exports])
    write_file(run.path / COMMANDS, "\n".join(_as_text(one) for one in exports))
    report = run.path / "report.txt"
    if report.exists():
        write_report(run, report.read_text(encoding="utf-8").partition(_MARK)[0])


def write_report(run: RunFolder, text: str) -> None:
    """report.txt: these figures, and the exports that were made. Raises as `remember` does."""
    exports = [f"  {one.path} ({one.kind}): {one.verified}\n" for one in exports_of(run)]
    write_file(run.path / "report.txt", text + "".join([_MARK, *exports] if exports else []))


def exports_of(run: RunFolder) -> list[Made]:
    """Those that are still there. Raises Incompatible for an exports.json that no run writes."""
    made = read_json(run.path / FILE, list[Made], "remove it, and export again") or []
    return [one for one in made if Path(one.path).exists()]


def _as_text(made: Made) -> str:
    lines = [f"{made.path} ({made.kind}): {made.verified}", *(f"  note: {note}" for note in made.notes)]
    return "\n".join([*lines, *(f"  {command}" for command in made.commands)]) + "\n"

"""The command line's surface: version, groups, completion, and one `run` for each module of commands/."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "finetune"
PANELS = {
    "Start": ["demo", "init", "check", "plan"],
    "Train": ["train", "search", "resume"],
    "Use": [
        "eval",
        "compare",
        "report",
        "duel",
        "benchmark",
        "predict",
        "suspects",
        "next",
        "curve",
        "generate",
        "chat",
        "export",
        "runs",
    ],
    "Tools": ["doctor", "schema"],
}


def finetune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(PACKAGE.parent)} | environment
    surroundings.pop("FORCE_COLOR", None)
    command = [sys.executable, "-m", "finetune", *arguments]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60, check=False)


def test_the_version_is_the_package_s() -> None:
    answer = finetune("--version")
    assert (answer.returncode, answer.stdout) == (0, f"finetune {version('recipe-finetune')}\n")


def test_help_groups_the_commands() -> None:
    panels: dict[str, list[str]] = {}
    for line in finetune("--help").stdout.splitlines():
        if title := re.match(r"╭─ (\w+) ", line):
            commands = panels.setdefault(title[1], [])
        elif name := re.match(r"│ ([a-z]+) ", line):
            commands.append(name[1])
    panels.pop("Options")
    assert list(panels.items()) == list(PANELS.items())


def test_help_names_the_command_as_it_is_installed() -> None:
    assert "Usage: finetune [OPTIONS] COMMAND" in finetune("--help").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_a_shell(shell: str) -> None:
    surroundings = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the shell is named, not looked for
    answer = finetune("--show-completion", shell, **surroundings)
    assert answer.returncode == 0, answer.stderr
    assert "_FINETUNE_COMPLETE" in answer.stdout


def test_completion_offers_the_commands() -> None:
    answer = finetune(_FINETUNE_COMPLETE="complete_bash", COMP_WORDS="finetune re", COMP_CWORD="1")
    assert answer.stdout.split() == ["resume", "report"]


@pytest.mark.parametrize("file", sorted((PACKAGE / "commands").glob("[!_]*.py")), ids=lambda file: file.stem)
def test_every_module_of_commands_has_one_way_in(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert "run" in {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}


def test_the_command_line_renames_nothing() -> None:
    trees = [
        ast.parse((PACKAGE / name).read_text(encoding="utf-8")) for name in ("cli.py", "cli_examine.py", "cli_use.py")
    ]
    imports = [part for tree in trees for part in ast.walk(tree) if isinstance(part, ast.ImportFrom)]
    assert [alias.name for part in imports for alias in part.names if alias.asname] == []
    entries = {alias.name for part in imports if "commands" in str(part.module) for alias in part.names}
    assert entries == {"run"}

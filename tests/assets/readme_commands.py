"""Write the README's table of commands and its exit codes from the code: `python tests/assets/readme_commands.py`.

`tests/unit/test_readme.py` fails when one of them is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- commands: tests/assets/readme_commands.py -->\n", "<!-- end of commands -->"


def usage(command: Any) -> str:
    """The command with its arguments; options are in its --help."""
    words = [command.name]
    for argument in (parameter for parameter in command.params if parameter.param_type_name == "argument"):
        several = "..." if argument.nargs == -1 else ""
        words.append(argument.metavar if argument.required else f"[{argument.metavar}]{several}")
    return " ".join(words).replace("|", "\\|")


def rows() -> Iterator[str]:
    from typer.main import get_command

    from finetune.cli import app

    group: Any = get_command(app)
    for command in group.commands.values():
        yield f"| `{usage(command)}` | {command.help.strip()} |"


def table() -> str:
    return "\n".join(["| command | what it does |", "|---|---|", *rows()]) + "\n"


def exit_codes() -> str:
    """`0 done, 1 bug, ...`: the README's line, short; `finetune.errors.ExitCode` has what each of them means."""
    from finetune.errors import ExitCode

    return ", ".join(f"{code.value} {code.name.lower()}" for code in ExitCode) + "."


def in_readme(text: str) -> str:
    """The table that stands in the text between its two marks."""
    return text.split(BEGIN)[1].split(END)[0]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = re.sub(r"^0 done, .*", exit_codes(), rest.partition(END)[2], flags=re.MULTILINE)
    README.write_text(f"{before}{BEGIN}{table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The pages for people: bounds, links, recipes, commands, promises and pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.events import RunStarted, StepDone
from finetune.recipe.load import load_recipe
from tests.assets import make_demo_svg, readme_commands
from tests.end_to_end.test_run import FILES

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINES, WORDS = 110, 900
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "backends").glob("**/*.md"),
        *(page for page in (ROOT / "tests").glob("**/*.md") if ".pytest_cache" not in page.parts),
    ]
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links to files and headings that are not there. Links to other hosts are not followed."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        missing = not target.exists() or (anchor and anchor not in anchors(target))
        if "://" not in link and missing:
            broken.append(link)
    return broken


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert len(text.split()) <= WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[one](page.md#a-title-here) [two](gone.md) [three](page.md#gone)\n")
    assert broken_links(page) == ["gone.md", "page.md#gone"]


def test_the_tests_that_hold_a_promise_are_there() -> None:
    page = ROOT / "tests" / "README.md"
    promises = [line for line in page.read_text(encoding="utf-8").split("## Promises")[1].splitlines() if "`" in line]
    named = {name for line in promises for name in re.findall(r"`([\w/]+(?:/|\.py))`", line.rsplit("|", 2)[1])}
    assert len(named) > 20
    assert sorted(name for name in named if not (page.parent / name).exists()) == []


def test_every_recipe_in_the_readme_loads(tmp_path: Path) -> None:
    recipes = blocks(README.read_text(encoding="utf-8"), "yaml")
    assert recipes
    for number, recipe in enumerate(recipes):
        file = tmp_path / f"{number}.yaml"
        file.write_text(recipe, encoding="utf-8")
        load_recipe(file)


def test_the_commands_are_those_of_the_command_line() -> None:
    written = readme_commands.in_readme(README.read_text(encoding="utf-8"))
    assert written == readme_commands.table(), "stale; run: python tests/assets/readme_commands.py"


def test_the_exit_codes_are_those_of_the_one_table() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert readme_commands.exit_codes() in lines, "stale; run: python tests/assets/readme_commands.py"


def test_every_command_that_the_readme_shows_is_one() -> None:
    known = set(re.findall(r"^\| `(\w+)", readme_commands.table(), re.MULTILINE))
    shown = "\n".join(blocks(README.read_text(encoding="utf-8"), "sh"))
    used = set(re.findall(r"^finetune (\w+)", shown, re.MULTILINE))
    assert used and used <= known


def test_every_file_of_a_run_is_reported() -> None:
    text = README.read_text(encoding="utf-8").split("## What a run leaves")[1].split("\n## ")[0]
    told = set(re.findall(r"[\w-]+\.(?:jsonl|json|txt|png|yaml|html|csv)|\w+(?=/)", text))
    later = {"eval.json", "suite.json", "benchmark.json", "votes.jsonl", "suspects.csv", "exports", "exports.txt"}
    later |= {"next.jsonl", "curve.json"}
    assert told == FILES | later | {"race.json", "references.json"}


def test_ci_finds_the_test_command() -> None:
    """`.ci/run` takes the README's own command, and runs the other checks between its installation and its pytest."""
    (command,) = (part for part in blocks(README.read_text(encoding="utf-8"), "sh") if "pytest" in part)
    assert f"<!-- test command -->\n```sh\n{command}```" in README.read_text(encoding="utf-8")
    assert command.endswith(" && pytest\n")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    checks = re.findall(r"^(?:ruff|mypy|pytest)\b.*$", script, re.MULTILINE)
    assert checks == ["ruff check .", "ruff format --check .", "mypy", "pytest"]


@pytest.mark.parametrize("name", ["demo.svg", "live.svg"])
def test_pictures_load_nothing_from_elsewhere(name: str) -> None:
    drawn = (ROOT / "tests" / "assets" / name).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"')]+", drawn)) == {"http://www.w3.org/2000/svg"}
    assert "@font-face" not in drawn and "@import" not in drawn


def test_the_picture_is_drawn_from_what_the_demo_prints() -> None:
    output = (
        "\x1b[1mepoch\x1b[0m loss\n"
        "on 200 test rows\naccuracy  50.0%  84.5%\n"
        "label    precision\nnegative 0.795\n"
        "fixed  a.jsonl:1\n       A text.\nfixed  a.jsonl:2\n       Hidden.\nbroken a.jsonl:3\n       Another.\n"
        "1 fixed, 1 broken\n\x1b[1mBetter: accuracy\x1b[0m\n"
    )
    drawn = make_demo_svg.picture(output).replace("&#160;", " ")
    assert all(words in drawn for words in ("accuracy  50.0%", "A text.", "Another.", "1 fixed, 1 broken", "Better:"))
    assert "Hidden." not in drawn and "precision" not in drawn


def test_the_picture_of_the_screen_is_drawn_from_what_a_run_says() -> None:
    told = [
        (0.0, RunStarted(0, 9, 9, False)),
        *((n, StepDone(n, n / 9, 3.0 / n, 1.0, 1e-3, 9, 9, 1.0, 10**9)) for n in range(1, 10)),
    ]
    drawn = make_demo_svg.live_picture(told).replace("&#160;", " ")
    assert all(words in drawn for words in ("training 6/9", "now: step 7 of 9", "0.5000")) and "7/9" not in drawn


def test_the_scripts_say_how_they_are_used() -> None:
    for script in (make_demo_svg, readme_commands):
        name = Path(str(script.__file__)).name
        assert f"python tests/assets/{name}" in str(script.__doc__)
    help_ = [sys.executable, str(ROOT / "tests" / "assets" / "make_demo_svg.py"), "--help"]
    assert subprocess.run(help_, capture_output=True, check=False).returncode == 0

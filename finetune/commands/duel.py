"""`duel`: answers of two models side by side, in random order and without names; a person says which is better."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from backends import registry
from finetune.console import Console, lines
from finetune.data.read import read
from finetune.data.rows import Example
from finetune.disk.atomic import write_file
from finetune.disk.run_files import read_json_lines
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_head import read_head
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import Incompatible
from finetune.evaluation.bradley_terry import Choice, Standing, Vote, about_position, standings
from finetune.evaluation.duel import Answered, Meeting, left_to_vote, meetings
from finetune.evaluation.evaluate import base_weights
from finetune.evaluation.predict import predict
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.report.report import load_evaluation
from finetune.text import shorten
from finetune.training.job import Job
from finetune.training.reopen import ready_to_answer

BASE = "base"
KEYS: dict[str, Choice] = {
    "l": "left", "1": "left", "\x1b[D": "left",
    "r": "right", "2": "right", "\x1b[C": "right",
    "t": "tie", "=": "tie", "s": "skip",
}  # fmt: skip
_ASKED = "[l]eft, [r]ight, [t]ie, [s]kip, [q]uit: "
_PROMPT = 1200  # characters of a prompt that are shown
_NARROW = 70  # columns; narrower, the answers stand one below the other

Runs = Sequence[tuple[RunFolder, Recipe]]


def run(runs: Runs, base: bool, data: str | None, file: Path | None, most: int | None, backend: str | None) -> None:
    """Every vote is in the file before the next one is asked for; at the end it says who is stronger."""
    names = _names(runs)
    with_base = base or len(runs) == 1
    rows = _of_file(runs, names, data, with_base, backend) if data else _recorded(runs, names, with_base)
    models = [*([BASE] if with_base else []), *names]
    file = file or runs[0][0].path / "votes.jsonl"
    votes = read_json_lines(file, Vote, "fix or delete that line, or name another file with --votes") or []
    waiting = left_to_vote(meetings(rows, models, runs[0][1].seed), votes)
    console = Console()
    console.print(f"{len(waiting)} pairs of answers to vote on; the votes go to {file}", soft_wrap=True)
    try:
        for vote in _judged(console, waiting[:most]):
            votes.append(vote)
            write_file(file, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in votes))
    except KeyboardInterrupt:
        console.print()
        console.print("stopped; the same command goes on where it stopped")
        print_standings(console, models, votes)
        raise
    print_standings(console, models, votes)


def _names(runs: Runs) -> list[str]:
    names = [opened.path.resolve().name for opened, _ in runs]
    unique = len({BASE, *names}) == len(names) + 1
    return names if unique else [str(opened.path) for opened, _ in runs]


def _recorded(runs: Runs, names: Sequence[str], base: bool) -> list[Answered]:
    """The answers that the runs wrote to their held-out rows. Raises Incompatible where those are not the same."""
    wanted = [(BASE, runs[0][0], "base")] if base else []
    wanted += [(name, opened, "tuned") for name, (opened, _) in zip(names, runs, strict=True)]
    answers: dict[str, list[str]] = {}
    asked: dict[str, list[tuple[str, str | None]]] = {}
    prompts: list[str] = []
    for name, opened, which in wanted:
        evaluation = load_evaluation(opened.evaluation(which))
        if evaluation is None or any(row.predicted is None for row in evaluation.results):
            raise Incompatible(
                f"{opened.path}: holds no answers of the {which} model to its held-out rows; name rows with --data FILE"
            )
        answers[name] = [str(row.predicted) for row in evaluation.results]
        asked[name] = [(Path(row.location).name, row.expected) for row in evaluation.results]
        prompts = prompts or [row.prompt for row in evaluation.results]
    first = next(iter(asked))
    if others := [name for name in asked if asked[name] != asked[first]]:
        raise Incompatible(
            f"{others[0]} was measured on other rows than {first}; name rows for all of them with --data FILE"
        )
    return _answered([location for location, _ in asked[first]], prompts, answers)


def _of_file(runs: Runs, names: Sequence[str], data: str, base: bool, backend: str | None) -> list[Answered]:
    """The answers of each model to the rows of a file."""
    answers: dict[str, list[str]] = {}
    asked: Sequence[Example] = ()
    for name, (opened, recipe) in zip(names, runs, strict=True):
        source = read(data, Path.cwd(), "test", recipe.data.encoding)
        strict = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_error": "stop"})})
        job, _ = with_progress(ready_to_answer(strict, backend, opened, source))
        check_run_base(opened, job.folder)
        answers |= _of_model(opened, job, name, base and not answers)
        asked = asked or job.prepared.held_out.examples
        registry.free_dropped_models()
    return _answered([one.location for one in asked], [one.prompt for one in asked], answers)


def _of_model(opened: RunFolder, job: Job, name: str, base: bool) -> dict[str, list[str]]:
    """The answers of a run's model, loaded for this alone, to the job's rows; and before them its base's."""
    session = job.open(read_trained(opened))
    rows = session, job.recipe, job.prepared, job.tokenizer, job.recipe.evaluate.max_tokens
    answers: dict[str, list[str]] = {}
    if base:
        with base_weights(session, read_head(opened)):
            answers[BASE] = [one.predicted for one in with_progress(predict(*rows))]
    return answers | {name: [one.predicted for one in with_progress(predict(*rows))]}


def _answered(locations: Sequence[str], prompts: Sequence[str], answers: dict[str, list[str]]) -> list[Answered]:
    """A row whose line gave several examples is told by its number among them."""
    seen: Counter[str] = Counter()
    rows = []
    for i, location in enumerate(locations):
        seen[location] += 1
        name = location if seen[location] == 1 else f"{location}#{seen[location]}"
        rows.append(Answered(name, prompts[i], {model: texts[i] for model, texts in answers.items()}))
    return rows


def _judged(console: Console, waiting: Sequence[Meeting]) -> Iterator[Vote]:
    """A vote for each, until the person ends it."""
    for number, meeting in enumerate(waiting, 1):
        show(console, meeting, f"{number} of {len(waiting)}")
        choice = ask()
        if choice is None:
            return
        yield meeting.voted(choice)


def show(console: Console, meeting: Meeting, title: str) -> None:
    """The prompt and both answers; nothing says whose they are."""
    console.print()
    console.print(lines(f"{title}: {shorten(meeting.prompt, _PROMPT)}", style="dim"))
    answers = {"left": meeting.left_answer, "right": meeting.right_answer}
    table = Table(box=box.ROUNDED, expand=True, show_lines=True)
    if console.width < _NARROW:
        table.add_column("")
        for side, answer in answers.items():
            table.add_row(Text(f"{side}: ", "bold") + Text(answer or "(empty)"))
    else:
        for side in answers:
            table.add_column(side, ratio=1)
        table.add_row(*(Text(answer or "(empty)") for answer in answers.values()))
    console.print(table)


def ask() -> Choice | None:
    """One key of a terminal, or the first letter of a line; None ends it. Raises KeyboardInterrupt."""
    terminal = sys.stdin.isatty()
    while True:
        print(_ASKED, end="", flush=True)
        try:
            key = typer.getchar() if terminal else (sys.stdin.readline() or "q").strip()[:1]
        except EOFError:
            key = "q"
        print()
        if key.lower() == "q":
            return None
        if choice := KEYS.get(key) or KEYS.get(key.lower()):
            return choice


def print_standings(console: Console, models: Sequence[str], votes: Sequence[Vote]) -> None:
    """Who is stronger, by how much, and whether the side decided."""
    between = [vote for vote in votes if vote.left in models and vote.right in models]
    result = standings(models, between)
    if result is None:
        console.print(f"{len(between)} votes: too few to compare all of {', '.join(models)}")
        return
    table = Table("model", "won", "lost", "tied", "strength", "Elo", box=box.SIMPLE_HEAD)
    for stand in result.models:
        table.add_row(*(Text(cell) for cell in _cells(stand)))
    console.print(table)
    for pair in result.preferences:
        low, high = pair.interval
        bounds = f"{100 * low:.1f} to {100 * high:.1f}" + ("" if low > 0.5 else ", no clear difference")
        console.print(f"{pair.first} is preferred to {pair.second} in {100 * pair.share:.1f} % ({bounds})")
    console.print(lines(about_position(between), style="bold"))


def _cells(stand: Standing) -> Iterator[str]:
    elo, (worst, best) = stand.elo
    low, high = stand.interval
    yield from (shorten(stand.model, 40), str(stand.won), str(stand.lost), str(stand.tied))
    yield f"{stand.strength:+.2f} ({low:+.2f} to {high:+.2f})"
    yield f"{elo:.0f} ({worst:.0f} to {best:.0f})"

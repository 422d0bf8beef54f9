"""`generate` and `chat`: ask a run's model, with the very prompt it was trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text

from backends import registry
from backends.interface import Session
from finetune.console import Console
from finetune.data.calls import read_tools
from finetune.data.problems import refuse_rows
from finetune.data.prompt_parts import Beside, completed, parse_columns, with_both_names
from finetune.data.read import read
from finetune.data.renderers import needed, question_tokens
from finetune.data.rows import Rows
from finetune.data.tokenizer import answer_text, stop_tokens
from finetune.disk.digests import cache_folder
from finetune.disk.identity import clock_of
from finetune.disk.run_folder import RunFolder
from finetune.disk.trained_model import check_run_base, read_trained
from finetune.errors import DataError, RecipeError
from finetune.recipe.names import local
from finetune.recipe.schema import Recipe
from finetune.report.live_screen import with_progress
from finetune.text import one_line
from finetune.training.job import Setup, refuse_head, room_for_answer, set_up
from finetune.training.reopen import ready_to_answer

_MOST = 16 * 2**20  # bytes of a file of tools
_REMEMBERED = 1000  # lines that were typed
_LONGEST = 15  # figures of a line's number


class Speaker:
    """A run's model, its tokenizer, and the way its prompts are written."""

    def __init__(self, run: RunFolder, recipe: Recipe, given: Beside, base: bool, backend: str | None) -> None:
        """given: what goes with every question. Raises DataError where training always had more."""
        self.recipe, self.clock = recipe, clock_of(run.path)
        always = run.always()
        given = replace(given, columns=with_both_names(given.columns, recipe.data.columns))
        self.beside, shared = completed(given, needed(recipe) if always is None else always)
        if shared:
            print(f"{one_line(', '.join(shared))}: as in all training rows", file=sys.stderr)
        adapter = read_trained(run)
        self.setup = setup = set_up(recipe, run.path)
        check_run_base(run, setup.folder)
        self.tokenizer, self.stop = setup.tokenizer, stop_tokens(setup.tokenizer)
        self.session: Session = setup.session(registry.choose(backend or recipe.backend), None if base else adapter)

    def question(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation that ends with the user, as the run has written its prompts."""
        return question_tokens(self.recipe, self.tokenizer, messages, self.clock, self.beside)

    def answer(self, prompt: list[int], max_tokens: int, temperature: float, seed: int) -> str:
        return _answer(self.setup, self.session, prompt, self.stop, max_tokens, temperature, seed)


def _answer(
    setup: Setup,
    session: Session,
    prompt: list[int],
    stop: frozenset[int],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    most = room_for_answer(setup, len(prompt), max_tokens)
    written = session.generate([prompt], most, stop, temperature, seed)[0]
    return answer_text(setup.tokenizer, written, stop)


def run(
    opened: RunFolder,
    recipe: Recipe,
    prompt: str | None,
    columns: Sequence[str],
    system: str | None,
    tools: Path | None,
    base: bool,
    temperature: float,
    max_tokens: int,
    backend: str | None,
    row: str | None = None,
) -> None:
    """Answer `prompt`, or the row at FILE:LINE, or talk where both are None. The rest goes with every question."""
    refuse_head(recipe, "generate and chat")
    if row is not None:
        _answer_row(opened, recipe, row, base, temperature, max_tokens, backend)
        return
    speaker = Speaker(opened, recipe, beside(columns, system, tools), base, backend)
    if prompt is None:
        _talk(speaker, f"{opened.path.name}: {'base' if base else 'tuned'} model", temperature, max_tokens)
    else:
        tokens = speaker.question([{"role": "user", "content": prompt}])
        print(speaker.answer(tokens, max_tokens, temperature, speaker.recipe.seed))


def _answer_row(
    opened: RunFolder, recipe: Recipe, row: str, base: bool, temperature: float, max_tokens: int, backend: str | None
) -> None:
    """Answer the prompt that the row at FILE:LINE has under the run's recipe; an answer in it is not read."""
    adapter = read_trained(opened)
    job, _ = with_progress(ready_to_answer(recipe, backend, opened, _row_at(row, recipe)))
    check_run_base(opened, job.folder)
    session = job.open(None if base else adapter)
    split, stop = job.prepared.held_out, frozenset(job.prepared.stop_tokens)
    if split.shortened:
        print("its prompt is shortened (train.max_length)", file=sys.stderr)
    prompt = split.examples[0].prompt_tokens
    print(_answer(job, session, prompt.tolist(), stop, max_tokens, temperature, recipe.seed))


def _row_at(text: str, recipe: Recipe) -> Rows:
    """Raises RecipeError, DataError."""
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal() or len(number) > _LONGEST:
        raise RecipeError(f"--row {text}: write FILE:LINE, such as rows.jsonl:12")
    source = read(str(local(name, Path.cwd()) or name), Path.cwd(), "test", recipe.data.encoding)
    rows, line = [row for row in source.rows if row.line == int(number)], int(number)
    if bad := [problem for problem in source.bad if problem[0].endswith(f":{line}")]:
        refuse_rows(bad)
    if len(rows) != 1:
        last = max((row.line for row in source.rows), default=0)
        raise DataError(
            f"--row {text}: no row there; the last is at line {last}"
            if not rows
            else f"--row {text}: {len(rows)} rows there; name a file in which each row has a line of its own"
        )
    return Rows(rows, [])


def beside(columns: Sequence[str], system: str | None, tools: Path | None) -> Beside:
    """What the command line gives with a question. Raises RecipeError, DataError."""
    return Beside(parse_columns(columns), system, _tools(tools) if tools else ())


def _tools(file: Path) -> tuple[Any, ...]:
    try:
        if file.exists() and not file.is_file():  # a pipe would keep us waiting
            raise DataError(f"{file}: not an ordinary file; write the tools into one")
        if file.stat().st_size > _MOST:
            raise DataError(f"{file}: {file.stat().st_size:,} bytes, and {_MOST:,} are the most for tools")
        tools = read_tools({"tools": file.read_text(encoding="utf-8-sig")}, {})
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if not tools or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{file}: holds no list of tools; write a JSON list of objects, each with a function")
    return tools


def _talk(speaker: Speaker, title: str, temperature: float, max_tokens: int) -> None:
    """Several turns where the recipe trains conversations; otherwise each line is a question of its own."""
    console, typed, turns = Console(), TypedLines(), 0
    messages: list[dict[str, str]] = []
    console.print(f"{title}. An empty line or Ctrl-D ends.")
    while text := typed.ask():
        messages.append({"role": "user", "content": text})
        tokens = speaker.question(messages)
        answer = speaker.answer(tokens, max_tokens, temperature, speaker.recipe.seed + turns)
        turns += 1
        messages.append({"role": "assistant", "content": answer})
        if not _keeps_turns(speaker.recipe):
            messages.clear()
        first = "  " if console.is_terminal else ""  # from a pipe, the answer follows the prompt on its line
        console.print(Text(first + answer.replace("\n", "\n  ")))  # set in, as no line of ours is


def _keeps_turns(recipe: Recipe) -> bool:
    return recipe.data.format in ("chat", "sharegpt") or recipe.prompt.template == "chat"


class TypedLines:
    """Lines that a person types.

    In a terminal the arrows edit the line and bring earlier ones back, also those of other days; they are kept in
    `file`, for its owner alone. From a pipe, lines are read and nothing is kept.
    """

    def __init__(self, file: Path | None = None) -> None:
        """file: where lines are kept; `chat_history` beside what else is remembered for the user if not given."""
        self._file = file or cache_folder() / "chat_history"
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._readline = _readline() if self._terminal else None
        if self._readline:
            with suppress(OSError):  # there is none yet, or it cannot be read
                self._readline.read_history_file(self._file)

    def ask(self) -> str:
        """The next line, without white space around it; empty at the end. Ctrl-C in a terminal begins the line anew."""
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return ""
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                print()
            else:
                self._keep()
                return line

    def _keep(self) -> None:
        """After every line, since a chat may be killed. Nothing depends on it."""
        if self._readline is None:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600))
            self._readline.set_history_length(_REMEMBERED)
            self._readline.write_history_file(self._file)


def _readline() -> Any:
    try:
        import readline  # input() edits lines once it is loaded
    except ImportError:  # Windows, whose console edits lines by itself
        return None
    return readline

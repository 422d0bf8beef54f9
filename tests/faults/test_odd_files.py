"""What is not the file that a command expects, wherever one is read: one sentence with the path, at once."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from finetune.disk.run_folder import create
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import load_job, run_to_report

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files as POSIX has them")
SECONDS = 60  # by the clock: what waits for a pipe waits for ever


@pytest.fixture(scope="module")
def work(make_work: Callable[[], Work]) -> Work:
    """A folder with rows, a model of its own and a finished run."""
    work = make_work()
    rows = [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
    for name in ("rows.jsonl", "valid.jsonl", "test.jsonl"):
        work.lines(name, rows)
    (work.folder / "tools.json").write_text('[{"type": "function", "function": {"name": "look"}}]')
    model = Path(shutil.copytree(work.folder / "model", work.folder / "copy"))
    (work.folder / "model").unlink()
    model.rename(work.folder / "model")
    (work.folder / "model" / "generation_config.json").write_text('{"eos_token_id": 2}')
    work.recipe(RECIPE)
    recipe = load_recipe(work.folder / "recipe.yaml", [f"output={work.folder / 'runs'}"])
    run = create(load_job(recipe).recipe, "done")
    run_to_report(load_job(recipe), run)
    run.path.rename(work.folder / "done")
    (work.folder / "done" / "adapter" / "adapters.safetensors").unlink()  # read where the other format's is not there
    return work


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a socket": bound_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a loop of links": loop,
    "a link to a pipe": lambda path: (pipe(path.with_name("the-pipe")), path.symlink_to("the-pipe"))[0],
    "unreadable": lambda path: (path.touch(), path.chmod(0))[0],
}
PLAN, TRAIN = ["plan", "recipe.yaml"], ["train", "recipe.yaml"]
GENERATE = ["generate", "done", "film", "--max-tokens", "1"]
PLACES: dict[str, tuple[str, list[list[str]]]] = {
    "recipe": ("recipe.yaml", [["check", "recipe.yaml"], PLAN, TRAIN]),
    "rows": ("rows.jsonl", [["check", "rows.jsonl"], ["init", "rows.jsonl", "-o", "new.yaml"], PLAN, TRAIN]),
    "held-out rows": ("valid.jsonl", [PLAN]),
    "--data": ("test.jsonl", [["eval", "done", "--data", "test.jsonl"]]),
    "--tools": ("tools.json", [[*GENERATE, "--tools", "tools.json"]]),
    "an adapter to start from": ("done/adapter/adapter_config.json", [[*TRAIN, "lora.start_from=done/adapter"]]),
    "the adapter's config": ("done/adapter/adapter_config.json", [GENERATE, ["eval", "done"]]),
    "the adapter's weights": ("done/adapter/adapter_model.safetensors", [GENERATE]),
    **{f"the model's {name}": (f"model/{name}", [PLAN]) for name in (
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja",
        "generation_config.json",
    )},
    "the run's recipe": ("done/recipe.yaml", [GENERATE, ["eval", "done"], ["resume", "done"]]),
    "the run's identity": ("done/identity.json", [GENERATE]),
    "the run's account": ("done/data.json", [GENERATE]),
}  # fmt: skip


@contextmanager
def in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def replaced(path: Path, make: Callable[[Path], None]) -> Iterator[None]:
    aside = path.parent.parent / f"aside-{path.name}"
    path.rename(aside)
    try:
        make(path)
        yield
    finally:
        with suppress(OSError):
            path.with_name("the-pipe").unlink()
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        aside.rename(path)


def every(rows: Collection[str], columns: Collection[str], quick: Collection[str]) -> list[Any]:
    """Every pair; those of other columns than the quick ones are slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(a, b, marks=[] if b in quick else slow) for a in rows for b in columns]


@pytest.mark.parametrize(("place", "kind"), every(PLACES, KINDS, ["a pipe", "a loop of links"]))
def test_it_is_told_in_one_sentence(work: Work, place: str, kind: str) -> None:
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    name, commands = PLACES[place]
    with replaced(work.folder / name, KINDS[kind]), in_time():
        for command in commands:
            answer = finetune(work, *command)
            message = answer.failed(answer.code)
            assert answer.code in (2, 3, 6, 7, 8), answer
            assert len(message.splitlines()) == 1, message
            assert Path(name).name in message or "adapter/adapters.safetensors" in message, message


def test_the_whole_is_sound(work: Work) -> None:
    """So that each refusal above is of what was put there."""
    for command in (PLAN, GENERATE, ["eval", "done", "--data", "test.jsonl"]):
        assert finetune(work, *command).code == 0


class Endless(io.StringIO):
    """Standard input that never ends, such as /dev/zero."""

    def read(self, size: int | None = -1, /) -> str:
        assert size is not None
        assert size > 0, "it would be read without a bound"
        return "a" * size


def test_a_prompt_has_an_end(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Endless())
    assert "longer than 16,000,000 characters" in finetune(work, "generate", "done", "-").failed(3)


PATHS = {
    "a recipe's": [["plan", "{}.yaml"], ["check", "{}.yaml"]],
    "rows": [["plan", "recipe.yaml", "data.train={}"], ["check", "{}.csv"], ["init", "{}.csv"]],
    "a model's": [["plan", "recipe.yaml", "model.path={}"]],
    "a run's": [["eval", "{}"], ["resume", "{}"], ["generate", "{}", "a"]],
    "--data": [["eval", "done", "--data", "{}.jsonl"]],
    "--tools": [[*GENERATE, "--tools", "{}"]],
    "an adapter's": [[*TRAIN, "lora.start_from={}"]],
    "an output": [[*TRAIN, "output={}"]],
    "--output": [["init", "rows.jsonl", "--output", "{}/x.yaml"]],
    "--json": [["check", "recipe.yaml", "--json", "{}/x.json"]],
}
NAMES = {
    "too long": "n" * 300, "a path too long": "/".join(["d" * 200] * 30), "a surrogate": "a\udcff",
    "nobody's home": "~nobody-of-that-name/x", "below /proc": "/proc/x/y", "below a device": "/dev/null/y",
    "below a file": "rows.jsonl/y", "a line break": "no\nsuch", "markup": "[/red]",
}  # fmt: skip


@pytest.mark.parametrize(("place", "what"), every(PATHS, NAMES, ["too long", "a surrogate", "a line break"]))
def test_a_path_that_leads_nowhere(work: Work, place: str, what: str) -> None:
    with in_time():
        for command in PATHS[place]:
            answer = finetune(work, *(word.format(NAMES[what]) if "{}" in word else word for word in command))
            if answer.code == 0:
                continue
            message = answer.failed(answer.code)
            assert answer.code in (2, 3, 6, 7, 8), answer
            assert len(message.splitlines()) == 1, message
            assert len(message) < 9000, message

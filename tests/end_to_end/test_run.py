"""A run on every backend: what it leaves, what can be done with it, and that nothing it is stopped by changes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from backends import registry
from tests.end_to_end.command import (
    SIGINT,
    SIGKILL,
    SIGTERM,
    Work,
    losses,
    newest,
    same,
    steps_done,
    stopped,
)

RECIPE = """\
data: {train: train.jsonl, test: test.jsonl}
lora: {rank: 2, alpha: 4, dropout: 0.1, targets: [q_proj, down_proj]}
train: {steps: 40, batch_size: 4, micro_tokens: 160, learning_rate: 1e-2, checkpoint_every: 3}
evaluate: {every: 8}
"""
FILES = {
    "recipe.yaml", "environment.json", "identity.json", "data.json", "metrics.jsonl", "evaluation-base.json",
    "evaluation-tuned.json", "rows.jsonl", "report.json", "report.txt", "loss.png", "confusion.png", "adapter",
    "checkpoints", "check.json", "check.txt", "words.json", "held-out.jsonl", "time.json", "kinds.json",
    "report.html",
}  # fmt: skip
ADAPTER = {
    "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "README.md",
}  # fmt: skip
Trained = tuple[Work, str, Path]
# The quick form has one backend where the work is the shared code's: the conformance tests hold what a backend adds.
ONE_BACKEND = pytest.mark.parametrize(
    "backend", ["mlx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "reference"))], indirect=True
)


@pytest.fixture(scope="module")
def trained(make_work: Callable[[], Work], backend: str) -> Trained:
    """A finished run that nobody stopped, on each backend."""
    work = make_work()
    answer = work.finetune("train", work.recipe(RECIPE), "--backend", backend).good()
    (run,) = work.runs()
    assert "accuracy" in answer.out
    assert str(run.relative_to(work.folder)) in answer.out
    return work, backend, run


@ONE_BACKEND
def test_a_run_leaves_what_was_promised(trained: Trained) -> None:
    _, backend, run = trained
    assert {path.name for path in run.iterdir()} == FILES
    assert {path.name for path in (run / "adapter").iterdir()} == ADAPTER
    assert len(losses(run)) == 40
    report = json.loads((run / "report.json").read_text())
    assert report["backend"] == backend
    assert report["tuned"]["rows"] == 9
    assert report["tuned"]["loss"] < report["base"]["loss"]
    assert [one["step"] for one in report["validations"]] == [0, 8, 16, 24, 32, 40]
    environment = json.loads((run / "environment.json").read_text())
    assert {"numpy", *registry.describe(backend)["versions"]} <= set(environment["libraries"])
    assert "versions" not in environment["device"] and environment["device"]["device"] == report["device"]
    assert set(environment["shortcuts"]) <= set(registry.shortcuts(backend))
    assert bool(environment["shortcuts"]) == (backend != "reference")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in (run / "report.txt").read_text()


@ONE_BACKEND
def test_a_finished_run_says_so(trained: Trained) -> None:
    work, backend, run = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "is finished" in work.finetune("resume", str(run), "--backend", backend).good().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
@ONE_BACKEND
def test_the_run_can_be_measured_and_asked(trained: Trained) -> None:
    work, backend, run = trained
    end = ["--backend", backend]
    ask = ["generate", str(run), "a fine film", "--max-tokens", "4"]
    measured, other, tuned, base, again = work.several(
        ["eval", str(run), *end],
        ["eval", str(run), "--data", "train.jsonl", *end],
        [*ask, *end],
        [*ask, "--base", *end],
        ["generate", str(run), "-", "--max-tokens", "4", *end],
        typed="a fine film",
    )
    report = json.loads((run / "report.json").read_text())
    assert "on 9 rows" in measured.good().out
    assert report["comparison"]["verdict"].split(":")[0] in measured.out
    assert "on 26 rows" in other.good().out
    assert tuned.good().out.strip()
    assert base.good().out != tuned.out, "forty steps should have changed the answer"
    assert again.good().out == tuned.out
    (chat,) = work.several(["chat", str(run), "--max-tokens", "3", *end], typed="hello\n\n")
    assert chat.good().out.startswith(f"{run.name}: tuned model.")


@pytest.mark.slow
def test_the_saved_recipe_runs_again_to_the_same_losses(trained: Trained) -> None:
    work, _, run = trained
    work.finetune("train", str(run / "recipe.yaml")).good()
    same(work.runs()[-1], run)


@ONE_BACKEND
def test_interrupted_terminated_and_killed_it_goes_on_to_the_same_bytes(trained: Trained) -> None:
    work, backend, run = trained
    making = newest(work, len(work.runs()))
    answer = stopped(work, work.start("train", "recipe.yaml", "--backend", backend), making, 4, SIGINT)
    again = making()
    assert again is not None
    assert answer.code == 130, answer
    assert f"finetune resume {again.relative_to(work.folder)}" in answer.err
    assert "Traceback" not in answer.err
    done = steps_done(again)
    answer = stopped(work, work.start("resume", str(again), "--backend", backend), lambda: again, done + 4, SIGTERM)
    assert answer.code == 143, answer
    assert "Traceback" not in answer.err
    done = steps_done(again)
    answer = stopped(work, work.start("resume", str(again), "--backend", backend), lambda: again, done + 5, SIGKILL)
    assert answer.code == -9, answer
    work.finetune("resume", str(again), "--backend", backend).good()
    same(again, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_four_bit_training_leaves_the_same_files(work: Work, name: str) -> None:
    if reason := registry.probe(name):
        pytest.skip(reason)
    recipe = work.recipe(RECIPE.replace("steps: 40", "steps: 6"))
    work.finetune("train", recipe, "quantize=4bit", "--backend", name).good()
    (run,) = work.runs()
    assert {path.name for path in run.iterdir()} == FILES
    assert {path.name for path in (run / "adapter").iterdir()} == ADAPTER
    assert json.loads((run / "report.json").read_text())["scheme"] != "none"


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("torch", "mlx"), ("mlx", "torch")])
def test_a_run_begun_on_one_backend_goes_on_on_the_other(work: Work, first: str, second: str) -> None:
    for name in (first, second):
        if reason := registry.probe(name):
            pytest.skip(reason)
    recipe = work.recipe(RECIPE.replace("dropout: 0.1", "dropout: 0"))
    arguments = ("train", recipe, "train.steps=16", "--backend", first)
    work.finetune(*arguments).good()
    making = newest(work, 1)
    assert stopped(work, work.start(*arguments), making, 5, SIGINT).code == 130
    whole, run = work.runs()
    work.finetune("resume", str(run), "--backend", second).good()
    ours, theirs = losses(run), losses(whole)
    assert [one[0] for one in ours] == [one[0] for one in theirs] == list(range(1, 17))
    for mine, its in zip(ours, theirs, strict=True):
        assert mine[1] == pytest.approx(its[1], rel=1e-4), f"step {mine[0]}"

"""A run resumed, or begun from an adapter, with what does not belong to it: exit 8, saying what differs."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.recipe.load import LAST_KEY
from finetune.recipe.schema import Recipe
from tests.end_to_end.command import Answer, Work

RECIPE = """
data: {train: rows.jsonl, valid: valid.jsonl}
prompt: {template: plain}
lora: {rank: 2, alpha: 4}
train: {steps: 3, batch_size: 4, checkpoint_every: 1}
backend: reference
"""


def finetune(work: Work, *arguments: str) -> Answer:
    """The command in this process: what is heavy is imported once for all of these tests."""
    code = 0
    alone = ["--no-supervisor"] if arguments[0] in ("train", "resume") else []
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(work.folder)
        patch.setattr(sys, "argv", ["finetune", *arguments, *alone])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def trained(work: Work, recipe: str) -> Work:
    """The same folder with the finished run of this recipe, `run`, and what it printed, screen.txt."""
    work.recipe(recipe)
    told = finetune(work, "train", "recipe.yaml", "output=runs").good()
    (work.folder / "screen.txt").write_text(told.out + told.err)
    next((work.folder / "runs").glob("recipe-*")).rename(work.folder / "run")
    return work


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    folder = tmp_path_factory.mktemp("models")
    for name, settings in {"one": {"seed": 0}, "two": {"seed": 1}, "wide": {"hidden_size": 128}}.items():
        model_with_tokenizer(folder / name, num_hidden_layers=1, **settings)
    return folder


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one finished run."""
    work = Work(tmp_path_factory.mktemp("work"), models / "one")
    rows = [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows)
    work.recipe(RECIPE)
    finetune(work, "train", "recipe.yaml").good()
    return work.folder


@pytest.fixture
def work(done: Path, tmp_path: Path, models: Path) -> Work:
    """A copy of it, in which the run was killed after its last checkpoint."""
    found = Work(tmp_path / "copy", models / "one")
    for one in ("rows.jsonl", "valid.jsonl", "recipe.yaml"):
        shutil.copy(done / one, found.folder / one)
    shutil.copytree(done / "runs", found.folder / "runs")
    run = found.runs()[0]
    (run / "report.json").unlink()
    recipe = (run / "recipe.yaml").read_text().replace(str(done), str(found.folder))
    (run / "recipe.yaml").write_text(recipe)
    return found


def swap_model(work: Work, model: Path) -> None:
    (work.folder / "model").unlink()
    (work.folder / "model").symlink_to(model, target_is_directory=True)
    run = work.runs()[0]
    lines = (run / "recipe.yaml").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  path:"))
    lines[at] = f"  path: {model}"
    (run / "recipe.yaml").write_text("\n".join(lines) + "\n")


def test_the_same_run_goes_on(work: Work) -> None:
    finetune(work, "resume", str(work.runs()[0])).good()


@pytest.mark.parametrize("identity", [True, False], ids=["identity.json", "the checkpoint's"])
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("  rank: 2", "  rank: 4", "lora.rank: the checkpoint has 2, this run has 4"),
        ("  alpha: 4.0", "  alpha: 8.0", "lora.alpha"),
        ("seed: 0", "seed: 1", "seed"),
        ("  learning_rate: auto", "  learning_rate: 0.0001", "train.learning rate"),
        ("  steps: 3", "  steps: 5", "train.steps"),
        ("  targets: all", "  targets: [q_proj]", "lora.targets"),
    ],
)
def test_another_recipe(work: Work, old: str, new: str, named: str, identity: bool) -> None:
    run = work.runs()[0]
    text = (run / "recipe.yaml").read_text()
    assert old in text
    (run / "recipe.yaml").write_text(text.replace(old, new))
    if not identity:
        (run / "identity.json").unlink()
    assert named in finetune(work, "resume", str(run)).failed(8)


def test_a_recipe_that_was_cut_off_where_only_defaults_follow(work: Work) -> None:
    run = work.runs()[0]
    text = (run / "recipe.yaml").read_text()
    assert "\nbackend: reference\n" in text and list(Recipe.model_fields)[-1] == LAST_KEY
    for end in ("\nbackend:", f"\n{LAST_KEY}:"):
        (run / "recipe.yaml").write_text(text[: text.index(end)])
        said = finetune(work, "resume", str(run)).failed(8)
        assert f"{run / 'recipe.yaml'}: its end is lost" in said.replace("\n", "")


@pytest.mark.parametrize("which", ["two", "wide"])
def test_another_base(work: Work, models: Path, which: str) -> None:
    swap_model(work, models / which)
    assert "base model weights" in finetune(work, "resume", str(work.runs()[0])).failed(8)


@pytest.mark.parametrize("name", ["rows.jsonl", "valid.jsonl"])
def test_other_rows(work: Work, name: str) -> None:
    text = (work.folder / name).read_text()
    (work.folder / name).write_text(text.replace("film 3", "film 9"))
    assert "data rows" in finetune(work, "resume", str(work.runs()[0])).failed(8)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a":' * 9000, "3"])
def test_an_identity_that_is_none(work: Work, text: str) -> None:
    run = work.runs()[0]
    (run / "identity.json").write_text(text)
    assert "identity.json" in finetune(work, "resume", str(run)).failed(8)


def adapter(work: Work, **keys: Any) -> Path:
    folder = work.runs()[0] / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text()) | keys
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def begin(work: Work, *changes: str) -> tuple[Any, ...]:
    return (work, "train", "recipe.yaml", f"lora.start_from={work.runs()[0] / 'adapter'}", *changes)


def test_a_start_from_its_own_base(work: Work) -> None:
    finetune(*begin(work)).good()


def test_a_start_from_an_adapter_of_another_base(work: Work, models: Path) -> None:
    two = finetune(*begin(work, f"model.path={models / 'two'}"))
    wide = finetune(*begin(work, f"model.path={models / 'wide'}"))
    rank, scale = finetune(*begin(work, "lora.rank=4")), finetune(*begin(work, "lora.alpha=16"))
    assert "other base weights" in two.failed(8)
    assert "other base weights" in wide.failed(8)
    assert "Set lora.rank: 2 and lora.alpha: 4" in rank.failed(8)
    assert "lora.alpha: 4" in scale.failed(8)
    assert not any((run / "evaluation-base.json").exists() for run in work.runs()[1:3])  # said before the long part


def test_a_start_from_a_peft_adapter_of_another_shape(work: Work, models: Path) -> None:
    adapter(work, finetune=None, base_model_name_or_path="someone/else")
    assert "does not fit this model" in finetune(*begin(work, f"model.path={models / 'wide'}")).failed(8)


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_whose_base_was_replaced(work: Work, models: Path, command: str) -> None:
    swap_model(work, models / "two")
    more = ["a film"] if command == "generate" else []
    assert "other base weights" in finetune(work, command, str(work.runs()[0]), *more).failed(8)

"""Every JSON file of a model folder and of a run folder, damaged at random: one sentence that names the file, or a run
that goes on. The commands are run in this process, through the error boundary of the command line.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends import registry
from finetune.disk.run_folder import create
from finetune.errors import Interrupted
from finetune.events import StepDone
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Answer, Work
from tests.faults.test_nonsense_in_a_run import signed
from tests.unit.hostile import damaged_json
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import load_job, run_to_report

MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.json", "model.safetensors.index.json")  # fmt: skip
MADE = {
    "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "added_tokens.json": {"<|im_start|>": 3},
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
    "model.safetensors.index.json": {
        "metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "model.safetensors"},
    },
}  # fmt: skip
STOPPED = ("identity.json", "check.json", "evaluation-base.json", "data.json", "environment.json", "metrics.jsonl",
           "loop.json", "checkpoint: identity.json", "manifest.json")  # fmt: skip
DONE = ("identity.json", "data.json", "adapter_config.json", "report.json", "environment.json", "evaluation-tuned.json")
quick_and_slow = pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def work(make_work: Callable[[], Work]) -> Work:
    """A folder with a stopped run and a finished one, of a model with every JSON file that a model may have."""
    work = make_work()
    rows = [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows)
    model = Path(shutil.copytree(work.folder / "model", work.folder / "copy"))
    (work.folder / "model").unlink()
    model.rename(work.folder / "model")
    for name, value in MADE.items():
        if name not in ("chat_template.json", "model.safetensors.index.json"):
            (work.folder / "model" / name).write_text(json.dumps(value))
    work.recipe(RECIPE)
    recipe = load_recipe(work.folder / "recipe.yaml", [f"output={work.folder / 'runs'}"])
    job = load_job(recipe)
    stopped = create(job.recipe, "stopped")
    with pytest.raises(Interrupted):
        run_to_report(job, stopped, stop=lambda event: isinstance(event, StepDone) and event.step == 2)
    done = create(job.recipe, "done")
    run_to_report(load_job(recipe), done)
    stopped.path.rename(work.folder / "stopped")
    done.path.rename(work.folder / "done")
    return work


def damaged(rng: random.Random, text: str) -> str:
    """The JSON text damaged; often a key is taken away."""
    value = json.loads(text)
    node = value
    while rng.random() < 0.3 and isinstance(node, dict) and node:
        key = rng.choice(list(node))
        if rng.random() < 0.5:
            del node[key]
            break
        node = node[key]
    return damaged_json(rng, value)


def damage(file: Path, rng: random.Random) -> None:
    if file.name == "metrics.jsonl":
        lines = file.read_text().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = damaged(rng, lines[at])
        file.write_text("\n".join(lines) + "\n")
    elif file.name == "tokenizer.json" and rng.random() < 0.7:
        whole = json.loads(file.read_text())
        many = {"model": {key: whole["model"].pop(key) for key in ("vocab", "merges")}}
        many["added_tokens"] = whole.pop("added_tokens")
        changed = damaged(rng, json.dumps(whole))
        try:
            value = json.loads(changed)
            value["model"] |= many["model"]
            value.setdefault("added_tokens", many["added_tokens"])
            changed = json.dumps(value)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        file.write_text(changed)
    else:
        text = file.read_text() if file.exists() else json.dumps(MADE[file.name])
        file.write_text(damaged(rng, text))


def looked_at(answer: Answer, names: tuple[str, ...], changed: str) -> None:
    shown = (answer, changed[:2000])
    assert answer.code in (0, 2, 3, 6, 7, 8), shown
    assert "Traceback" not in answer.err, shown
    if answer.code:
        message = answer.failed(answer.code)
        assert any(name in message for name in names), shown
        assert len(message) < 2000, shown


def commands_take(work: Work, part: str, file: Path, rng: random.Random, *commands: list[str]) -> None:
    """`file` is damaged in a copy of the folder `part`, and each command is run on the copy."""
    before = Path(shutil.copytree(work.folder / part, work.folder / "before", symlinks=True))
    try:
        damage(work.folder / part / file, rng)
        changed = (work.folder / part / file).read_text()
        if "checkpoints" in file.parts and file.name != "manifest.json":
            signed((work.folder / part / file).parent)
        for command in commands:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of transformers, at odd settings
                answer = finetune(work, *command)
            of_another = ["belongs to another run"] * (file.name == "identity.json")  # and what differs
            looked_at(answer, (file.name, str(work.folder / "model"), *of_another), changed)
    finally:
        shutil.rmtree(work.folder / part)
        before.rename(work.folder / part)
        shutil.rmtree(work.folder / "runs", ignore_errors=True)


def fuzz(test: Callable[[random.Random], None], examples: int) -> None:
    ours = settings(max_examples=examples, database=None, derandomize=examples < 100,
                    suppress_health_check=list(HealthCheck))  # fmt: skip
    ours(given(st.randoms(use_true_random=False))(test))()


@quick_and_slow
@pytest.mark.parametrize("name", MODEL)
def test_a_model_folder(work: Work, name: str, times: int) -> None:
    def test(rng: random.Random) -> None:
        commands_take(work, "model", Path(name), rng, ["plan", "recipe.yaml"])

    fuzz(test, 4 * times)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in registry.NAMES if name != "reference"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_model_folder_under_its_library(work: Work, name: str, backend: str) -> None:
    if reason := registry.probe(backend):
        pytest.skip(reason)

    def test(rng: random.Random) -> None:
        settings = [f"backend={backend}", "device=cpu", "train.steps=1"]
        commands_take(work, "model", Path(name), rng, ["train", "recipe.yaml", *settings])

    fuzz(test, 60)


def newest(run: Path, name: str) -> Path:
    inside = {"loop.json", "checkpoint: identity.json", "manifest.json"}
    where = max((run / "checkpoints").iterdir()).relative_to(run) if name in inside else Path()
    return where / name.removeprefix("checkpoint: ")


@quick_and_slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (place % 2)) for place, name in enumerate(STOPPED)]
)
def test_a_stopped_run(work: Work, name: str, times: int) -> None:
    file = newest(work.folder / "stopped", name)
    if not (work.folder / "stopped" / file).exists():
        pytest.skip("a stopped run has none")

    def test(rng: random.Random) -> None:
        commands_take(work, "stopped", file, rng, ["resume", "stopped"])

    fuzz(test, 3 * times)


@quick_and_slow
@pytest.mark.parametrize("name", DONE)
def test_a_finished_run(work: Work, name: str, times: int) -> None:
    file = next((f.relative_to(work.folder / "done") for f in (work.folder / "done").rglob(name)), None)
    if file is None:
        pytest.skip("a finished run has none")

    def test(rng: random.Random) -> None:
        generate = ["generate", "done", "film 1", "--max-tokens", "2"]
        commands_take(work, "done", file, rng, ["eval", "done"], generate, ["resume", "done"])

    fuzz(test, 3 * times)

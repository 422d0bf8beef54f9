"""No key of the recipe is read by nothing: a valid change of each changes what is done.

For each key `CASES` says what to look at: it must be the same twice with the same recipe, and another after the
change. What is looked at is what runs: batches, rates, losses of real steps, files of whole runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backends.interface import BackendError
from backends.model_folder import ModelFolder
from finetune.data.collate import micro_batches, step_indices
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import FinetuneError
from finetune.events import Validated
from finetune.recipe.load import check_recipe
from finetune.recipe.schedule import learning_rate, make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import model_spec
from finetune.report.tracker import tracking
from finetune.training.job import Job, find_folder
from finetune.training.suite_prompts import ready_with_suite
from tests.unit.test_recipe import keys
from tests.unit.toy_run import load_job, result_of, run_to_report

Values = dict[str, Any]  # dotted key -> value


class World:
    """A folder with models and data, and the recipe that every case begins with."""

    def __init__(self, folder: Path, models: tuple[Path, Path]) -> None:
        self.folder, self.models = folder, models
        words = ("a dull bad cold film", "a fine good warm film")
        rows = [{"text": f"{words[i % 2]} {i}", "label": ("bad", "good")[i % 2], "other": f"it {i}"} for i in range(12)]
        self.write("rows", rows)
        self.write("more", [*rows, rows[0] | {"text": "one film more"}])
        self.write("long", [*rows, rows[0] | {"text": "a fine film and " * 30}])
        self.write("less", rows[:8])
        accents = (folder / "rows.jsonl").read_text().replace("film", "filmé")
        (folder / "accents.jsonl").write_text(accents, "utf-8")
        self.write("broken", [*rows, {"text": "no label"}])
        talks = []
        for i in range(8):
            turns = [("user", f"what is {i}"), ("assistant", "a film"), ("user", "and this"), ("assistant", f"it {i}")]
            talks.append({"messages": [{"role": role, "content": content} for role, content in turns]})
        self.write("talks", talks)
        self.write("pairs", [{"prompt": f"what is {i}", "chosen": "fine", "rejected": "bad"} for i in range(8)])
        self.write("answers", [{"prompt": f"what is {i}", "completion": "a fine film"} for i in range(8)])

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, values: Values) -> Recipe:
        start: Values = {
            "model.path": str(self.models[0]), "data.train": "rows", "data.valid": "less", "prompt.template": "plain",
            "lora.rank": 2, "lora.alpha": 4.0, "lora.targets": ["q_proj", "v_proj"], "train.steps": 3,
            "train.batch_size": 4, "train.learning_rate": 0.02, "train.warmup": 0.0, "backend": "reference",
            "output": str(self.folder / "runs"),
        }  # fmt: skip
        tree: dict[str, Any] = {}
        for key, value in (start | values).items():
            *section, name = key.split(".")
            if key in ("data.train", "data.valid", "data.test", "evaluate.suite") and value is not None:
                value = str(self.folder / f"{value}.jsonl")
            (tree.setdefault(section[0], {}) if section else tree)[name] = value
        return check_recipe(tree)

    def job(self, values: Values) -> Job:
        return load_job(self.recipe(values))


def examples(world: World, values: Values) -> Any:
    """What is trained on and measured."""
    found = world.job(values).prepared
    splits = (found.train, found.valid, found.test)
    return [
        [(one.tokens.tolist(), one.weights.tolist()) for one in split.examples] for split in splits if split
    ], found.labels


def rates(world: World, values: Values) -> Any:
    """The plan and the rate of every step."""
    recipe = world.recipe(values)
    plan = make_plan(recipe, 12)
    return plan, [learning_rate(recipe, plan, step) for step in range(plan.steps)]


def batches(world: World, values: Values) -> Any:
    """The rows of the first step, and how they are cut."""
    job = world.job(values)
    rows, train = job.prepared.train.examples, job.recipe.train
    chosen = step_indices(len(rows), train.batch_size, job.recipe.seed, 0)
    return chosen, [batch.inputs.shape for batch in micro_batches([rows[i] for i in chosen], train.micro_tokens)]


def steps(world: World, values: Values) -> Any:
    """Losses, norms and weights of three steps; or why there are none."""
    job = world.job(values)
    try:
        session = job.open()
    except BackendError as error:
        return str(error)
    rows, recipe = job.prepared.train.examples, job.recipe
    plan = make_plan(recipe, len(rows))
    told = []
    for step in range(3):
        chosen = step_indices(len(rows), recipe.train.batch_size, recipe.seed, step)
        rate = learning_rate(recipe, plan, step)
        told.append(session.step(micro_batches([rows[i] for i in chosen], 4096), rate))
    return told, {name: hashlib.sha256(one.tobytes()).hexdigest() for name, one in session.get_state().adapter.items()}


def whole_run(world: World, values: Values) -> Any:
    """The files that a whole run leaves, without times and places."""
    job = world.job(values)
    run = create(job.recipe, "run")
    events: list[Any] = []
    run_to_report(job, run, events=events)
    names = ("rows.jsonl", "adapter/adapter_model.safetensors", "evaluation-base.json")
    files = {name: (run.path / name).read_text("latin-1") for name in names if (run.path / name).exists()}
    return files, [type(event).__name__ for event in events if type(event).__name__ != "Progress"]


def analysis(world: World, values: Values) -> Any:
    """What is said of the errors."""
    job = world.job(values)
    told = run_to_report(job, create(job.recipe, "run")).analysis
    return told and told.to_json()


def checkpoints(world: World, values: Values) -> Any:
    """The steps of the checkpoints that a run leaves."""
    job = world.job(values)
    run = create(job.recipe, "run")
    run_to_report(job, run)
    return sorted(path.name for path in run.checkpoints.iterdir())


def from_an_adapter(world: World, values: Values) -> Any:
    """As a whole run, that may begin from the adapter of another."""
    if values.get("lora.start_from"):
        job = world.job({"seed": 5})
        first = create(job.recipe, "first")
        run_to_report(job, first)
        values = values | {"lora.start_from": str(first.adapter)}
    return whole_run(world, values)


def bad_row(world: World, values: Values) -> Any:
    try:
        return len(world.job(values).prepared.train.examples)
    except FinetuneError as error:
        return error.exit_code


def task(world: World, values: Values) -> Any:
    return world.job(values).prepared.task


def hub(world: World, values: Values) -> Any:
    """What the hub is asked for."""
    import huggingface_hub

    from finetune.recipe.locate import model_folder

    asked: list[Any] = []

    def download(*args: Any, **named: Any) -> str:
        asked.append((args, named["revision"]))
        return str(world.models[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", download)
        model_folder(world.recipe({"model.path": "someone/something"} | values).model)
    return asked


def remote_code(world: World, values: Values) -> Any:
    recipe = world.recipe(values)
    return model_spec(recipe, find_folder(recipe)).remote_code


def checkpointing(world: World, values: Values) -> Any:
    recipe = world.recipe(values)
    return model_spec(recipe, find_folder(recipe)).checkpointing


def backend(world: World, values: Values) -> Any:
    return world.job(values).backend


def device(world: World, values: Values) -> Any:
    """What a machine with a GPU is asked for: the only thing that the key changes where there is none."""
    recipe = world.recipe(values)
    return model_spec(recipe, find_folder(recipe)).device


def output(world: World, values: Values) -> Any:
    return create(world.recipe(values), "run").path.parent


def suite(world: World, values: Values) -> Any:
    """The cases that the models are to be asked."""
    world.write("cases", [{"text": "a film", "checks": {"one_of": ["good", "bad"]}}])
    job = result_of(ready_with_suite(world.recipe(values), None))
    return job.suite and [case.row for case in job.suite.cases]


def tracked(world: World, values: Values) -> Any:
    """What the package of the tracker, which need not be installed, is told."""
    told: list[Any] = []
    package = types.ModuleType("trackio")
    vars(package).update(init=lambda **named: None, finish=lambda: None, log=lambda *figures, **named: told.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trackio", package)
        with tracking(world.recipe(values).tracker, RunFolder(world.folder)) as track:
            track(Validated(0, 0.0, None, 1.0, 2.0, 0.5, None, True, 0.1))
    return told


def survey(world: World, values: Values) -> Any:
    """What `finetune check` says of the groups."""
    from finetune.check.balance import weigh
    from finetune.data.prepare import prepare
    from finetune.data.tokenizer import load_tokenizer

    recipe = world.recipe(values)
    prepared = result_of(prepare(recipe, load_tokenizer(ModelFolder.open(world.models[0])), Path.cwd()))
    return weigh(prepared.splits, ("bad", "good"), recipe.data.groups).groups


@dataclass(frozen=True)
class Case:
    look: Callable[[World, Values], Any]
    value: Any  # the change; for a path of this world, its name
    start: Values = field(default_factory=dict)  # beside what every case begins with


LONG = {"data.train": "long", "train.max_length": 32, "data.max_dropped": 0.5}
CHAT = {"data.train": "talks", "data.valid": None, "prompt.template": "chat"}
OPEN = {"data.train": "answers", "data.valid": None, "evaluate.base": False}
WILD = {"train.learning_rate": 5.0, "train.steps": 40, "evaluate.every": 1, "evaluate.base": False}
CASES = {
    "model.path": Case(steps, "the other model"),
    "model.revision": Case(hub, "0" * 40),
    "model.dtype": Case(steps, "bfloat16"),
    "model.remote_code": Case(remote_code, True),
    "task": Case(task, "generation"),
    "data.train": Case(examples, "more"),
    "data.valid": Case(examples, "rows"),
    "data.test": Case(examples, "rows"),
    "data.format": Case(examples, "text"),
    "data.encoding": Case(examples, "cp1252", {"data.train": "accents"}),
    "data.columns": Case(examples, {"text": "other"}),
    "data.labels": Case(examples, ["good", "bad"]),
    "data.valid_fraction": Case(examples, 0.4, {"data.valid": None}),
    "data.limit": Case(examples, 3),
    "data.on_error": Case(bad_row, "skip", {"data.train": "broken", "data.max_dropped": 0.5}),
    "data.max_dropped": Case(bad_row, 0.5, {"data.train": "broken", "data.on_error": "skip"}),
    "data.long_rows": Case(examples, "split", LONG | {"data.format": "text", "data.max_dropped": 0.9}),
    "data.groups": Case(survey, {"warm": ["warm"]}),
    "prompt.template": Case(examples, "alpaca"),
    "prompt.system": Case(examples, "be brief", CHAT),
    "prompt.completion": Case(examples, "so: {label}"),
    "prompt.loss_on": Case(examples, "last", CHAT),
    "prompt.end_token": Case(examples, False),
    "lora.rank": Case(steps, 3),
    "lora.alpha": Case(steps, 7.0),
    "lora.dropout": Case(steps, 0.5),
    "lora.rslora": Case(steps, True),
    "method": Case(steps, "full", {"lora.rank": 8, "lora.alpha": 16.0, "lora.targets": "all"}),
    "lora.dora": Case(steps, True),
    "lora.targets": Case(steps, ["down_proj"]),
    "lora.layers": Case(steps, 1),
    "lora.start_from": Case(from_an_adapter, "an adapter"),
    "head.first_epochs": Case(whole_run, 0, {"head.first_epochs": 9, "prompt.template": "{text}"}),
    "preferences.loss": Case(whole_run, "orpo", {"data.train": "pairs", "data.valid": None, "preferences.loss": "dpo"}),
    "preferences.beta": Case(whole_run, 0.9, {"data.train": "pairs", "data.valid": None, "preferences.beta": 0.1}),
    "quantize": Case(steps, "4bit"),
    "train.epochs": Case(rates, 2, {"train.steps": None, "train.epochs": 1}),
    "train.steps": Case(rates, 4),
    "train.batch_size": Case(batches, 5),
    "train.micro_tokens": Case(batches, 16),
    "train.learning_rate": Case(steps, 0.01),
    "train.schedule": Case(rates, "cosine", {"train.steps": 9}),
    "train.warmup": Case(rates, 0.5, {"train.steps": 9}),
    "train.weight_decay": Case(steps, 0.5),
    "train.clip_norm": Case(steps, 1e-4),
    "train.max_length": Case(examples, 12),
    "train.truncation": Case(examples, "drop", LONG),
    "train.gradient_checkpointing": Case(checkpointing, True),
    "train.early_stopping": Case(whole_run, 1, WILD),
    "train.checkpoint_every": Case(rates, 2),
    "train.checkpoint_minutes": Case(checkpoints, 1e-9, {"train.steps": 6, "train.checkpoint_every": 6}),
    "evaluate.every": Case(rates, 2),
    "evaluate.generate": Case(whole_run, False, OPEN),
    "evaluate.max_tokens": Case(whole_run, 1, OPEN),
    "evaluate.answer": Case(whole_run, "json", OPEN),
    "evaluate.base": Case(whole_run, False),
    "evaluate.forgetting": Case(analysis, False),
    "evaluate.swaps": Case(analysis, [["fine", "warm"]]),
    "evaluate.suite": Case(suite, "cases"),
    "seed": Case(steps, 1),
    "backend": Case(backend, "torch"),
    "device": Case(device, "cpu"),
    "tracker": Case(tracked, "trackio"),
    "output": Case(output, "elsewhere"),
}


def test_every_key_has_a_case() -> None:
    assert set(CASES) == set(keys(Recipe))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    folder = tmp_path_factory.mktemp("models")
    one = model_with_tokenizer(folder / "one")
    return one, model_with_tokenizer(folder / "two", hidden_size=32)


@pytest.fixture
def world(tmp_path: Path, models: tuple[Path, Path]) -> World:
    return World(tmp_path, models)


@pytest.mark.parametrize("key", list(CASES))
def test_a_change_of_the_key_changes_what_is_done(world: World, key: str) -> None:
    case = CASES[key]
    named = {"model.path": str(world.models[1]), "output": str(world.folder / "elsewhere")}
    value = named.get(key, case.value)
    before = case.look(world, case.start)
    assert case.look(world, case.start) == before, "the same recipe twice, and not the same"
    start = case.start | ({"train.steps": None} if key == "train.epochs" else {})
    assert case.look(world, start | {key: value}) != before, f"{key} is read by nothing"


def test_a_key_that_is_read_by_nothing_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from finetune.training import job as jobs

    real = jobs.optim_spec
    monkeypatch.setattr(jobs, "optim_spec", lambda recipe: replace(real(recipe), weight_decay=0.0))
    with pytest.raises(AssertionError, match="read by nothing"):
        test_a_change_of_the_key_changes_what_is_done(world, "train.weight_decay")

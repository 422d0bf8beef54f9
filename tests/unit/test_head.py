"""A classification head: first alone, on the frozen model's states, and then with the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from backends.interface import HEAD_WEIGHT
from finetune.check.retrain import without_rows
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import ExitCode
from finetune.events import Event, Note, StepDone
from finetune.recipe.load import load_recipe
from finetune.training.head_first import fit
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune, trained
from tests.unit.toy_run import Wrapped, load_job, run_to_report, run_until_killed

LABELS = ("bad", "good", "a long label, of some words")
WORDS = ("it is dull", "it is fine", "what is this")
HEADED = RECIPE.replace("plain}", '"{text}"}') + "head: {first_epochs: 30}\n"


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{i} {WORDS[i % 3]}", "label": LABELS[i % 3]} for i in range(start, start + count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with one finished run, `run`."""
    work = Work.of_one_block(tmp_path_factory)
    work.lines("rows.jsonl", rows(18))
    work.lines("valid.jsonl", rows(9, 100))
    return trained(work, HEADED.replace("steps: 3", "steps: 9"))


def clusters(seed: int, count: int, apart: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """States [n, 4] of three classes around three points, in numbers of very unlike sizes."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 3
    points = apart * np.eye(4, dtype=np.float32)[classes] + rng.standard_normal((count, 4))
    return (points * [1.0, 100.0, 0.01, 5.0]).astype(np.float32), classes


def test_a_fitted_head_is_logistic_regression() -> None:
    """At the minimum the gradient of the mean loss is 0."""
    states, classes = clusters(0, 300, apart=1.0)
    weight = fit(states, classes, 300, 3, 500).weight.astype(np.float64)
    logits = states @ weight.T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    shares[np.arange(300), classes] -= 1
    gradient = shares.T @ (states / np.sqrt(np.square(states).mean(0))) / 300
    assert np.abs(gradient).max() < 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), passes=st.integers(1, 40))
def test_the_pass_of_the_lowest_validation_loss_is_kept(seed: int, passes: int) -> None:
    states, classes = clusters(seed, 40)
    found = fit(states, classes, 25, 3, passes)
    assert len(found.losses) <= passes + 2
    assert found.losses[found.best] == min(found.losses) <= np.log(3) + 1e-9
    logits = states[25:] @ found.weight.T
    logits = logits - logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -logs[np.arange(15), classes[25:]].mean()
    assert loss == pytest.approx(found.losses[found.best], rel=1e-3, abs=1e-5)


def test_classes_that_a_plane_parts_stay_finite() -> None:
    states, classes = clusters(1, 30, apart=1e3)
    found = fit(states, classes, 30, 3, 2000)
    assert np.isfinite(found.weight).all() and found.losses[-1] < 1e-2


def test_the_base_is_the_head_alone_and_the_tuned_model_has_both(made: Work) -> None:
    run = made.folder / "run"
    head = load_file(run / "head.safetensors")[HEAD_WEIGHT]
    assert head.shape == (3, 64) and head.any()
    tuned = load_file(run / "adapter" / "adapter_model.safetensors")[f"base_model.model.{HEAD_WEIGHT}"]
    report = json.loads((run / "report.json").read_text())
    assert report["base"]["accuracy"] > 0.6 and report["base"]["loss"] < np.log(3)
    assert report["tuned"]["loss"] < report["base"]["loss"] and not np.array_equal(head, tuned)
    assert "head alone" in report["held_out"]
    first = json.loads((run / "evaluation-base.json").read_text())
    assert {row["predicted"] for row in first["results"]} <= {*LABELS}
    assert report["validations"][0]["loss"] == pytest.approx(report["base"]["loss"])


def test_commands_measure_and_label_with_the_head(made: Work) -> None:
    run = json.loads((made.folder / "run" / "report.json").read_text())
    finetune(made, "eval", "run").good()
    again = json.loads((made.folder / "run" / "eval.json").read_text())
    for model in ("base", "tuned"):
        assert again[model]["accuracy"] == run[model]["accuracy"]
        assert again[model]["loss"] == pytest.approx(run[model]["loss"])
    made.lines("new.jsonl", [{"text": row["text"]} for row in rows(9, 100)])
    finetune(made, "predict", "run", "new.jsonl", "-o", "out.jsonl").good()
    told = [json.loads(line) for line in (made.folder / "out.jsonl").read_text().splitlines()]
    measured = [json.loads(line) for line in (made.folder / "run" / "rows.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in told] == [row["tuned"]["predicted"] for row in measured]
    for row in told:
        assert list(row["probability"]) == sorted(LABELS)
        assert sum(row["probability"].values()) == pytest.approx(1, abs=1e-5)
        assert max(row["probability"], key=row["probability"].get) == row["predicted"]
    assert "[good]" in finetune(made, "check", "recipe.yaml").good().out


def test_a_model_of_fewer_rows_has_a_head_of_those_rows(made: Work, tmp_path: Path) -> None:
    """Whatever the run has kept: its head learned from all of them."""
    job = load_job(load_recipe(made.folder / "recipe.yaml"))
    rows = [example.location for example in job.prepared.train.examples]
    events = list(without_rows(job, job.open(), RunFolder(made.folder / "run"), rows[9:], 60.0))
    (told,) = [event.text for event in events if isinstance(event, Note) and event.text.startswith("head first")]
    assert f"head first: {9 + len(job.prepared.valid.examples)} rows" in told


@pytest.mark.parametrize("command", [["generate", "run", "a film"], ["export", "run", "--to", "merged"]])
def test_what_needs_text_is_refused_with_a_remedy(made: Work, command: list[str]) -> None:
    answer = finetune(made, *command)
    assert answer.code == ExitCode.RECIPE
    assert "finetune predict RUN FILE" in answer.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("task: generation\n", "chooses among labels"),
        ("data.format: chat\n", "chooses among labels"),
        ("lora.start_from: run/adapter\n", "no start"),
        ("prompt.loss_on: all\n", "only the label"),
    ],
)
def test_recipes_that_a_head_does_not_fit_are_refused(made: Work, more: str, said: str) -> None:
    key, value = more.strip().split(": ")
    answer = finetune(made, "train", "recipe.yaml", f"{key}={value}")
    assert answer.code == ExitCode.RECIPE and said in answer.err


def test_rows_without_labels_take_no_head(made: Work) -> None:
    made.lines("talk.jsonl", [{"prompt": f"what is {i}", "completion": "a film"} for i in range(8)])
    answer = finetune(made, "train", "recipe.yaml", "data.train=talk.jsonl", "data.valid=talk.jsonl")
    assert answer.code == ExitCode.RECIPE and "head: it chooses among labels" in answer.err


class Counted(Wrapped):
    """Counts the rows whose states are read."""

    read = 0

    def states(self, batch: Any) -> Any:
        type(self).read += len(batch.inputs)
        return self.inner.states(batch)


@pytest.mark.parametrize("passes", [1, 200])
def test_each_row_goes_through_the_model_once(
    made: Work, passes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = load_job(load_recipe(made.folder / "recipe.yaml", [f"head.first_epochs={passes}", f"output={tmp_path}"]))
    opened = type(job).open
    monkeypatch.setattr(type(job), "open", lambda job, adapter=None: Counted(opened(job, adapter)))
    monkeypatch.setattr(Counted, "read", 0)
    events: list[Event] = []
    run_to_report(job, create(job.recipe, "counted"), events=events)
    assert Counted.read == 27  # train and valid
    assert any(isinstance(event, Note) and event.text.startswith("head first: 27 rows") for event in events)


@pytest.mark.parametrize("after", [None, 0, 4])
def test_a_run_that_goes_on_ends_with_the_same_bytes(made: Work, after: int | None, tmp_path: Path) -> None:
    """after: the step it was stopped after; None: while the head was trained."""
    job = load_job(load_recipe(made.folder / "recipe.yaml", [f"output={tmp_path}"]))
    run = create(job.recipe, "stopped")
    with pytest.raises(Exception, match="stopped"):
        run_to_report(job, run, stop=lambda event: _is_due(event, after))
    assert not run.report.exists()
    run_to_report(load_job(load_recipe(run.recipe)), run, resume=True)
    for name in ("head.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        ours, theirs = (run.path / name).read_bytes(), (made.folder / "run" / name).read_bytes()
        assert ours == theirs, name


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_ends_with_the_same_bytes(made: Work, step: int, tmp_path: Path) -> None:
    job = load_job(load_recipe(made.folder / "recipe.yaml", [f"output={tmp_path}"]))
    run = create(job.recipe, "killed")
    run_until_killed(job, run, step)
    run_to_report(load_job(load_recipe(run.recipe)), run, resume=True)
    for name in ("head.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.path / name).read_bytes() == (made.folder / "run" / name).read_bytes(), name


def _is_due(event: Event, after: int | None) -> bool:
    if after is None:
        return getattr(event, "what", "") == "head: states"
    return (isinstance(event, StepDone) and event.step == after) or (after == 0 and isinstance(event, Note))


def test_a_head_that_no_run_writes_is_refused(made: Work, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(made.folder / "run", copy)
    RunFolder(copy).head.write_bytes(b"not a head")
    answer = finetune(made, "eval", str(copy))
    assert answer.code == ExitCode.INCOMPATIBLE and "head.safetensors" in answer.err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_folder_is_one_of_peft_for_sequences(made: Work, backend: str, tmp_path: Path) -> None:
    """Logits equal to 1e-5 in AutoModelForSequenceClassification, by the very lines of the folder's README."""
    pytest.importorskip("peft")
    import torch

    recipe = load_recipe(
        made.folder / "recipe.yaml",
        [f"output={tmp_path}", f"backend={backend}", "evaluate.base=false", "train.learning_rate=0.01"],
    )
    job = load_job(recipe)
    run = create(job.recipe, "peft")
    report = run_to_report(job, run)
    assert {one.library: one.fits for one in report.loads} == {"PEFT": True, "mlx-lm": None}
    assert not (run.adapter / "adapters.safetensors").exists()
    readme = (run.adapter / "README.md").read_text()
    names: dict[str, Any] = {}
    code = readme.split("```python\n")[1].split("```")[0].replace("'.'", repr(str(run.adapter)))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        exec(code, names)
    model = names["model"]
    assert [model.config.id2label[i] for i in range(3)] == list(job.prepared.labels)
    for example, result in zip(job.prepared.valid.examples, report.tuned.results, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.prompt_tokens.astype(np.int64))[None]).logits[0]
        nll = -torch.log_softmax(logits, -1)[job.prepared.labels.index(result.expected or "")]
        assert float(nll) == pytest.approx(result.loss, abs=1e-5)
        assert job.prepared.labels[int(logits.argmax())] == result.predicted

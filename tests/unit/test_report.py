"""A run from recipe to report: what is compared with what, what is written, and what a resumed run shares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import Session
from finetune.disk.metrics import read
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import Diverged, Incompatible, Interrupted
from finetune.evaluation.evaluate import Evaluation, RowResult, evaluate_held_out
from finetune.evaluation.intervals import mcnemar_exact
from finetune.events import Event, Finished, Note, Progress, StepDone
from finetune.recipe.load import check_recipe, dump_recipe, load_recipe
from finetune.recipe.schema import Recipe
from finetune.report.report import compare, load_evaluation, save_evaluation
from finetune.training import job as jobs
from finetune.training import ready_trainer
from finetune.training.job import Job
from tests.unit.toy_run import Poisoned, Wrapped, curve, load_job, result_of, run_to_report


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    return model_with_tokenizer(tmp_path_factory.mktemp("model"))


def rows(file: Path, first: int = 0, count: int = 18) -> str:
    words = {"positive": "a fine good warm film", "negative": "a dull bad cold film"}
    labels = ["positive", "negative"]
    lines = [{"text": f"{words[labels[i % 2]]} {i}", "label": labels[i % 2]} for i in range(first, first + count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Recipe:
    return check_recipe(
        {
            "model": {"path": str(model)},
            "data": {"train": rows(tmp_path / "train.jsonl"), "test": rows(tmp_path / "test.jsonl", 50, 9)},
            "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]},
            "train": {"epochs": 2, "batch_size": 4, "learning_rate": 0.02},
            "backend": "reference",
            "output": str(tmp_path / "runs"),
        }
    )


def measured(events: list[Event], name: str) -> bool:
    return any(isinstance(event, Progress) and event.what.startswith(name) for event in events)


def run_of(recipe: Recipe) -> tuple[RunFolder, Any, list[Event]]:
    run, events = create(recipe, "toy"), []
    return run, run_to_report(load_job(recipe), run, events=events), events


def stopped(recipe: Recipe, after: int) -> RunFolder:
    """A run that was asked to stop once its screen had shown so many steps."""
    run = create(recipe, "toy")
    with pytest.raises(Interrupted, match=f"stopped after step {after}"):
        run_to_report(load_job(recipe), run, stop=lambda event: isinstance(event, StepDone) and event.step == after)
    return run


# Comparison


def evaluation(correct: list[bool | None]) -> Evaluation:
    results = tuple(RowResult(f"a:{i}", "?", "yes", "yes", one, 1.0, 2) for i, one in enumerate(correct))
    judged = [one for one in correct if one is not None]
    share = sum(judged) / len(judged) if judged else None
    interval = (0.1, 0.9) if judged else None
    return Evaluation(len(results), 8, 1.0, 2.7, 0.5, share, interval, None, (), None, results)


def test_pairs_are_sorted_into_fixed_and_broken() -> None:
    base = evaluation([False, False, True, True, False, True])
    tuned = evaluation([True, False, True, False, True, True])
    found = compare(base, tuned)
    assert [pair[0].location for pair in found.fixed] == ["a:0", "a:4"]
    assert [pair[1].location for pair in found.broken] == ["a:3"]
    assert found.p_value == mcnemar_exact(2, 1) == 1.0


def test_many_fixed_rows_are_more_than_chance() -> None:
    found = compare(evaluation([False] * 12 + [True]), evaluation([True] * 12 + [False]))
    assert found.p_value == pytest.approx(2 * 14 / 2**13)
    assert found.verdict.startswith("Better")


def test_plain_text_has_no_pairs_and_no_p_value() -> None:
    found = compare(evaluation([None] * 3), evaluation([None] * 3))
    assert (found.fixed, found.broken, found.p_value) == ((), (), None)


def test_other_rows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare(evaluation([True]), evaluation([True, False]))


def test_an_evaluation_comes_back_as_it_was_saved(tmp_path: Path, recipe: Recipe) -> None:
    job = load_job(recipe)
    found = result_of(evaluate_held_out(job.open(), job.recipe, job.prepared, job.tokenizer, "model"))
    save_evaluation(tmp_path / "one.json", found)
    assert load_evaluation(tmp_path / "one.json") == found
    values = json.loads((tmp_path / "one.json").read_text())
    keys = ["place", "prompt", "expected", "predicted", "correct", "loss", "tokens"]
    assert [list(row) for row in values["results"]] == [[*keys, "compared", "ended"]] * 9
    for row in values["results"]:
        del row["compared"]
    (tmp_path / "one.json").write_text(json.dumps(values))
    assert load_evaluation(tmp_path / "one.json") == found, "as runs of earlier versions have it"


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"results": [{}]}'])
def test_an_evaluation_that_no_run_writes_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(Incompatible, match=r"one\.json: not what a run writes"):
        load_evaluation(tmp_path / "one.json")
    assert load_evaluation(tmp_path / "none.json") is None


# The files of a run


def assert_facts(told: dict[str, Any], recipe: Recipe, page: str) -> None:
    """What the run was made of, in report.json and at the head of report.txt."""
    data = {"train": recipe.data.train, "valid": f"set apart of {recipe.data.train}", "test": recipe.data.test}
    assert (told["model"], told["data"], told["rows"]) == (
        recipe.model.path,
        data,
        {"train": 16, "valid": 2, "test": 9},
    )
    assert told["steps"] == 8 and told["seconds"] > 0 and told["tokens_per_second"] > 0 and told["peak_bytes"] >= 0
    model, rows, training, *_ = page.splitlines()
    assert model == f"model: {recipe.model.path}" and rows.startswith(f"data: train {recipe.data.train} (16 rows); ")
    assert training.startswith("training: 8 steps in ") and " tokens/s, memory " in training


def test_a_run_leaves_its_report(recipe: Recipe) -> None:
    run, report, events = run_of(recipe)
    told = json.loads(run.report.read_text())
    assert told == json.loads(json.dumps(report.to_json()))
    assert told["base"]["rows"] == told["tuned"]["rows"] == 9
    assert told["held_out"] == "9 test rows"
    assert_facts(told["facts"], recipe, (run.path / "report.txt").read_text())
    lines = [json.loads(line) for line in (run.path / "rows.jsonl").read_text().splitlines()]
    assert [line["place"].rsplit(":", 1)[1] for line in lines] == [str(i) for i in range(1, 10)]
    fixed = sum(line["tuned"]["correct"] and not line["base"]["correct"] for line in lines)
    broken = sum(line["base"]["correct"] and not line["tuned"]["correct"] for line in lines)
    assert (told["comparison"]["fixed"], told["comparison"]["broken"]) == (fixed, broken)
    assert told["comparison"]["p_value"] == mcnemar_exact(fixed, broken)
    assert report.comparison.verdict == told["comparison"]["verdict"]
    assert load_evaluation(run.evaluation("tuned")) == report.tuned
    assert load_evaluation(run.evaluation("base")) == report.base
    assert curve(read(run.metrics)) == curve(events)
    assert load_recipe(run.recipe) == recipe
    assert "\x1b" not in (run.path / "report.txt").read_text()


def test_without_a_base_measurement_only_the_tuned_model_is_reported(recipe: Recipe) -> None:
    run, report, events = run_of(
        recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"base": False})})
    )
    assert report.base is report.comparison is None
    assert not measured(events, "base model")
    assert "base" not in json.loads((run.path / "rows.jsonl").read_text().splitlines()[0])


def test_brackets_in_a_rows_words_are_only_words(recipe: Recipe, tmp_path: Path) -> None:
    from finetune.report.summary import account_notes, print_account

    bad = tmp_path / "[red] rows [b].jsonl"
    bad.write_text((tmp_path / "train.jsonl").read_text() + '{"text": "a", "label": "[/nothing]"}\n')
    data = recipe.data.model_copy(update={"valid": str(bad), "on_error": "skip", "max_dropped": 0.5})
    job = load_job(recipe.model_copy(update={"data": data}))
    print_account(job, RunFolder(tmp_path / "[/run]"))
    assert any("[/nothing]" in note for note in account_notes(job.prepared))


# Going on with a run


def test_a_resumed_run_measures_the_base_once_and_ends_the_same(recipe: Recipe) -> None:
    whole, _, _ = run_of(recipe)
    run = stopped(recipe, 3)
    assert run.evaluation("base").exists()
    assert not run.report.exists()
    events: list[Event] = []
    run_to_report(load_job(recipe), run, resume=True, events=events)
    assert not measured(events, "base model")
    assert measured(events, "tuned model")
    assert curve(read(run.metrics)) == curve(read(whole.metrics))
    for name in ("adapter/adapter_model.safetensors", "adapter/adapters.safetensors", "rows.jsonl"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_stopped_while_the_base_is_measured_it_begins_anew(recipe: Recipe) -> None:
    run, events = create(recipe, "toy"), []
    small = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_tokens": 64})})
    with pytest.raises(Interrupted, match=r"^stopped while evaluating the base model$"):
        run_to_report(load_job(small), run, events=events, stop=lambda event: measured([event], "base model"))
    assert sum(measured([event], "base model") for event in events) == 1, "it should stop at once"
    assert not run.evaluation("base").exists()
    run_to_report(load_job(small), run, resume=True)
    assert run.report.exists()


@pytest.mark.parametrize("killed_at", ["as_text", "_rows", "loss_plot", "confusion_plot"])
def test_killed_while_the_report_is_written_it_is_written_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    run = create(recipe, "toy")

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"finetune.report.summary.{killed_at}", kill)
        with pytest.raises(KeyboardInterrupt):
            run_to_report(load_job(recipe), run)
    assert not run.report.exists(), "the run would pass for finished"
    run_to_report(load_job(recipe), run, resume=True)
    assert {"report.json", "report.txt", "rows.jsonl", "loss.png"} <= {path.name for path in run.path.iterdir()}


def test_stopped_while_the_tuned_model_is_measured_it_only_measures(recipe: Recipe) -> None:
    run = create(recipe, "toy")
    with pytest.raises(Interrupted, match=r"^stopped while evaluating the tuned model$"):
        run_to_report(load_job(recipe), run, stop=lambda event: measured([event], "tuned model"))
    again: list[Event] = []
    run_to_report(load_job(recipe), run, resume=True, events=again)
    assert not any(isinstance(event, StepDone) for event in again)
    assert len(curve(read(run.metrics))) == 8


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def refused(recipe: Recipe, run: RunFolder) -> str:
    with pytest.raises(Incompatible) as caught:
        run_to_report(load_job(recipe), run, resume=True)
    assert caught.value.exit_code == 8
    return str(caught.value)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_goes_on_only_with_what_it_began_with(recipe: Recipe, tmp_path: Path, checkpoint: bool) -> None:
    from tests.tiny_models import model_with_tokenizer

    run = stopped(recipe, 2)
    if not checkpoint:  # as when it was killed right after the base was measured
        for one in sorted(run.checkpoints.rglob("*"), reverse=True):
            one.rmdir() if one.is_dir() else one.unlink()
    wider = refused(changed(recipe, "lora", rank=3), run)
    assert "lora.rank: the checkpoint has 2, this run has 3" in wider
    assert "alpha" not in wider
    assert "train.learning rate" in refused(changed(recipe, "train", learning_rate=0.5), run)
    assert "seed" in refused(recipe.model_copy(update={"seed": 5}), run)
    for split in ("train", "test"):
        other = rows(tmp_path / f"other-{split}.jsonl", 100)
        assert "data rows" in refused(changed(recipe, "data", **{split: other}), run)
    other_base = model_with_tokenizer(tmp_path / "other", seed=1)
    assert "base model weights" in refused(changed(recipe, "model", path=str(other_base)), run)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((tmp_path / "train.jsonl").read_bytes())
    same = changed(changed(recipe, "data", train=str(moved)), "train", micro_tokens=512)
    run_to_report(load_job(same), run, resume=True)


def test_a_broken_checkpoint_is_told_of_and_the_one_before_is_used(recipe: Recipe) -> None:
    run = stopped(changed(recipe, "train", checkpoint_every=1), 4)
    newest = sorted(run.checkpoints.iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"rubbish")
    events: list[Event] = []
    run_to_report(load_job(changed(recipe, "train", checkpoint_every=1)), run, resume=True, events=events)
    told = [event.text for event in events if isinstance(event, Note) and "is broken" in event.text]
    assert len(told) == 1
    assert newest.name in told[0]
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(4, 9))


# Adapters as a start, and numbers that are not finite


def test_training_starts_from_an_adapter_and_the_base_is_still_the_base(recipe: Recipe) -> None:
    first, before, _ = run_of(recipe)
    _, after, _ = run_of(changed(recipe, "lora", start_from=str(first.adapter)))
    assert after.base == before.base
    assert after.validations[0].loss == pytest.approx(min(one.loss for one in before.validations), rel=1e-6)


def test_an_adapter_that_does_not_fit_is_refused_with_the_numbers_that_would(recipe: Recipe) -> None:
    first, _, _ = run_of(recipe)
    wider = changed(recipe, "lora", start_from=str(first.adapter), rank=4, alpha=8.0)
    with pytest.raises(Incompatible, match=r"Set lora\.rank: 2 and lora\.alpha: 4"):
        run_to_report(load_job(wider), create(wider, "toy"))
    elsewhere = changed(recipe, "lora", start_from=str(first.adapter), targets=["v_proj"])
    with pytest.raises(Incompatible, match=r"set lora\.targets: \[q_proj\]"):
        run_to_report(load_job(elsewhere), create(elsewhere, "toy"))


def opening(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Every session of a job is wrapped by `make`."""
    real = Job.open
    monkeypatch.setattr(jobs.Job, "open", lambda job: make(real(job)))


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_diverges_leaves_nothing_that_is_not_finite(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    opening(monkeypatch, lambda live: Poisoned(live, step=step))
    run = create(recipe, "toy")
    with pytest.raises(Diverged, match=f"step {step}: "):
        run_to_report(load_job(recipe), run)
    assert not run.adapter.exists()
    _finite(run)


def test_a_base_without_a_loss_is_said_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, lambda live: Poisoned(live, scores=0))
    run = create(recipe, "toy")
    with pytest.raises(Diverged, match="base model: its loss on the held-out rows is nan"):
        run_to_report(load_job(recipe), run)
    _finite(run)


def test_a_tuned_model_without_a_loss_on_the_test_rows_is_not_reported(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Wrapped):
        """NaN in rows that neither the base's measurement nor a validation has seen."""

        done = False

        def score(self, batch: Any) -> Any:
            found = self.inner.score(batch)
            return replace(found, logprob=found.logprob * np.float32(np.nan)) if self.done else found

    made: list[Late] = []

    def wrap(live: Session) -> Late:
        made.append(Late(live))
        return made[0]

    opening(monkeypatch, wrap)
    run = create(recipe, "toy")

    def finished(event: Event) -> bool:
        for live in made:
            live.done = live.done or isinstance(event, Finished)
        return False

    with pytest.raises(Diverged, match="tuned model"):
        run_to_report(load_job(recipe), run, stop=finished)
    assert not run.report.exists()
    _finite(run)


def _finite(run: RunFolder) -> None:
    for file in run.path.rglob("*.json*"):
        assert "NaN" not in file.read_text(), file
        assert "Infinity" not in file.read_text(), file


def test_the_saved_recipe_is_the_resolved_one(recipe: Recipe) -> None:
    run = create(recipe, "toy")
    assert run.recipe.read_text() == dump_recipe(recipe)
    assert create(recipe, "toy").path != run.path


def test_a_resumed_run_computes_blocks_again_as_it_began(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever memory is free by then: the sums would be others."""
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": "auto"})})
    seen: list[Any] = []
    opened, begin_with = Job.open, ready_trainer.starting_tokens

    def opening(job: Job) -> Session:
        seen.append(job.recipe.train.gradient_checkpointing)
        return opened(replace(job, recipe=recipe))  # the reference backend has nothing to compute again

    monkeypatch.setattr(Job, "open", opening)
    monkeypatch.setattr(
        ready_trainer,
        "starting_tokens",
        lambda job, session: (seen.append(job.recipe.train.gradient_checkpointing), begin_with(job, session))[1],
    )
    monkeypatch.setattr(registry, "free_bytes", lambda *_: 1)
    run = stopped(asked, 3)
    assert seen == [True, True] and run.recomputed() is True
    monkeypatch.setattr(registry, "free_bytes", lambda *_: 10**15)
    run_to_report(load_job(asked), run, resume=True)
    assert seen[2:] == [True] and run.recomputed() is True
    run_of(asked)
    assert seen[3:] == [False, False]
    run_of(recipe)
    assert seen[5:] == [False, False]

"""A search within a budget: what it tries, that trials are runs, that it goes on after a stop, and what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import _go_on_searching
from finetune.commands import search as search_command
from finetune.commands.search import seconds_of, verdict
from finetune.crashes import what_is_left
from finetune.disk.run_folder import RunFolder, create, open_existing
from finetune.disk.run_list import overview
from finetune.errors import ExitCode, Incompatible, Interrupted, RecipeError
from finetune.events import Work as Events
from finetune.recipe.load import dump_recipe, load_recipe, load_written
from finetune.training import search
from finetune.training.job import Job
from finetune.training.rate_rule import Start
from finetune.training.search import SPARED, Search
from finetune.training.search_ledger import Ledger, Stage, read_ledger
from finetune.training.search_trials import Trial, compared_after, going_on, most_that_fit, trials_of
from tests.end_to_end.command import Work
from tests.unit.test_suspects import labelled
from tests.unit.test_wrong_resume import finetune
from tests.unit.toy_run import Wrapped, load_job, recipe, run_to_report

START = Start(1e-3, 64, 1000, 30, 16)
MODULES = {f"model.layers.0.{name}": (8, 8) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")}
RECIPE = """
data: {train: rows.jsonl, valid: valid.jsonl, test: test.jsonl}
prompt: {template: plain}
lora: {rank: 2, alpha: 4, targets: [q_proj]}
train: {steps: 9, batch_size: 4}
evaluate: {every: 4, forgetting: false}
backend: reference
"""


def test_the_recipe_as_it_is_comes_first_and_no_trial_twice() -> None:
    asked = recipe(train={"learning_rate": "auto"})
    trials = trials_of(asked, START, MODULES)
    assert trials[0] == Trial() and trials[0].recipe(asked) == asked
    assert len(trials) == len({*trials}) == 4 * 3 * 2 * 2
    assert trials == trials_of(asked, START, MODULES)
    assert [trial.learning_rate for trial in trials[1:3]] == [2e-3, 5e-4], "what matters most comes first"
    changes = [sum(value is not None for value in vars(trial).values()) for trial in trials]
    assert changes[:8] == [0, *[1] * 7] and min(changes[8:]) == 2, "one change at a time, then several"


def test_no_rate_is_tried_that_no_model_was_seen_to_learn_at_unless_the_recipe_names_such() -> None:
    by_rule, fast = recipe(train={"learning_rate": "auto"}), replace(START, rate=6e-3)
    assert {trial.learning_rate for trial in trials_of(by_rule, fast, MODULES)} == {None, 1e-2, 3e-3}
    named = recipe(train={"learning_rate": 2e-2})
    assert {trial.learning_rate for trial in trials_of(named, fast, MODULES)} == {None, 4e-2, 1e-2, 8e-2}


@pytest.mark.parametrize(
    ("sections", "count"),
    [
        ({}, 4 * 3 * 2 * 2),  # a named rate stands for itself
        ({"train": {"steps": 5, "epochs": None}}, 4 * 3 * 2),
        ({"lora": {"start_from": "/adapter"}}, 4 * 2),
        ({"lora": {"rank": 1}}, 4 * 2 * 2 * 2),
        ({"lora": {"targets": ["q_proj"]}}, 4 * 3 * 2),
        ({"train": {"epochs": "auto", "learning_rate": "auto"}}, 4 * 3 * 2 * 2),
    ],
)
def test_only_what_the_recipe_leaves_free_is_tried(sections: dict[str, Any], count: int) -> None:
    assert len(trials_of(recipe(**sections), START, MODULES)) == count


def test_a_trial_changes_what_it_says_and_keeps_the_adapters_weight() -> None:
    asked = recipe(lora={"rank": 4, "alpha": 12.0})
    made = Trial(3e-3, 8, 5, ("q_proj", "v_proj")).recipe(asked)
    assert (made.train.learning_rate, made.train.epochs) == (3e-3, 5)
    assert (made.lora.rank, made.lora.alpha, made.lora.targets) == (8, 24.0, ["q_proj", "v_proj"])
    said = Trial(3e-3, 8, 5, ("q_proj",)).settings
    assert said == "train.learning_rate=3.0e-03 train.epochs=5 lora.rank=8 lora.targets=[q_proj]"


def test_as_many_trials_are_planned_as_fit() -> None:
    def needed(others: int) -> int:
        """Of trials as long as the recipe."""
        return others * 30 + -(-others // 3) * 60

    for steps in (0, 29, 100, 199, 200, 500, 10_000):
        made = most_that_fit([30] * 20, [90] * 20, steps)
        assert needed(made) <= steps or made == 0
        assert made == 20 or needed(made + 1) > steps
    # of four trials two go on: the longest two, which have to fit
    assert most_that_fit([30, 60, 30, 15], [90, 180, 90, 45], 135 + 120 + 60) == 4
    assert most_that_fit([30, 60, 30, 15], [90, 180, 90, 45], 135 + 120 + 59) == 3
    assert [going_on(others) for others in (0, 1, 3, 4, 9)] == [0, 1, 1, 2, 3]


def test_trials_are_compared_where_their_rates_have_fallen_as_far() -> None:
    """One with half of the epochs is stopped after half of the steps, so that its lower rate is no advantage."""
    asked = recipe(train={"epochs": 6, "batch_size": 1})
    assert [compared_after(Trial(epochs=epochs).recipe(asked), 15) for epochs in (6, 3, 12)] == [30, 15, 60]
    assert compared_after(recipe(train={"steps": 1, "epochs": None}), 13) == 1


@pytest.mark.parametrize(("said", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_a_budget_has_a_unit(said: str, seconds: float) -> None:
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("said", ["30", "m", "", "-3m", "0s", "infm", "nanh", "3 days"])
def test_other_budgets_are_refused(said: str) -> None:
    with pytest.raises(RecipeError, match="write a number and its unit"):
        seconds_of(said)


def test_after_a_crash_a_search_says_how_it_goes_on(tmp_path: Path) -> None:
    assert what_is_left(tmp_path, ExitCode.MEMORY) == []
    (tmp_path / "search.yaml").write_text("")
    (line,) = what_is_left(tmp_path, ExitCode.MEMORY)
    assert line == f"The search is not lost. Go on with: finetune resume {tmp_path}"
    assert what_is_left(tmp_path, ExitCode.DIVERGED) == [], "it would diverge again"


def test_a_search_whose_recipe_was_cut_off_is_refused(tmp_path: Path) -> None:
    whole = dump_recipe(recipe())
    (tmp_path / "search.yaml").write_text(whole)
    assert load_written(tmp_path / "search.yaml").seed == 0
    (tmp_path / "search.yaml").write_text(whole[: whole.index("\nbackend:")])
    with pytest.raises(Incompatible, match=r"search\.yaml: its end is lost"):
        _go_on_searching(tmp_path, None, True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    made = Work.of_one_block(tmp_path_factory)
    rows = [{"text": example.prompt, "label": str(example.answer)} for example in labelled(60, set())]
    for name, part in (("rows", rows[:36]), ("valid", rows[36:48]), ("test", rows[48:])):
        made.lines(f"{name}.jsonl", part)
    for name, count in (("train", 36), ("valid", 12), ("test", 12)):
        pairs = (
            {"prompt": f"{name} {i}?", "chosen": f"a fine film {i}", "rejected": "a dull film"} for i in range(count)
        )
        made.lines(f"{name}-pairs.jsonl", list(pairs))
    made.recipe(RECIPE, "few.yaml")
    return made


@pytest.fixture(autouse=True)
def _few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "trials_of", lambda *given: trials_of(*given)[:7])


class Stopper:
    """Asks to stop after so many events."""

    def __init__(self, events: int = 10**9) -> None:
        self.left = events

    @property
    def stopping(self) -> bool:
        return self.left <= 0


def searched(job: Job, folder: Path, every: int = 10**9, budget: float = 600.0) -> Search:
    """A search to its end, stopped after each `every` events and gone on with."""
    folder.mkdir(exist_ok=True)
    if not (folder / "search.json").exists():
        Ledger(budget).write(RunFolder(folder))
    while True:
        stopper = Stopper(every)
        made = Search(job, RunFolder(folder), stopper)
        try:
            events = Events(made.events())
            for _ in events:
                stopper.left -= 1
            return made
        except Interrupted:
            every += 7  # so that it gets on


def tensors(search: Search) -> bytes:
    newest = max((search.best.path / "checkpoints").glob("step-*"))
    return (newest / "state.safetensors").read_bytes() + (newest / "best.safetensors").read_bytes()


def test_the_same_winner_with_the_same_bytes_after_any_stops_and_no_test_row_is_read(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bytes] = set()

    class Watched(Wrapped):
        def score(self, batch: Any) -> Any:
            seen.update(row.tobytes() for row in batch.inputs)
            return self.inner.score(batch)

    job, opened = load_job(load_recipe(work.folder / "few.yaml")), Job.open
    monkeypatch.setattr(Job, "open", lambda self, adapter=None: Watched(opened(self, adapter)))
    whole = searched(job, tmp_path / "whole")
    assert whole.ledger.others == len(whole.trials) - 1
    assert not (tmp_path / "whole" / "trials").exists()
    valid, test = ([e.prompt_tokens.tobytes() for e in split.examples] for split in job.prepared.splits[1:])
    assert all(any(prompt in row for row in seen) for prompt in valid)
    assert not any(prompt in row for row in seen for prompt in test), "the winner alone meets them"
    stopped = searched(job, tmp_path / "stopped", 5)
    assert stopped.ledger.winner == whole.ledger.winner and tensors(stopped) == tensors(whole)
    figures = [{(stage.trial, stage.steps, stage.loss) for stage in one.ledger.stages} for one in (whole, stopped)]
    assert figures[0] == figures[1]


class Clock:
    """A search's time, in which a step takes a second and the first loading of a model a hundred."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, clock, opened = 0.0, self, Job.open
        monkeypatch.setattr(search, "time", self)

        class Timed(Wrapped):
            def step(self, *given: Any) -> Any:
                clock.now += 1.0
                return self.inner.step(*given)

        def slowly(job: Job, adapter: Path | None = None) -> Timed:
            clock.now = max(clock.now, 100.0)
            return Timed(opened(job, adapter))

        monkeypatch.setattr(Job, "open", slowly)

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("budget", [105.0, 115.0])
def test_a_budget_too_short_for_the_recipe_is_refused_and_loading_is_no_step(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    job = load_job(load_recipe(work.folder / "few.yaml"))
    Clock(monkeypatch)
    if budget < 100 + 1 + 1.1 * 8:
        with pytest.raises(RecipeError, match="allow --budget 4m"):
            searched(job, tmp_path / "short", budget=budget)
    else:
        assert searched(job, tmp_path / "enough", budget=budget).ledger.winner == 0


def test_a_short_budget_leaves_trials_out(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(load_recipe(work.folder / "few.yaml"))
    monkeypatch.setattr(Ledger, "per_step", 1e3)  # seconds: its own time is nothing beside that
    few = searched(job, tmp_path / "few", budget=1.1e3 * 13 + 100)
    assert few.ledger.others == 2 and not few.ledger.skipped, "2 x 3 and 1 x 6 steps fit in 13"
    assert few.ledger.stage(0, 9) is not None, "the recipe as it is always has its whole run"


@pytest.mark.parametrize("left", [True, False])
def test_the_next_best_go_on_while_time_is_left(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    job = load_job(load_recipe(work.folder / "few.yaml"))
    first = going_on(5)
    step = property(lambda self: 0.01 if left or sum(one.finished for one in self.stages) <= first else 1e3)
    monkeypatch.setattr(Ledger, "per_step", step)
    made = searched(job, tmp_path / "all")
    compared = {one.trial: one.loss for one in made.ledger.stages if one.trial and not one.finished}
    finished = {one.trial for one in made.ledger.stages if one.finished} - {0}
    best = sorted(compared, key=lambda trial: (compared[trial] or 0.0, trial))
    assert len(compared) == len(made.trials) - 1 == 5 and finished == set(best[: first + SPARED * left])
    assert made.ledger.skipped == ([] if left else [best[first]]), "the first for which it does not suffice is named"


def test_slow_first_steps_of_the_recipe_leave_no_trial_out(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(load_recipe(work.folder / "few.yaml"))
    monkeypatch.setattr(Ledger, "per_step", property(lambda self: 10.0 if len(self.stages) == 1 else 0.01))
    made = searched(job, tmp_path / "slow", budget=150.0)  # of which the recipe's other steps would take 88 s
    assert made.ledger.others == len(made.trials) - 1


def test_trials_for_which_no_time_is_left_are_left_out(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(load_recipe(work.folder / "few.yaml"))
    monkeypatch.setattr(Ledger, "per_step", property(lambda self: 1.0 if self.others is None else 1e3))
    late = searched(job, tmp_path / "late", budget=600.0)
    assert sorted(late.ledger.skipped) == list(range(1, len(late.trials)))
    assert late.ledger.winner == 0 and late.best.recipe.exists()
    said = verdict(late, 0)
    assert said.startswith("No other setting was trained to its end: allow --budget 166m or more. The recipe has"), said


@pytest.mark.parametrize(("loss", "winner"), [(1.0, 0), (1.009, 0), (1.011, 2), (None, 2), (0.9, 0)])
def test_a_recipe_that_is_as_good_wins(work: Work, tmp_path: Path, loss: float | None, winner: int) -> None:
    Ledger(1.0).write(RunFolder(tmp_path))
    made = Search(load_job(load_recipe(work.folder / "few.yaml")), RunFolder(tmp_path), Stopper())
    losses = {0: loss, 1: 1.3, 2: 1.0, 3: None}
    made.ledger.stages = [Stage(trial, 9, lowest, 1.0, True) for trial, lowest in losses.items()]
    made.ledger.stages.append(Stage(4, 3, 0.5, 1.0, False))  # compared, and left out
    made.ledger.decide()
    assert made.ledger.winner == winner
    begins = "The default was as good: validation loss" if winner == 0 else "Best: "
    assert verdict(made, winner).startswith(begins)


def test_the_winner_is_a_run_with_the_bytes_of_a_run_of_its_own(work: Work) -> None:
    said = finetune(work, "search", "few.yaml", "--budget", "10m", "--no-supervisor", "output=found").good()
    folder = next((work.folder / "found").glob("few-search-*"))
    ledger = json.loads((folder / "search.json").read_text())
    assert "The default was as good" in said.out or "Best: " in said.out
    assert re.search(r"the recipe as it is: validation loss \S+ after its last step, 9; .* of 10 min", said.err)
    stages = re.findall(r"trial (\d+), .* after (?:its last step, )?(\d+)", said.err)
    assert stages == [(str(one["trial"] + 1), str(one["steps"])) for one in ledger["stages"]]
    run, own = open_existing(folder / "best")
    assert run.report.exists() and run.evaluation("tuned").exists()
    changes = [f"train.learning_rate={own.train.learning_rate}", f"lora.rank={own.lora.rank}"]
    finetune(work, "train", "few.yaml", *changes, f"lora.alpha={own.lora.alpha}", "output=alone").good()
    alone = next((work.folder / "alone").glob("few-*"))
    for name in ("adapter/adapter_model.safetensors", "evaluation-tuned.json", "evaluation-base.json"):
        assert (alone / name).read_bytes() == (run.path / name).read_bytes(), name
    assert [line.name for line in overview(work.folder / "found")] == [f"{folder.name}/best"]
    again = finetune(work, "resume", str(folder)).good()  # the helper adds --no-supervisor
    assert json.loads((folder / "search.json").read_text()) == ledger and "winner's run" in again.out


def test_a_search_that_is_killed_before_its_first_stage_keeps_its_budget(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    recipe = load_recipe(work.folder / "few.yaml", [f"output={tmp_path}"])
    monkeypatch.setattr(search_command, "Search", kill)
    with pytest.raises(Killed):
        search_command.run(recipe, "few", "7m")
    (folder,) = tmp_path.glob("few-search-*")
    ledger = read_ledger(folder)
    assert ledger.budget == 420.0 and not ledger.stages
    assert "Go on with: finetune resume" in what_is_left(folder, ExitCode.MEMORY)[0]
    (folder / "search.json").unlink()
    with pytest.raises(Incompatible, match=r"without its search.json nobody knows the search's budget; begin it anew"):
        search_command.run(recipe, stopped=folder)


def test_a_refused_search_leaves_no_folder_to_go_on_with(work: Work) -> None:
    """Resumed, it would train the recipe that it was refused for."""
    refused = finetune(work, "search", "few.yaml", "--budget", "0.01s", "--no-supervisor", "output=refused").failed(2)
    assert "--budget: one run takes about" in refused and "allow --budget 1m" in refused
    assert not list((work.folder / "refused").iterdir())


@pytest.mark.parametrize(
    "learned",
    ["preferences={}", *(pytest.param(one, marks=pytest.mark.slow) for one in ("head={}", "preferences={loss: orpo}"))],
)
def test_trials_with_a_head_or_pairs_are_runs_too(
    work: Work, learned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped or not, the winner has the bytes of a run of its own, and the trials read no test row."""
    files = {split: work.folder / f"{split}-pairs.jsonl" for split in ("train", "valid", "test")}
    rows = [f"data.{split}={file}" for split, file in files.items()] if "pref" in learned else []
    monkeypatch.setattr(search, "trials_of", lambda *given: trials_of(*given)[:3])
    job = load_job(load_recipe(work.folder / "few.yaml", [*rows, learned]))
    whole, stopped = searched(job, tmp_path / "whole"), searched(job, tmp_path / "stopped", 11)
    assert stopped.ledger.winner == whole.ledger.winner and tensors(stopped) == tensors(whole)
    figures = [{(stage.trial, stage.steps, stage.loss) for stage in one.ledger.stages} for one in (whole, stopped)]
    assert figures[0] == figures[1]
    assert not whole.best.references.exists(), "the test rows' references would be in it"
    own = create(load_recipe(whole.best.recipe, [f"output={tmp_path}"]), "alone")
    run_to_report(load_job(load_recipe(own.recipe)), own)
    best = whole.job_of(whole.ledger.winner or 0)
    finished = run_to_report(best, whole.best, resume=True)
    for name in ("adapter/adapter_model.safetensors", "evaluation-tuned.json", "evaluation-base.json"):
        assert (own.path / name).read_bytes() == (whole.best.path / name).read_bytes(), name
    assert finished.tuned.loss == pytest.approx(
        json.loads((own.path / "report.json").read_text())["tuned"]["loss"], abs=1e-9
    )

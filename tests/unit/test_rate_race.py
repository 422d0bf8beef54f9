"""The race of four learning rates before a run, and the run that follows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.interface import Batch, NonFinite, Scores, Session
from backends.model_folder import ModelFolder
from finetune.data.rows import Example, Prepared
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import Diverged, Incompatible, Interrupted
from finetune.events import Event, Note, Progress, StepDone
from finetune.recipe.schedule import USUAL_EPOCHS
from finetune.recipe.schema import Head, Recipe
from finetune.training.rate_race import SHARE, Lap, Race, chosen_of, course_of, race
from finetune.training.rate_rule import LANES, SHORT, UNKNOWN, Start, fitted, starting_rate
from tests.unit.toy_run import Wrapped, load_job, prepared, recipe, result_of, run_to_report, session

START = Start(0.02, 16, 100, 300, 4)


# The rule


@pytest.mark.parametrize(("hidden", "falling", "averaged"), [(256, 3e-3, 1e-3), (576, 5e-4, 5e-4), (4096, 1e-4, 1e-4)])
def test_the_rule_has_the_best_rates_that_were_measured(hidden: int, falling: float, averaged: float) -> None:
    assert fitted(hidden, 16, 500) == pytest.approx(falling)
    assert fitted(hidden, 16, 500, averaged=True) == pytest.approx(averaged)


def test_between_and_beyond_measured_widths_the_rate_falls_with_the_width() -> None:
    rates = [fitted(hidden, 16, 500) for hidden in (200, 256, 400, 575, 577, 2048, 4096, 8192)]
    assert rates == sorted(rates, reverse=True)
    assert fitted(1536, 16, 500) == pytest.approx((5e-4 * 1e-4) ** 0.5, rel=0.01), "midway, as factors go"
    assert fitted(384, 16, 500) == pytest.approx((3e-3 * 5e-4) ** 0.5, rel=0.01)


def test_the_rule_knows_the_batch_and_that_a_short_run_must_move_faster() -> None:
    assert fitted(512, 64, 500) == pytest.approx(2 * fitted(512, 16, 500))
    assert fitted(512, 16, SHORT // 5) == pytest.approx(5**0.5 * fitted(512, 16, SHORT))
    assert fitted(512, 16, SHORT) == fitted(512, 16, 10**6)
    assert fitted(512, 16, 1) == pytest.approx(4 * fitted(512, 16, SHORT))
    assert fitted(512, 16, SHORT // 5, True) == pytest.approx(5 * fitted(512, 16, SHORT, True))
    assert fitted(512, 16, 1, True) == pytest.approx(8 * fitted(512, 16, SHORT, True))
    assert fitted(32, 16, 10**6) == fitted(64, 10**6, 1) == 1e-2, "beyond what was fitted there is a bound"


@pytest.mark.parametrize(("settings", "hidden"), [({"hidden_size": 96}, 96), ({}, None), ({"hidden_size": 0}, None)])
def test_the_start_says_what_it_was_taken_from(tmp_path: Path, settings: dict[str, Any], hidden: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32} | settings))
    start = starting_rate(auto(), ModelFolder.open(tmp_path, False), 600)
    assert (start.hidden, start.steps, start.batch) == (hidden, 450, 4)
    assert start.rate == (UNKNOWN if hidden is None else float(f"{fitted(hidden, 4, 450):.1e}"))
    assert ("96" if hidden else "does not say") in start.why and "450 steps of 4 rows" in start.why
    assert start.lanes == pytest.approx([start.rate * lane for lane in LANES], rel=0.05)


def test_a_run_with_an_open_end_has_the_rate_of_an_average_and_with_a_head_more(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32, "hidden_size": 256}))
    folder = ModelFolder.open(tmp_path, False)
    rates = [starting_rate(auto(batch_size=16, epochs=epochs), folder, 8000).rate for epochs in (5, "auto")]
    assert rates == [3e-3, 1e-3]
    assert course_of(auto(), prepared(2000, 40), "cpu") is not None
    headed = auto(batch_size=16, epochs="auto").model_copy(update={"head": Head()})
    start = starting_rate(headed, folder, 8000)
    assert start.rate == 4e-3 and "a head that learned alone" in start.why and "no race" in start.no_race
    assert course_of(headed, prepared(2000, 40), "cpu") is None
    together = headed.model_copy(update={"head": Head(first_epochs=0)})
    assert starting_rate(together, folder, 8000).rate == 1e-3 and course_of(together, prepared(2000, 40), "cpu")
    assert starting_rate(headed.with_train(epochs=5), folder, 8000).rate == 3e-3, "of a number of epochs not"


# The race


class Watched(Wrapped):
    """A session that notes the tokens of every row that it is given, and fails at rates above `limit`."""

    def __init__(self, inner: Session, limit: float = 1e9) -> None:
        super().__init__(inner)
        self.seen_rows: list[bytes] = []
        self.scored: list[bytes] = []
        self.limit = limit

    def step(self, micro: Sequence[Batch], lr: float) -> Any:
        if lr > self.limit:
            raise NonFinite("the loss is nan")
        self.seen_rows += [row for batch in micro for row in rows_of(batch)]
        return self.inner.step(micro, lr)

    def score(self, batch: Batch) -> Scores:
        self.scored += rows_of(batch)
        return self.inner.score(batch)


def rows_of(batch: Batch) -> list[bytes]:
    whole = batch.prefixes or (np.zeros(0, np.int32),)
    return [whole[0].tobytes() + row.tobytes().rstrip(b"\0") for row in batch.inputs]


def in_batches(examples: Sequence[Example]) -> set[bytes]:
    return {example.tokens[:-1].tobytes().rstrip(b"\0") for example in examples}


def auto(**train: Any) -> Recipe:
    return recipe(train={"learning_rate": "auto", "epochs": 3, "checkpoint_every": None} | train, evaluate={})


def a_race(live: Session, rows: Prepared, asked: Recipe | None = None) -> Race:
    return result_of(race(live, asked or auto(), rows, START, 4096))


@pytest.fixture(scope="module")
def many() -> Prepared:
    """So many rows that there is time for a race; test rows beside the validation rows."""
    rows = prepared(train=600, valid=40)
    return replace(rows, test=replace(prepared(train=1, valid=30).train, name="test"))


def test_four_rates_race_the_same_each_time_and_leave_the_session_as_before(tmp_path: Path, many: Prepared) -> None:
    live = session(tmp_path)
    before = live.get_state()
    found = a_race(live, many)
    losses = {lap.rate: lap.loss for lap in found.laps}
    assert list(losses) == pytest.approx([START.rate * lane for lane in LANES])
    assert len(set(losses.values())) == 4
    assert any(found.chosen == pytest.approx(START.rate * lane**0.5, rel=0.05) for lane in LANES)
    after = live.get_state()
    assert after.step == before.step == 0
    for name, value in {**before.adapter, **before.moments}.items():
        assert np.array_equal(value, {**after.adapter, **after.moments}[name])
    assert replace(a_race(live, many), seconds=0) == replace(found, seconds=0)  # the same twice


@pytest.mark.parametrize(
    ("losses", "noise", "chosen"),
    [
        ((0.7, 0.6, 0.8, 0.9), 0.1, 0.5**0.5),  # better than the rates on both sides
        ((0.9, 0.8, 0.7, 0.6), 0.1, 1.0),  # the highest rate of a short race
        ((0.6, 0.7, 0.8, 0.9), 0.1, 1.0),  # the lowest
        ((0.9, 0.8, 0.7, 0.75), 0.1, 1.0),  # the rule's own
        ((0.6, 0.6, 0.7, 0.7), 0.1, 1.0),  # the lowest of equals
        ((0.7, 0.6, 0.8, 0.9), 1.0, 1.0),  # which other rows would have in another order
        ((0.7, 0.6, 0.8, None), 0.1, 0.5**0.5),
        ((0.9, 0.8, 0.7, None), 0.1, 1.0),
        ((0.9, 0.8, None, None), 0.1, 0.5),  # where the rule's own diverges, the best
        ((0.7, 0.8, None, None), 0.1, 0.25),
    ],
)
def test_a_race_that_is_clear_moves_the_rules_rate_half_of_the_way(
    losses: tuple[float | None, ...], noise: float, chosen: float
) -> None:
    start, rng = replace(START, rate=1e-3), np.random.default_rng(0)
    laps = [Lap(rate, loss) for rate, loss in zip(start.lanes, losses, strict=True)]
    noises = [rng.normal(0, noise, 32) for _ in laps]
    rows = [(lap.loss or 0.0) + one - one.mean() for lap, one in zip(laps, noises, strict=True)]
    assert chosen_of(start, laps, rows) == pytest.approx(chosen * 1e-3, rel=0.05)


def test_training_rows_train_validation_rows_judge_and_test_rows_are_never_seen(tmp_path: Path, many: Prepared) -> None:
    live = Watched(session(tmp_path))
    found = a_race(live, many)  # type: ignore[arg-type]
    assert found.course and many.test
    assert set(live.seen_rows) <= in_batches(many.train.examples)
    assert set(live.scored) <= in_batches(many.valid.examples)
    assert not {*live.seen_rows, *live.scored} & in_batches(many.test.examples)
    assert len(live.scored) == len(LANES) * found.course.rows
    assert len(live.seen_rows) == len(LANES) * found.course.steps * found.course.batch


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(("rows", "valid"), [(150, 12), (600, 40), (2000, 10), (2000, 300)])
@pytest.mark.parametrize("epochs", [1, 3, "auto"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_race_costs_no_more_than_its_share(batch: int, rows: int, valid: int, epochs: Any, device: Any) -> None:
    found = course_of(auto(batch_size=batch, epochs=epochs), prepared(rows, valid), device)
    if found is None:
        return  # which is right for short runs alone:
    trained = rows * (USUAL_EPOCHS if epochs == "auto" else epochs)
    assert 0 < found.share <= SHARE and found.rows <= valid
    assert len(LANES) * found.steps * found.batch < SHARE * trained  # counted in rows as well


def test_a_long_run_has_a_race_and_a_short_one_has_none(tmp_path: Path, many: Prepared) -> None:
    assert course_of(auto(), many, "cpu")
    found = a_race(session(tmp_path), prepared())
    assert (found.course, found.laps, found.chosen) == (None, (), START.rate)
    assert found.lines() == [f"learning rate {START.why}; the run is too short for a race"]


def test_a_rate_that_diverges_is_out_of_the_race(tmp_path: Path, many: Prepared) -> None:
    free = a_race(session(tmp_path), many)
    found = a_race(Watched(session(tmp_path), limit=START.rate * 0.6), many)  # type: ignore[arg-type]
    assert [lap.loss is None for lap in found.laps] == [False, False, True, True]
    assert found.laps[:2] == free.laps[:2] and found.chosen == START.rate * 0.5
    assert "4.0e-02 diverged" in found.lines()[2]
    with pytest.raises(Diverged, match="no learning rate of the race"):
        a_race(Watched(session(tmp_path), limit=0.0), many)  # type: ignore[arg-type]


# Whole runs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and rows for a run with a race."""
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    folder = tmp_path_factory.mktemp("race")
    model_with_tokenizer(folder / "model")
    words, labels = ("a fine good warm film", "a dull bad cold film"), ("positive", "negative")
    for name, first, count in (("train", 0, 240), ("valid", 240, 10), ("test", 250, 10)):
        rows = [{"text": f"{words[i % 2]} {i}", "label": labels[i % 2]} for i in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(written: Path, runs: Path, **train: Any) -> Recipe:
    return recipe(
        model={"path": str(written / "model")},
        data={name: str(written / f"{name}.jsonl") for name in ("train", "valid", "test")},
        lora={"rank": 2, "alpha": 4.0, "targets": ["q_proj"]},
        train={"learning_rate": "auto", "epochs": 4, "checkpoint_every": None} | train,
        evaluate={},
        backend="reference",
        output=str(runs),
    )


def run_of(asked: Recipe, run: RunFolder | None = None, **more: Any) -> RunFolder:
    folder = run or create(asked, "toy")
    run_to_report(load_job(asked), folder, resume=run is not None, **more)
    return folder


def left(run: RunFolder) -> dict[str, Any]:
    """What two runs must share: the adapter's bytes and the losses of all steps."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [(line["step"], line["loss"], line["learning_rate"]) for line in lines if line["event"] == "StepDone"]
    return {"adapter": (run.adapter / "adapter_model.safetensors").read_bytes(), "steps": steps}


@pytest.fixture(scope="module")
def whole(written: Path) -> tuple[RunFolder, list[Event]]:
    """A run with a race that nobody stopped, and its events."""
    events: list[Event] = []
    return run_of(asked(written, written / "runs"), events=events), events


def test_a_run_ends_as_one_whose_recipe_names_the_rate(
    written: Path, tmp_path: Path, whole: tuple[RunFolder, list[Event]]
) -> None:
    run, events = whole
    told = json.loads(run.race.read_text())
    assert len(told["laps"]) == len(LANES) and min(lap["loss"] for lap in told["laps"])
    named = run_of(asked(written, tmp_path, learning_rate=told["chosen"]))
    assert left(named) == left(run)
    assert not named.race.exists() and "race" not in json.loads(named.report.read_text())
    report = json.loads(run.report.read_text())
    assert report["race"] == told
    page = " ".join((run.path / "report.txt").read_text().split())
    figures = ", ".join(f"{lap['rate']:.1e} {lap['loss']:.3f}" for lap in told["laps"])
    line = f"rate {told['chosen']:.1e} "
    assert f": {figures}" in page and line in page
    (said,) = [event.text for event in events if isinstance(event, Note) and event.text.endswith(f": {figures}")]
    assert said.startswith(line) and said in page
    assert said in [event.text for event in events if isinstance(event, Note)]
    assert "learning_rate: auto" in run.recipe.read_text()


def test_a_run_that_is_stopped_in_the_race_or_after_it_goes_on_with_the_same_rate(
    written: Path, tmp_path: Path, whole: tuple[RunFolder, list[Event]]
) -> None:
    def stopped(when: Any) -> RunFolder:
        run = create(asked(written, tmp_path), "toy")
        with pytest.raises(Interrupted):
            run_to_report(load_job(asked(written, tmp_path)), run, stop=when)
        return run

    within = stopped(lambda event: isinstance(event, Progress) and event.what.startswith("race") and event.done == 9)
    assert not within.race.exists()
    after = stopped(lambda event: isinstance(event, StepDone) and event.step == 65)
    lost = RunFolder(shutil.copytree(after.path, tmp_path / "lost"))
    lost.race.unlink()
    for run in (within, after, lost):
        assert left(run_of(asked(written, tmp_path), run)) == left(whole[0])
        told = [json.loads(one.race.read_text()) | {"seconds": 0} for one in (run, whole[0])]
        assert told[0] == told[1]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"chosen": "high"}', '{"chosen": NaN, "start": null, "course": null, "laps": [], "seconds": 0}'],
)
def test_a_record_that_no_run_writes_is_refused(written: Path, tmp_path: Path, text: str) -> None:
    run = create(asked(written, tmp_path), "toy")
    run.race.write_text(text)
    with pytest.raises(Incompatible, match=r"race.json: .*delete it, and the race is run again"):
        run_to_report(load_job(asked(written, tmp_path)), run)

"""`benchmark`: the session as a model of lm-eval gives what its transformers class gives; figures of two models."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec, Session, TrainState
from finetune.errors import DataError
from finetune.evaluation.benchmark import figures
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune

TASKS = ["arc_easy", "hellaswag", "mmlu_anatomy", "truthfulqa_mc2"]
WORDS = ["a", "fine", "good", "warm", "film", "dull", "bad", "cold", "what", "is", "this", "it", "positive", "user"]


def words(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))


def arc(rng: np.random.Generator, i: int) -> dict[str, Any]:
    labels = ["A", "B", "C", "D", "E"][: 3 + i % 3]
    texts = [words(rng, 1, 6) for _ in labels]
    return {"id": f"{i}", "question": words(rng, 3, 20) + "?", "choices": {"text": texts, "label": labels}} | {
        "answerKey": labels[i % len(labels)]
    }


def hellaswag(rng: np.random.Generator, i: int) -> dict[str, Any]:
    begin, more = words(rng, 4, 12).capitalize() + ".", words(rng, 1, 3)
    return {
        "ind": i, "activity_label": "Watching films", "ctx_a": begin, "ctx_b": more, "ctx": f"{begin} {more}",
        "endings": [words(rng, 3, 10) + "." for _ in range(4)], "label": str(i % 4), "split": "val",
    }  # fmt: skip


def mmlu(rng: np.random.Generator, i: int) -> dict[str, Any]:
    choices = [words(rng, 1, 5) for _ in range(4)]
    return {"question": words(rng, 3, 20), "subject": "anatomy", "choices": choices, "answer": i % 4}


def truthful(rng: np.random.Generator, i: int) -> dict[str, Any]:
    right, wrong = 1 + i % 3, 2 + i % 2
    choices = [words(rng, 2, 8) for _ in range(right + wrong)]
    targets = {"choices": choices, "labels": [1] * right + [0] * wrong}
    one = {"choices": [choices[0], *choices[right:]], "labels": [1] + [0] * wrong}
    return {"question": words(rng, 3, 12) + "?", "mc1_targets": one, "mc2_targets": targets}


FORMS = {
    "allenai/ai2_arc/ARC-Easy/test": arc, "allenai/ai2_arc/ARC-Easy/train": arc,
    "allenai/ai2_arc/ARC-Easy/validation": arc,
    "Rowan/hellaswag/validation": hellaswag, "Rowan/hellaswag/train": hellaswag,
    "cais/mmlu/anatomy/test": mmlu, "cais/mmlu/anatomy/dev": mmlu,
    "truthfulqa/truthful_qa/multiple_choice/validation": truthful,
}  # fmt: skip


def write_data(folder: Path, rows: int) -> Path:
    """The data sets of TASKS, as the hub has them, with sentences of our own."""
    for number, (name, make) in enumerate(FORMS.items()):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        file.write_text("".join(json.dumps(make(rng, i)) + "\n" for i in range(rows)))
    return folder


def session(backend: str, model: Path, tuned: bool = False) -> Session:
    live = registry.open_session(backend, ModelSpec(model, dtype="float32"), LoraSpec(4, 8.0), OptimSpec(), 0)
    if tuned:
        state, rng = live.get_state(), np.random.default_rng(0)
        moved = {name: rng.normal(size=t.shape).astype(np.float32) * 0.1 for name, t in state.adapter.items()}
        live.set_state(TrainState(0, moved, {}))
    return live


@cache
def tasks_of_lm_eval() -> Any:
    """Read once: there are thousands."""
    from finetune.evaluation.lm_eval_model import task_manager

    return task_manager()


def asked(model: Any, data: Path) -> Any:
    from lm_eval import simple_evaluate

    from finetune.evaluation.lm_eval_model import local_data

    with local_data(data):
        return simple_evaluate(model, tasks=TASKS, task_manager=tasks_of_lm_eval(), bootstrap_iters=0)


def ours(live: Session, folder: Path, longest: int) -> Any:
    from transformers import AutoTokenizer

    from finetune.evaluation.lm_eval_model import model_of

    return model_of(live, AutoTokenizer.from_pretrained(folder), longest, 2048, lambda progress: None)


def theirs(folder: Path, longest: int) -> Any:
    """lm-eval's own class for transformers' models."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16, max_length=longest)


def scores(result: Any) -> dict[tuple[str, int], list[tuple[float, bool]]]:
    return {
        (task, row["doc_id"]): [(float(score), bool(greedy)) for score, greedy in row["filtered_resps"]]
        for task, rows in result["samples"].items()
        for row in rows
    }


def agree(one: Any, other: Any, rows: int) -> None:
    first, second = scores(one), scores(other)
    assert first.keys() == second.keys() and len(first) == rows * len(TASKS)
    for row, answers in first.items():
        assert len(answers) == len(second[row])
        for (score, greedy), (expected, also) in zip(answers, second[row], strict=True):
            assert score == pytest.approx(expected, abs=1e-4) and greedy == also, row
    metrics = [{(f.task, f.metric): f.base.value for f in figures(TASKS, found, found)} for found in (one, other)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5) and ("truthfulqa_mc2", "acc") in metrics[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval", reason="the extra `benchmark` is not installed")
    from tests.tiny_models import model_with_tokenizer

    return model_with_tokenizer(tmp_path_factory.mktemp("models") / "model", max_position_embeddings=1024)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(
    ("rows", "longest"),
    [(6, 1024), (6, 64), pytest.param(200, 1024, marks=pytest.mark.slow)],  # 64: contexts that are cut on the left
)
def test_requests_are_answered_as_by_the_transformers_class(
    model: Path, tmp_path: Path, backend: str, rows: int, longest: int
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    data = write_data(tmp_path, rows)
    agree(asked(ours(session(backend, model), model, longest), data), asked(theirs(model, longest), data), rows)


def test_both_backends_score_a_tuned_model_alike(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    data = write_data(tmp_path, 4)
    first, second = (asked(ours(session(name, model, True), model, 1024), data) for name in ("torch", "mlx"))
    agree(first, second, 4)
    base = asked(ours(session("torch", model), model, 1024), data)
    assert scores(first) != scores(base)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("x", {}, one, i) for i, one in enumerate(arguments)]


def test_texts_are_written_and_whole_texts_scored_as_by_the_transformers_class(model: Path) -> None:
    settings = [{"until": ["\n", " film"], "max_gen_toks": 8}, {"until": "zz", "max_gen_toks": 4, "temperature": 0.0}]
    contexts = ["a fine", "what is this", "user a dull bad cold film, " * 9]
    written = [(text, one) for one in settings for text in contexts]
    mine, hers = ours(session("torch", model), model, 64), theirs(model, 64)
    assert mine.generate_until(requests(*written)) == hers.generate_until(requests(*written))
    texts = [("a fine good warm film",), ("what is this it " * 40,)]
    assert mine.loglikelihood_rolling(requests(*texts)) == pytest.approx(
        hers.loglikelihood_rolling(requests(*texts)), abs=1e-3
    )
    empty = [("", "a film"), ("a ", "film")]  # no context; a space that moves to the answer
    for (score, greedy), (expected, also) in zip(
        mine.loglikelihood(requests(*empty)), hers.loglikelihood(requests(*empty)), strict=True
    ):
        assert score == pytest.approx(expected, abs=1e-4) and greedy == also
    with pytest.raises(DataError, match="answers of 64 tokens"):
        mine.generate_until(requests(("a", {"max_gen_toks": 64})))
    with pytest.raises(DataError, match="drawn at random"):
        mine.generate_until(requests(("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4})))


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.commands.benchmark.task_manager", tasks_of_lm_eval)
    work = Work(tmp_path / "work", model)
    rows = [{"prompt": f"what is {i}?", "completion": "a film"} for i in range(8)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows)
    work.recipe(RECIPE.replace("reference", "torch"))
    finetune(work, "train", "recipe.yaml", "train.learning_rate=0.1").good()
    run, data = work.runs()[0], str(write_data(tmp_path / "data", 6))
    said = finetune(work, "benchmark", str(run), "--tasks", ",".join(TASKS), "--data", data, "--limit", "5").good()
    told = json.loads((run / "benchmark.json").read_text())
    assert {one["task"] for one in told["figures"]} == set(TASKS) and {one["rows"] for one in told["figures"]} == {5}
    assert all(task in said.out for task in TASKS) and "Intervals of 95 %" in said.out
    by_name = {(one["task"], one["metric"]): one for one in told["figures"]}
    assert by_name["truthfulqa_mc2", "acc"]["p_value"] is None and 0 <= by_name["arc_easy", "acc"]["p_value"] <= 1
    cases = [
        (["--tasks", "arc_esy"], 2, "lm-eval has no such task; did you mean arc_easy"),
        (["--tasks", " , "], 2, "names no task"),
        (["--tasks", "arc_easy", "--data", "absent"], 3, "absent: no such folder"),
        (["--tasks", "piqa", "--data", data], 3, "hf download"),
    ]
    for arguments, code, words_ in cases:
        assert words_ in finetune(work, "benchmark", str(run), *arguments).failed(code), arguments


def test_without_the_package_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: {path: model}\ndata: {train: rows.jsonl}\noutput: runs\n")
    (tmp_path / "model").mkdir()
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    said = finetune(Work(tmp_path / "work", tmp_path / "model"), "benchmark", str(tmp_path / "run"), "--tasks", "x")
    assert 'pip install -c requirements.lock ".[benchmark]"' in said.failed(7)


def samples(values: dict[str, list[float]], metric: str = "acc", kind: str = "none") -> dict[str, Any]:
    rows = {
        task: [{"doc_id": i, "metrics": [metric], "filter": kind, metric: value} for i, value in enumerate(listed)]
        for task, listed in values.items()
    }
    return {"samples": rows, "group_subtasks": {"both": ["one", "inner"], "inner": ["two"], "one": []}}


def test_a_group_is_all_rows_of_its_tasks_paired() -> None:
    base = samples({"one": [1, 0, 0, 0], "two": [0, 1]})
    tuned = samples({"one": [1, 1, 1, 0], "two": [1, 0]})
    told = {figure.task: figure for figure in figures(["both"], base, tuned)}
    assert list(told) == ["both", "one", "two"]
    both = told["both"]
    assert (both.rows, both.fixed, both.broken, both.base.value, both.tuned.value) == (6, 3, 1, 2 / 6, 4 / 6)
    assert both.p_value == pytest.approx(0.625) and both.change[0] < 2 / 6 < both.change[1]
    assert both.corrected == both.p_value and told["two"].corrected is None  # one figure was asked for
    assert told["two"].fixed == told["two"].broken == 1 and told["two"].p_value == 1


def test_several_tasks_are_corrected_for_their_number() -> None:
    base, tuned = samples({"one": [0] * 8, "two": [0] * 6}), samples({"one": [1] * 8, "two": [1] * 6})
    told = {figure.task: figure for figure in figures(["one", "two"], base, tuned)}
    assert told["one"].corrected == pytest.approx(2 * 2 / 2**8) and told["two"].corrected == pytest.approx(2 / 2**6)


def test_a_mean_of_shares_has_no_right_and_wrong() -> None:
    (figure,) = figures(["one"], samples({"one": [0.2, 0.4, 0.9]}), samples({"one": [0.3, 0.5, 1.0]}))
    assert (figure.fixed, figure.p_value) == (None, None) and figure.tuned.value == pytest.approx(0.6)
    assert figure.change == pytest.approx((0.1, 0.1), abs=1e-9)


def test_filters_are_told_and_what_is_of_no_row_is_left_out() -> None:
    told = figures(["one"], samples({"one": [1, 0]}, "exact", "strict"), samples({"one": [1, 1]}, "exact", "strict"))
    assert [one.metric for one in told] == ["exact (strict)"]
    pairs = {"samples": {"one": [{"doc_id": 0, "metrics": ["ppl"], "filter": "none", "ppl": (1.0, 2)}]}}
    assert figures(["one"], pairs, pairs) == []


def test_one_row_has_no_interval_of_its_change() -> None:
    (figure,) = figures(["one"], samples({"one": [0]}), samples({"one": [1]}))
    assert math.isinf(figure.change[1]) and figure.p_value == 1

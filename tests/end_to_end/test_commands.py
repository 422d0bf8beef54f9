"""The commands around a run: recipes for every kind of data, plans, and what is said when something is wrong."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import time

import jsonschema
import pytest
from ruamel.yaml import YAML

from tests.end_to_end.command import SIGINT, Work, ended, losses, newest, reviews, wait_for

QUICK = """\
data: {train: train.jsonl}
lora: {rank: 2, alpha: 4, targets: [q_proj]}
train: {steps: 2, batch_size: 4}
evaluate: {max_tokens: 3}
backend: reference
"""


def talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is {number}"}, {"role": "assistant", "content": "a film"}]


def data_of(work: Work, kind: str) -> str:
    """A data file of that format; one has a name that YAML would read as something else."""
    numbered = range(12)
    if kind == "classification":
        return work.lines("my reviews: new.jsonl", reviews(0, 12)).name
    if kind == "alpaca":
        file = work.folder / "tasks.json"
        file.write_text(json.dumps([{"instruction": "name it", "input": f"{i}", "output": "film"} for i in numbered]))
        return file.name
    if kind == "chat":
        return work.lines("chat.jsonl", [{"messages": talk(i)} for i in numbered]).name
    if kind == "sharegpt":
        turns = [[{"from": "human", "value": f"what is {i}"}, {"from": "gpt", "value": "a film"}] for i in numbered]
        return work.lines("shares.jsonl", [{"conversations": one} for one in turns]).name
    return work.lines("text.jsonl", [{"text": f"a warm film {i}"} for i in numbered]).name


KINDS = ("classification", "alpaca", "chat", "sharegpt", "text")


@pytest.mark.slow
def test_every_kind_of_data_gets_a_recipe_that_plans_and_trains(work: Work) -> None:
    less = ["train.steps=1", "train.epochs=", "quantize=none", "evaluate.max_tokens=2", "backend=reference"]
    less += ["train.learning_rate=2e-4"]  # the rule's is for real models: here one step would bring a loss of exactly 0
    commands = []
    for kind in KINDS:
        recipe = f"recipes/{kind}.yaml"
        model = ["--model", str(work.folder / "model")]
        commands.append(["init", data_of(work, kind), "--output", recipe, *model])
        commands.append(["plan", recipe, "backend=reference"])
        commands.append(["train", recipe, *less])
    answers = work.several(*commands)
    for kind, made, planned, trained in zip(KINDS, answers[::3], answers[1::3], answers[2::3], strict=True):
        assert f"12 rows of {kind}" in made.good().out
        assert f"rows read as: {kind}" in planned.good().out
        assert "chosen" in planned.out
        assert kind in trained.good().out
    for run, kind in zip(work.runs(), KINDS, strict=True):
        report = json.loads((run / "report.json").read_text())
        exact = report["tuned"]["accuracy"]
        assert (exact is None) == (kind == "text"), kind
        assert (report["tuned"]["confusion"] is None) == (kind != "classification"), kind
        assert report["tuned"]["loss"] > 0


@pytest.mark.slow
def test_columns_with_odd_names_are_written_so_that_yaml_reads_them(work: Work) -> None:
    file = work.folder / "no.csv"
    file.write_text("Question,Answer\n" + "".join(f"what is {i},film {i}\n" for i in range(12)))
    made, planned, again = work.several(
        ["init", file.name, "--model", "model: 1"], ["plan", "recipe.yaml", "model.path=model"], ["init", file.name]
    )
    assert "12 rows of prompt" in made.good().out
    planned.good()
    assert "exists already" in again.failed(2)
    written = YAML(typ="safe", pure=True).load((work.folder / "recipe.yaml").read_text())
    assert written["data"] == {
        "train": "no.csv",
        "format": "prompt",
        "columns": {"prompt": "Question", "completion": "Answer"},
    }
    assert written["model"]["path"] == "model: 1"


def test_what_is_wrong_is_said_in_one_message_with_its_own_exit_code(work: Work) -> None:
    (work.folder / "bad.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    (work.folder / "file").write_text("")
    recipe = work.recipe(QUICK)
    work.recipe(QUICK + "sede: 1\n", "misspelt.yaml")
    cases: list[tuple[list[str], int, str]] = [
        (["train", "misspelt.yaml"], 2, "did you mean seed?"),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml: no such recipe"),
        (["train", recipe, "lora.rank=x"], 2, "command line (lora.rank=x)"),
        (["train", recipe, "--backend", "tpu"], 2, "backend"),
        (["train", recipe, "model.path=./nowhere"], 2, "nowhere; give a model folder"),
        (["plan", recipe, "lora"], 2, "an override is written key=value"),
        (["train", recipe, "data.train=bad.jsonl"], 3, "bad.jsonl:2"),
        (["train", recipe, "data.train=trian.jsonl"], 3, "did you mean train.jsonl?"),
        (["init", "nothing.jsonl", "-o", "new.yaml"], 3, "nothing.jsonl: no such file"),
        (["generate", "nowhere", " "], 3, "the prompt is empty"),
        (["train", recipe, "output=file"], 6, "There is a file where a folder is needed"),
        (["train", recipe, "output=file/runs"], 6, "is a file, not a folder"),
        (["init", "train.jsonl", "--output", "file/recipe.yaml"], 6, "There is a file where a folder is needed"),
        (["train", recipe, "model.path=someone/something"], 7, "someone/something is no folder here"),
        (["train", recipe, "quantize=4bit"], 7, "use quantize: none"),
        (["train", recipe, "lora.targets=[nothing]"], 7, "no linear layer named nothing"),
        (["resume", "nowhere"], 8, "not a run"),
        (["eval", "model"], 8, "not a run"),
        (["generate", "nowhere", "hello"], 8, "not a run"),
    ]
    for (command, code, words), answer in zip(cases, work.several(*[case[0] for case in cases]), strict=True):
        message = answer.failed(code)
        assert words in message, (command, message)
        assert len(message.splitlines()) <= 2, (command, message)


@pytest.mark.slow  # in one process: unit/test_wrong_resume.py, faults/test_disk_full.py
def test_a_run_that_is_not_finished_or_not_the_same_is_refused(work: Work) -> None:
    (done,) = work.several(["train", work.recipe(QUICK)])
    done.good()
    (run,) = work.runs()
    (run / "report.json").unlink()
    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace("rank: 2", "rank: 3"))
    (other,) = work.several(["resume", str(run)])
    assert "lora.rank: the checkpoint has 2, this run has 3" in other.failed(8)
    (run / "recipe.yaml").write_text(saved)
    (run / "adapter" / "adapter_config.json").unlink()
    asked, resumed, talked = work.several(
        ["generate", str(run), "hello"], ["resume", str(run)], ["chat", str(run), "--max-tokens", "2"], typed="a\nb\n"
    )
    assert "adapter_config.json: missing" in asked.failed(8)
    resumed.good()
    assert talked.good().out.count("> ") == 3
    assert (run / "report.json").exists()


def test_schema_and_help_are_there_without_anything_heavy(work: Work) -> None:
    schema, unknown = work.several(["schema"], ["trian"])
    jsonschema.Draft202012Validator.check_schema(json.loads(schema.good().out))
    assert unknown.code == 2
    assert "Traceback" not in unknown.err
    told = work.finetune("--help").good().out
    assert all(
        name in told for name in ("demo", "init", "plan", "train", "resume", "eval", "generate", "chat", "doctor")
    )


@pytest.mark.slow
def test_doctor_and_plan_tell_of_every_backend(work: Work) -> None:
    doctor, plan = work.several(["doctor"], ["plan", work.recipe(QUICK), "--compare"])
    for name in ("mlx", "torch", "reference"):
        assert name in doctor.good().out
        assert name in plan.good().out
    assert "they compute the same model" in " ".join(plan.out.split())
    assert re.search(r"optimiser steps +2\nsteps per epoch +6\n", plan.out)
    assert re.match(r"fits here \(\w+\): .* free, (about|under) .* in all\n", plan.out)


@pytest.mark.slow  # in one process: unit/test_wrong_resume.py, faults/test_disk_full.py
def test_a_full_disk_is_said_and_leaves_nothing_half_written(work: Work) -> None:
    work.recipe(QUICK)
    limit = 20_000  # bytes a file; a checkpoint takes more

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    message = work.finetune("train", "recipe.yaml", "lora.targets=all", "lora.rank=16", preexec_fn=full).failed(6)
    (run,) = work.runs()
    assert str(run.relative_to(work.folder)) in message
    assert "allows no file of this size" in message
    assert list((run / "checkpoints").iterdir()) == []
    work.finetune("resume", str(run)).good()


@pytest.mark.slow
def test_one_row_of_each_label_and_a_small_validation_set_are_enough(work: Work) -> None:
    work.lines("two.jsonl", reviews(0, 2))
    work.lines("one.jsonl", reviews(7, 1))
    small = ["data.train=two.jsonl", "train.batch_size=16"]
    given, apart = work.several(
        ["train", work.recipe(QUICK), *small, "data.valid=one.jsonl"], ["train", "recipe.yaml", *small]
    )
    given.good()
    assert len(losses(work.runs()[0])) == 2
    if apart.code:  # nothing can be set apart from one row of each
        assert "data.valid" in apart.failed(3)


@pytest.mark.slow
def test_stopped_while_the_base_is_measured_it_goes_on(work: Work) -> None:
    work.lines("test.jsonl", reviews(0, 400))
    making = newest(work, 0)
    process = work.start("train", work.recipe(QUICK), "data.test=test.jsonl", "train.micro_tokens=32")
    # After the check of the data the model is opened and measured.
    wait_for(lambda: (run := making()) is not None and (run / "check.txt").exists(), process)
    process.send_signal(SIGINT)
    answer = ended(process)
    assert answer.code == 130, answer
    assert "stopped while evaluating the base model" in answer.err
    (run,) = work.runs()
    assert not (run / "evaluation-base.json").exists()
    work.finetune("resume", str(run)).good()
    assert json.loads((run / "report.json").read_text())["base"]["rows"] == 400


def _read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}: {ended(process)}")


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait_for_the_step(work: Work) -> None:
    work.lines("many.jsonl", reviews(0, 3000))
    work.lines("few.jsonl", reviews(0, 4))
    data = ["data.train=many.jsonl", "data.valid=few.jsonl"]
    slow = ["train.batch_size=3000", "train.micro_tokens=8", "evaluate.base=false", "train.steps=1"]
    making = newest(work, 0)
    process = work.start("train", work.recipe(QUICK), *data, *slow, "lora.targets=all", "lora.rank=16")
    wait_for(lambda: (run := making()) is not None and (run / "checkpoints" / "step-00000000").exists(), process)
    time.sleep(0.3)
    process.send_signal(SIGINT)
    _read_until(process, "again to stop at once")
    process.send_signal(SIGINT)
    answer = ended(process)
    assert answer.code == 130, answer
    assert "Traceback" not in answer.err
    assert losses(work.runs()[0]) == [], "it should not have come to the end of the step"

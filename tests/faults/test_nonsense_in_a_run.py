"""Files of a stopped run replaced by what no run writes, and the run resumed: exit 8 with the file's name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.disk.manifest import manifest_of
from finetune.disk.run_folder import create
from finetune.errors import Interrupted
from finetune.events import StepDone
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import load_job, run_to_report

RUN = Path("runs")


@pytest.fixture(scope="module")
def folder(make_work: Callable[[], Work]) -> tuple[Work, Path]:
    """A working folder, and a run in it that was stopped after its second step."""
    work = make_work()
    rows = [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
    work.lines("rows.jsonl", rows)
    work.lines("valid.jsonl", rows)
    work.recipe(RECIPE)
    job = load_job(load_recipe(work.folder / "recipe.yaml", [f"output={work.folder / 'runs'}"]))
    run = create(job.recipe, "stopped")
    with pytest.raises(Interrupted):
        run_to_report(job, run, stop=lambda event: isinstance(event, StepDone) and event.step == 2)
    return work, run.path


def signed(checkpoint: Path) -> None:
    """The manifest made anew, as if the run had written what is there."""
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != "manifest.json"}
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (checkpoint / "manifest.json").write_bytes(manifest_of(entries))


def loop(**values: Any) -> Callable[[Path], None]:
    """Keys of the loop's state in the newest checkpoint; ... removes one."""

    def change(run: Path) -> None:
        newest = max((run / "checkpoints").iterdir())
        whole = json.loads((newest / "loop.json").read_text())
        whole["loop"] = {k: v for k, v in (whole["loop"] | values).items() if v is not ...}
        (newest / "loop.json").write_text(json.dumps(whole))
        signed(newest)

    return change


def best(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def changed(run: Path) -> None:
        newest = max((run / "checkpoints").iterdir())
        save_file(change(load_file(newest / "best.safetensors")), newest / "best.safetensors")
        signed(newest)

    return changed


def pipe(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def evaluation(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(run: Path) -> None:
        values = json.loads((run / "evaluation-base.json").read_text())
        change(values)
        (run / "evaluation-base.json").write_text(json.dumps(values))

    return changed


def metrics(replaced: str, by: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        number = next(n for n, line in enumerate(lines) if "StepDone" in line)
        values = json.loads(lines[number])
        lines[number] = lines[number].replace(json.dumps(values[replaced]), by, 1)
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return change


def nan(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()}


NONSENSE: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"{name}: a pipe": (name, pipe(name)) for name in (
        "metrics.jsonl", "check.json", "evaluation-base.json", "identity.json",
    )},
    **{f"{name}: {text!r}": (name, written(name, text)) for name in (
        "check.json", "evaluation-base.json", "identity.json",
    ) for text in ("", "{", "[]", "nonsense", "[" * 100_000, '{"rows": "' + "\\ud800" + '"}', "1e999")},
    "check.json: a key is missing": ("check.json", written("check.json", '{"duplicates": 1}')),
    "check.json: no reasons": ("check.json", written("check.json", json.dumps({
        "duplicates": {"exact": [], "near": [], "leaks": []}, "special_tokens": {"meant": True, "places": []},
        "splits": {}, "personal": {}, "faults": 0, "enough": {"level": "enough", "reasons": []},
    }))),
    "base: fewer rows": ("evaluation-base.json", evaluation(lambda v: v["results"].pop())),
    "base: other rows": ("evaluation-base.json", evaluation(lambda v: v["results"].reverse())),
    "base: text as numbers": ("evaluation-base.json", evaluation(lambda v: v.update(accuracy="0.5", loss="1"))),
    "base: NaN": ("evaluation-base.json", evaluation(lambda v: v.update(loss=float("nan")))),
    "base: a number in a row": ("evaluation-base.json", evaluation(lambda v: v["results"][0].update(loss=None))),
    "base: a key is missing": ("evaluation-base.json", evaluation(lambda v: v.pop("perplexity"))),
    "base: one key more": ("evaluation-base.json", evaluation(lambda v: v.update(more=1))),
    "metrics: NaN": ("metrics.jsonl", metrics("loss", "NaN")),
    "metrics: text": ("metrics.jsonl", metrics("loss", '"high"')),
    "metrics: null": ("metrics.jsonl", metrics("tokens", "null")),
    "metrics: another event": ("metrics.jsonl", metrics("event", '"Nothing"')),
    "metrics: a list as its event": ("metrics.jsonl", metrics("event", "[1]")),
    "loop: micro_tokens text": ("loop.json", loop(micro_tokens="many")),
    "loop: micro_tokens true": ("loop.json", loop(micro_tokens=True)),
    "loop: best_loss text": ("loop.json", loop(best_loss="low")),
    "loop: validations of text": ("loop.json", loop(validations=["one"])),
    "loop: validations of odd objects": ("loop.json", loop(validations=[{"step": 1, "odd": 2}])),
    "loop: loss_sum None": ("loop.json", loop(loss_sum=None)),
    "loop: a key is missing": ("loop.json", loop(best_step=...)),
    "loop: one key more": ("loop.json", loop(more=1)),
    "best: another name": ("best.safetensors", best(lambda t: {f"x{name}": v for name, v in t.items()})),
    "best: one is missing": ("best.safetensors", best(lambda t: dict(list(t.items())[1:]))),
    "best: another shape": ("best.safetensors", best(lambda t: {n: np.tile(v, (2, 1)) for n, v in t.items()})),
    "best: NaN": ("step-0000000", best(nan)),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("what", NONSENSE)
def test_it_is_refused_with_its_name(folder: tuple[Work, Path], tmp_path: Path, what: str) -> None:
    work, run = folder
    copy = shutil.copytree(run, tmp_path / "copy")
    name, change = NONSENSE[what]
    change(copy)
    before = {path for path in copy.rglob("*") if path.is_file()}
    message = finetune(work, "resume", str(copy)).failed(8)
    assert name in message, message
    assert len(message.splitlines()) == 1, message
    assert {path for path in copy.rglob("*") if path.is_file()} >= before, "nothing is thrown away"
    assert not (copy / "report.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("name", ["adapter", "checkpoints/step-00000000"])
def test_a_link_to_outside_is_replaced_and_never_followed(folder: tuple[Work, Path], tmp_path: Path, name: str) -> None:
    work, run = folder
    copy = shutil.copytree(run, tmp_path / "copy")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs").write_text("theirs")
    shutil.rmtree(copy / name, ignore_errors=True)
    (copy / name).symlink_to(outside, target_is_directory=True)
    answer = finetune(work, "resume", str(copy))
    assert (answer.code, "Traceback" in answer.err) == (0, False), answer.err
    assert (outside / "theirs").read_text() == "theirs"
    assert [path.name for path in outside.iterdir()] == ["theirs"]
    assert not (copy / "adapter").is_symlink()


def test_what_was_stopped_and_not_touched_is_resumed(folder: tuple[Work, Path], tmp_path: Path) -> None:
    work, run = folder
    assert finetune(work, "resume", str(shutil.copytree(run, tmp_path / "copy"))).code == 0

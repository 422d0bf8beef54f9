"""Failure modes (`FAILURE_MODES.md`) that no other file is about."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from backends import registry
from backends.interface import Batch, LoraSpec, ModelSpec, OptimSpec
from finetune.data.collate import micro_batches
from finetune.data.rows import Example
from finetune.disk import run_folder
from finetune.disk.run_folder import create
from finetune.errors import DataError, Incompatible
from finetune.events import RunStarted, StepDone
from finetune.recipe.load import check_recipe
from finetune.report.screen import Status
from tests.end_to_end.command import ROOT
from tests.faults.test_every_key import World, models, world
from tests.unit.toy_run import load_job, run_to_report

__all__ = ["models", "world"]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_held_out_file_of_any_size_is_used_whole(world: World, rows: int) -> None:
    """Smaller than a batch (4), and of one row."""
    world.write("tiny", [{"text": f"a film {i}", "label": ("bad", "good")[i % 2]} for i in range(rows)])
    job = world.job({"data.valid": "tiny"})
    run_to_report(job, create(job.recipe, "run"))
    assert len(job.prepared.valid.examples) == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "gone.jsonl: no such file"), ("", "the file holds no rows"), ("\n\n", "the file holds no rows")],
)
def test_a_held_out_file_without_rows_is_refused_by_name(world: World, content: str | None, said: str) -> None:
    if content is not None:
        (world.folder / "gone.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        world.job({"data.valid": "gone"})


def test_the_longest_rows_come_first_in_every_step() -> None:
    """So that a step is out of memory at its beginning, before anything is added up."""
    rng = np.random.default_rng(0)
    rows = [
        Example(rng.integers(1, 99, n).astype(np.int32), np.ones(n, np.float32), f"f:{n}")
        for n in rng.integers(2, 200, 64).tolist()
    ]
    widths = [batch.inputs.shape[1] for batch in micro_batches(rows, 600)]
    assert widths == sorted(widths, reverse=True) and widths[0] >= max(len(one.tokens) for one in rows) - 1


def test_memory_does_not_grow_with_the_steps(backend: str, tiny_folder: Path) -> None:
    """Of the process, over steps of ever new shapes."""
    session = registry.open_session(backend, ModelSpec(tiny_folder), LoraSpec(2, 4.0), OptimSpec(), 0)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(60):
        shape = (int(rng.integers(1, 5)), 8 * int(rng.integers(1, 9)))
        tokens = rng.integers(1, 128, shape).astype(np.int32)
        session.step([Batch(tokens, tokens, np.ones(shape, np.float32))], 1e-4)
        held.append(psutil.Process().memory_info().rss / 2**20)
    assert held[-1] - held[29] < 32, f"{held[29]:.0f} MB after 30 steps, {held[-1]:.0f} MB after 60"


def test_the_clocks_stand_still_while_a_machine_sleeps() -> None:
    """Steps are timed with `perf_counter`, the rest with `monotonic`; on Linux and macOS neither counts sleep."""
    import time

    for name in ("perf_counter", "monotonic"):
        clock = time.get_clock_info(name)
        assert clock.monotonic and not clock.adjustable
        if sys.platform in ("linux", "darwin"):
            assert "CLOCK_MONOTONIC" in clock.implementation or "mach_absolute_time" in clock.implementation


def test_a_gap_between_steps_is_no_time_at_work() -> None:
    now = [0.0]
    status = Status(clock=lambda: now[0])
    status.update(RunStarted(0, 4, 4, False))
    for number in (1, 2):
        status.update(StepDone(number, 0.0, 1.0, 1.0, 1e-3, 10, 1000, 0.5, 0))
        now[0] += 86_400.0
    assert status.tokens_per_second == 2000.0


def test_two_runs_of_one_second_are_two_folders(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls(2026, 1, 1)

    monkeypatch.setattr(run_folder, "datetime", Still)
    recipe = world.recipe({})
    first = create(recipe, "run")
    (first.path / "report.json").write_text("the first")
    second = create(recipe, "run")
    assert first.path != second.path and (first.path / "report.json").read_text() == "the first"


def test_what_a_run_begins_with_is_only_read(world: World) -> None:
    """The model, the data and the adapter that a second run starts from, while it writes an adapter of its own."""
    first = create(world.recipe({}), "first")
    run_to_report(world.job({}), first)
    watched = [*world.models[0].iterdir(), *world.folder.glob("*.jsonl"), *first.adapter.iterdir()]
    before = {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).digest()) for file in watched}
    job = world.job({"lora.start_from": str(first.adapter), "seed": 3})
    second = create(job.recipe, "second")
    run_to_report(job, second)
    assert second.adapter.is_dir() and second.adapter != first.adapter
    assert before == {file: (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).digest()) for file in watched}


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path: Path) -> None:
    """One backend would fail on them, and another read what stands behind its weights."""
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer, tiny_llama

    whole = model_with_tokenizer(tmp_path / "model")
    rows = [{"prompt": f"what is {i}", "completion": "a fine film"} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": {"path": str(whole)}, "data": {"train": str(data)}, "backend": "reference"}
    load_job(check_recipe(values))
    tiny_llama(whole, vocab_size=100)
    with pytest.raises(
        Incompatible, match=r"rows.jsonl:\d+: the token '.*' is number \d+, and the model in .* has 100"
    ):
        load_job(check_recipe(values))


def test_embeddings_and_the_output_head_are_never_adapted(world: World) -> None:
    """So there is nothing of them to be forgotten when an adapter is saved."""
    from backends.interface import BackendError

    for name in ("embed_tokens", "lm_head", "norm"):
        with pytest.raises(BackendError, match=f"no linear layer named {name}"):
            world.job({"lora.targets": ["q_proj", name]}).open()
    session = world.job({"lora.targets": "all"}).open()
    assert not [name for name in session.lora_shapes if "embed" in name or "head" in name]


KERNELS = """
    import os
    __version__ = "0.11.1"
    def get_kernel(*given, **named):
        open(os.environ["CANARY"], "a").write(f"{given} {named} ")
        raise RuntimeError("no network")
"""
OPEN = """
    from pathlib import Path
    from backends import registry
    from backends.interface import LoraSpec, ModelSpec, OptimSpec
    registry.open_session("torch", ModelSpec(Path({model!r}), "4bit"), LoraSpec(2, 4.0), OptimSpec(), 0)
"""


@pytest.mark.skipif(bool(registry.probe("torch")), reason="torch is not here")
@pytest.mark.slow
def test_no_kernel_is_fetched_where_the_package_kernels_is_installed(tmp_path: Path, tiny_folder: Path) -> None:
    """With it bitsandbytes and transformers would download native code and run it, without a word."""
    package = tmp_path / "packages" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(KERNELS))
    about = package.with_name("kernels-0.11.1.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.1\n")
    canary = tmp_path / "canary"
    env = os.environ | {"PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}", "CANARY": str(canary)}
    script = textwrap.dedent(OPEN.format(model=str(tiny_folder)))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not canary.exists(), f"asked for {canary.read_text()}"


@pytest.mark.parametrize("name", ["builtin:../recipe.py", "builtin:reviews/../../recipe.jsonl", "builtin:/etc/passwd"])
def test_builtin_data_are_those_of_the_package(world: World, name: str) -> None:
    from finetune.data.read import read

    with pytest.raises(DataError, match="no such file in the package"):
        read(name, world.folder)


@pytest.mark.parametrize("file", ["../../recipe.yaml", "..yaml", "; rm -rf $HOME \n'.yaml", "a b/../c.yaml"])
def test_a_run_is_named_by_its_recipes_file_and_stays_in_its_output(world: World, file: str) -> None:
    run = create(world.recipe({}), Path(file).stem)
    assert run.path.resolve().parent == (world.folder / "runs").resolve() and run.recipe.exists()

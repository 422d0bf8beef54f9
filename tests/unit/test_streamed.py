"""A model that does not fit: its frozen blocks are read from the disk, and every byte is that of a model held whole."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from backends import kept_states, registry
from backends.interface import BackendError, LoraSpec, ModelSpec, OptimSpec, Session
from backends.streaming import STREAMED, read_ahead
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import ExitCode, explain
from finetune.events import Event, Note, StepDone
from finetune.recipe.load import load_recipe
from finetune.training.budget import workload
from finetune.training.job import Job
from finetune.training.read_ahead import kept_bytes
from tests.conformance.toy import random_adapter, toy_batch
from tests.unit.toy_run import load_job, run_to_report

pytest.importorskip("torch")
pytest.importorskip("mlx.core")
from tests.tiny_models import family, model_with_tokenizer

TOP = LoraSpec(4, 8.0, dropout=0.3, layers=2)
BATCHES = [toy_batch(seed=seed) for seed in range(3)]
BACKENDS = ["torch", "mlx"]


def opened(backend: str, folder: Path, streamed: bool, lora: LoraSpec = TOP, **spec: Any) -> Session:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu"} | spec
    session = registry.open_session(backend, ModelSpec(folder, streamed=streamed, **settings), lora, OptimSpec(), 0)
    session.set_state(random_adapter(session))
    assert (STREAMED in session.shortcuts) == streamed
    return session


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts of streamed models that are read from here on."""
    read: list[int] = []

    def noting(theirs: Any) -> Any:
        def loaded(self: Any, part: int) -> Any:
            read.append(part)
            return theirs(self, part)

        return loaded

    for backend in BACKENDS:
        streamed = import_module(f"backends.{backend}_backend.streamed").Streamed
        monkeypatch.setattr(streamed, "_loaded", noting(streamed._loaded))
    return read


def figures(session: Session) -> list[Any]:
    """Scores before and after two steps, the steps, and the adapter; as bytes."""
    found: list[Any] = [session.score(batch) for batch in BATCHES]
    found += [session.step(BATCHES[:2], 1e-2), session.step(BATCHES[1:], 1e-2)]
    found += [session.score(batch) for batch in BATCHES]
    state = session.get_state()
    tensors = {name: tensor.tobytes() for name, tensor in (*state.adapter.items(), *state.moments.items())}
    return [(one.logprob.tobytes(), one.greedy.tobytes()) if hasattr(one, "greedy") else one for one in found] + [
        tensors
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", {"quantize": "4bit"}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        # an embedding that is the output layer too, and two kinds of blocks
        pytest.param("gemma3_text", {}, marks=pytest.mark.slow),
        pytest.param("granite", {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("phi3", {}, marks=pytest.mark.slow),  # queries, keys and values in one layer
    ],
)
def test_a_streamed_model_computes_the_same_bytes(
    backend: str, name: str, spec: dict[str, Any], tmp_path: Path
) -> None:
    folder = family(name, tmp_path, **({} if name == "gemma3_text" else {"num_hidden_layers": 4}))
    whole, streamed = (opened(backend, folder, streamed, **spec) for streamed in (False, True))
    assert [*read_ahead(whole, BATCHES)] == []
    parts = len([*read_ahead(streamed, BATCHES)])
    assert parts == (5 if name == "gemma3_text" else 3)  # the embedding, and all blocks but two
    assert figures(streamed) == figures(whole)
    prompts = [[3, 4, 5], [7, 8, 9, 10]]
    assert streamed.generate(prompts, 4, [2]) == whole.generate(prompts, 4, [2])
    layer = "model.layers.0.mlp.down_proj"
    assert streamed.base_weight(layer).tobytes() == whole.base_weight(layer).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "granite4_h", "qwen3_moe"])
def test_a_model_inside_another_or_of_other_blocks_is_streamed_too(backend: str, name: str, tmp_path: Path) -> None:
    from tests.tiny_families import published

    folder, top = published(name, tmp_path), replace(TOP, layers=1)
    whole, streamed = (opened(backend, folder, streamed, top) for streamed in (False, True))
    assert figures(streamed) == figures(whole)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family("llama", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4, tie_word_embeddings=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_read_once(backend: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(backend, llama, True)
    read = reads(monkeypatch)
    figures(session)
    passes = len(read) // 3
    assert read == [0, 1, 2] * passes and passes == len(BATCHES)  # what was not read ahead: a pass for each batch
    figures(session)
    assert len(read) == 3 * passes
    again = opened(backend, llama, True)
    read.clear()
    assert [*read_ahead(again, BATCHES)] == [(1, 3), (2, 3), (3, 3)] and read == [0, 1, 2]
    assert [*read_ahead(again, [*BATCHES, BATCHES[0]])] == []
    figures(again)
    assert read == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_that_is_given_up_leaves_nothing_wrong(backend: str, llama: Path) -> None:
    whole, streamed = opened(backend, llama, False), opened(backend, llama, True)
    for parts in (1, 2):
        work = read_ahead(streamed, BATCHES)
        for _ in range(parts):
            next(work)
        work.close()  # type: ignore[attr-defined]
    other = replace(BATCHES[0], inputs=BATCHES[0].inputs + 1)
    assert streamed.score(other).logprob.tobytes() == whole.score(other).logprob.tobytes()
    assert figures(streamed) == figures(whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_with_its_own_code_is_not_streamed(backend: str, llama: Path) -> None:
    with pytest.raises(BackendError, match=r"code of its own.*choose a smaller model"):
        opened(backend, llama, True, remote_code=True)


# --- runs ---------------------------------------------------------------------------------------

RECIPE = """
model: {path: model}
data: {train: rows.jsonl, valid: valid.jsonl, test: test.jsonl}
prompt: {template: plain}
lora: {rank: 2, alpha: 4, dropout: 0.1, layers: 1}
train: {steps: 9, batch_size: 4, learning_rate: 0.02, checkpoint_every: 2}
evaluate: {every: 3, forgetting: false}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of four blocks, and rows with labels of one token and of several."""
    folder = tmp_path_factory.mktemp("work")
    model_with_tokenizer(folder / "model", num_hidden_layers=4)
    labels = ("good", "bad film")
    for name, count, start in (("rows", 16, 0), ("valid", 6, 100), ("test", 5, 200)):
        rows = [
            {"text": f"what is this film {i}" + " warm" * (i % 5), "label": labels[i % 2]}
            for i in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def job_of(work: Path, output: Path, backend: str) -> Job:
    return load_job(load_recipe(work / "recipe.yaml", [f"output={output}", f"backend={backend}", "device=cpu"]))


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose free memory holds no model."""
    monkeypatch.setattr(registry, "free_bytes", lambda *_: 1)


@pytest.fixture(scope="module", params=["torch", pytest.param("mlx", marks=pytest.mark.slow)])
def whole(work: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> tuple[str, RunFolder]:
    """A backend, and a finished run whose model was held whole."""
    job = job_of(work, tmp_path_factory.mktemp("runs"), request.param)
    folder, events = create(job.recipe, "whole"), list[Event]()
    run_to_report(job, folder, events=events)
    assert not told(events)
    return request.param, folder


def told(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note) and "from the disk" in event.text]


def same(run: RunFolder, other: RunFolder) -> None:
    for name in ("adapter/adapter_model.safetensors", "evaluation-base.json", "evaluation-tuned.json"):
        assert (run.path / name).read_bytes() == (other.path / name).read_bytes(), name


def test_a_run_streams_a_model_that_does_not_fit(
    whole: tuple[str, RunFolder], work: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    files: list[kept_states.Activations] = []

    class Noted(kept_states.Activations):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            files.append(self)

    monkeypatch.setattr(f"backends.{whole[0]}_backend.frozen.Activations", Noted)
    small(monkeypatch)
    read, job = reads(monkeypatch), job_of(work, tmp_path, whole[0])
    streamed, events = create(job.recipe, "streamed"), list[Event]()
    run_to_report(job, streamed, events=events)
    assert len(told(events)) == 1 and "3 frozen blocks of 4" in told(events)[0]
    assert read.count(2) == 3  # once for all rows; and before, to see that a row alone gives what a batch does
    same(streamed, whole[1])
    sizes = workload(job.recipe, job.folder, job.prepared.train.examples)
    assert kept_bytes(job.recipe, job.prepared, sizes, "cpu") == pytest.approx(files[-1].bytes, rel=0.05)


@pytest.mark.slow
def test_a_full_disk_ends_a_streamed_run_and_loses_nothing(
    whole: tuple[str, RunFolder], work: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    small(monkeypatch)
    job = job_of(work, tmp_path, whole[0])
    folder = create(job.recipe, "full")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(kept_states, "_reserve", full)
        run_to_report(job, folder)
    said, code = explain(error.value) or ("", None)
    assert code == ExitCode.DISK and "No space left" in said and "TMPDIR" in said
    assert said.startswith(kept_states.folder_on_disk())
    with pytest.raises(Exception, match="stopped"):
        stop = lambda event: isinstance(event, StepDone) and event.step == 5  # noqa: E731
        run_to_report(load_job(load_recipe(folder.recipe)), folder, resume=True, stop=stop)
    run_to_report(load_job(load_recipe(folder.recipe)), folder, resume=True)
    same(folder, whole[1])

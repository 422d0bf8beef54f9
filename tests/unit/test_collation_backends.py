"""Every backend is given the same arrays: recorded at the boundary, in whole runs on every backend of this machine."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import Batch, Session
from backends.micro_batches import joined
from finetune.disk.run_folder import create
from finetune.evaluation.samples import Sampler
from finetune.recipe.load import check_recipe
from tests.unit.chat_families import FAMILIES, tokenizer_of
from tests.unit.test_collation_families import talks
from tests.unit.toy_run import Wrapped, load_job, run_to_report

pytest.importorskip("torch")
Call = tuple[str, list[Any]]


class Recorder(Wrapped):
    """The session, and everything that it was given."""

    def __init__(self, inner: Session) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []

    def step(self, micro: Sequence[Batch], lr: float) -> Any:
        self.calls.append((f"step at {lr}", list(micro)))
        return self.inner.step(micro, lr)

    def score(self, batch: Batch) -> Any:
        self.calls.append(("score", [batch]))
        return self.inner.score(batch)

    def generate(self, prompts: Sequence[Sequence[int]], *rest: Any, **named: Any) -> Any:
        self.calls.append((f"generate {rest} {named}", [list(map(int, prompt)) for prompt in prompts]))
        return self.inner.generate(prompts, *rest, **named)


def arrays(call: Call) -> Any:
    """What was given, to the byte."""
    if not isinstance(call[1][0], Batch):
        return call
    parts = [(one.inputs, one.targets, one.weights, *one.prefixes) for one in call[1]]
    given = [[(part.dtype.str, part.shape, part.tobytes()) for part in batch] for batch in parts]
    return call[0], given, [one.prefix_of for one in call[1]]


def rows(calls: Sequence[Call]) -> Counter[Any]:
    """Every row of every batch, up to its last supervised position, however rows were put together."""
    found: Counter[Any] = Counter()
    for what, given in calls:
        for batch in map(joined, [one for one in given if isinstance(one, Batch)]):
            for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
                used = np.flatnonzero(weights)
                end = int(used[-1]) + 1 if used.size else 0
                found[what, inputs[:end].tobytes(), targets[:end].tobytes(), weights[:end].tobytes()] += 1
    return found


def recorded(name: str, backend: str, model: Path, folder: Path) -> Recorder:
    """A whole run of that family on that backend: base measured, trained, measured again."""
    found: list[Recorder] = []
    real = registry.open_session
    recipe = check_recipe(
        {
            "model": {"path": str(model)},
            "data": {"train": str(folder / "rows.jsonl"), "valid": str(folder / "valid.jsonl")},
            "lora": {"rank": 2, "alpha": 4.0},
            "train": {"epochs": 2, "batch_size": 4, "micro_tokens": 600, "max_length": 256},
            "evaluate": {"max_tokens": 2},
            "backend": backend,
            "output": str(folder / backend),
        }
    )

    def opened(*given: Any) -> Any:
        found.append(Recorder(real(*given)))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "open_session", opened)
        patch.setattr(Sampler, "_affordable", lambda self: True)  # else the clock decides whether samples are written
        job = load_job(recipe)
        run_to_report(job, create(job.recipe, name.replace(" ", "-")))
    assert {call[0].split()[0] for call in found[0].calls} == {"step", "score", "generate"}
    return found[0]


FEW = ("llama 3", "llama 2")


@pytest.mark.parametrize("name", [one if one in FEW else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES])
def test_all_backends_are_given_the_same(name: str, tmp_path: Path) -> None:
    from tests.tiny_models import tiny_llama

    names = [one for one in registry.NAMES if not registry.probe(one)]
    if len(names) < 2:
        pytest.skip(f"there is but one backend here: {names}")
    tokenizer = tokenizer_of(name)
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_llama(tmp_path / "model", vocab_size=len(tokenizer), max_position_embeddings=512, num_hidden_layers=1)
    for file, count, seed in (("rows", 10, 1), ("valid", 3, 2)):
        lines = (json.dumps({"messages": talk}) + "\n" for talk in talks(FAMILIES[name], count, seed, ""))
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    runs = [recorded(name, backend, model, tmp_path) for backend in names]
    for one, other in itertools.pairwise(runs):
        assert rows(one.calls) == rows(other.calls)
        if one.shares_prefixes == other.shares_prefixes:
            assert list(map(arrays, one.calls)) == list(map(arrays, other.calls))

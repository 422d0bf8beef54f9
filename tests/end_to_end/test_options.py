"""What only saves time or memory changes nothing: the same losses and labels with each of it on and off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.interface import Session
from backends.micro_batches import joined, own_part
from finetune.disk.checkpoint import Checkpoints
from finetune.events import StepDone, Validated
from finetune.recipe.load import load_recipe
from finetune.training.loop import Trainer
from tests.end_to_end.command import Work
from tests.unit.toy_run import load_job

# Every row begins with it, so it is a prefix that the rows of a batch share.
SYSTEM = "You read reviews of films with care. Say in one word whether the writer liked the film or did not."
RECIPE = f"""
data: {{train: train.jsonl, valid: test.jsonl}}
prompt: {{template: "{SYSTEM} {{text}} Answer:"}}
train: {{epochs: 2, batch_size: 8, learning_rate: 0.01}}
lora: {{layers: 1, dropout: 0.3}}
"""
# MLX and torch hold the frozen blocks' activations of rows seen before, unless they are to recompute them.
OPTIONS = {
    "smaller micro-batches": ["train.micro_tokens=200"],
    "activations recomputed": ["train.gradient_checkpointing=true"],
    "prefixes written out": [],
}
LAYERS = {"all blocks adapted": "lora.layers=all", "the last block adapted": "lora.layers=1"}


class WrittenOut:
    """A session to which every row is given whole."""

    shares_prefixes = False

    def __init__(self, inner: Session) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Counting(WrittenOut):
    """A session as it is, and how many batches with prefixes it was given."""

    shared = 0

    def __init__(self, inner: Session) -> None:
        super().__init__(inner)
        self.shares_prefixes = inner.shares_prefixes

    def step(self, micro: Any, lr: float) -> Any:
        self.shared += sum(bool(batch.prefixes) for batch in micro)
        return self._inner.step(micro, lr)


def curve(backend: str, work: Work, *changes: str, wrapped: Callable[[Session], Any] = Counting) -> tuple[Any, Any]:
    """Every step's loss, then every validation's loss and accuracy; and the session."""
    recipe = load_recipe(work.folder / work.recipe(RECIPE), list(changes))
    job = load_job(recipe, backend)
    session = wrapped(job.open())
    trainer = Trainer(
        session=session,
        prepared=job.prepared,
        recipe=job.recipe,
        checkpoints=Checkpoints(work.folder / "checkpoints", {}),
    )
    events = list(trainer.events())
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    made = [(event.loss, event.accuracy) for event in events if isinstance(event, Validated)]
    return np.array([*losses, *(number for pair in made for number in pair)]), session


@pytest.mark.parametrize("layers", LAYERS)
def test_nothing_that_saves_time_or_memory_changes_a_loss(
    layers: str, backend: str, make_work: Callable[[], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = None
    for option in ("as it comes", *OPTIONS):
        if backend == "reference" and option == "activations recomputed":
            continue
        work = make_work()
        monkeypatch.chdir(work.folder)
        wrapped = WrittenOut if option == "prefixes written out" else Counting
        found, session = curve(backend, work, LAYERS[layers], *OPTIONS.get(option, []), wrapped=wrapped)
        if expected is None:
            expected = found
            assert (session.shared > 0) == session.shares_prefixes
            assert found[:4].mean() > found[4:8].mean(), "nothing was learnt"
        np.testing.assert_allclose(found, expected, rtol=2e-4, err_msg=option)


@pytest.mark.parametrize("fault", ["a prefix forgotten", "a prefix mixed up"])
def test_a_fault_in_sharing_would_be_seen(
    fault: str, backend: str, make_work: Callable[[], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        pytest.skip("a bigram model never looks at what stands before")

    def broken(batch: Any) -> Any:
        if not batch.prefixes:
            return batch
        wrong = [prefix[:1] if fault == "a prefix forgotten" else prefix[::-1] for prefix in batch.prefixes]
        return replace(batch, prefixes=tuple(np.ascontiguousarray(one) for one in wrong))

    class Broken(WrittenOut):
        shares_prefixes = True

        def step(self, micro: Any, lr: float) -> Any:
            return self._inner.step([joined(broken(batch)) for batch in micro], lr)

        def score(self, batch: Any) -> Any:
            return own_part(self._inner.score(joined(broken(batch))), broken(batch))

    work = make_work()
    monkeypatch.chdir(work.folder)
    good, _ = curve(backend, work)
    wrong, _ = curve(backend, work, wrapped=Broken)
    assert np.abs(wrong / good - 1).max() > 2e-4

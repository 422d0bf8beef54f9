"""A session shared by several processes: rank 0 leads, the others follow.

A step is no exchange of messages: the others make the next step of themselves, until the sum of one says that it was
the last. A batch that is scored, or prompts that are answered together, are the work of one process, so that every
figure is the one that a single process finds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from backends.interface import (
    Batch,
    Device,
    FloatArray,
    Modules,
    NonFinite,
    OutOfMemory,
    Reader,
    Scores,
    Session,
    StepResult,
    TrainState,
)
from backends.process_messages import batch_arrays, digest, pack, state_arrays, unpack
from backends.team import ABANDON, GO, LEAVE, Abandoned, Apart, Team, compare

Prompts = Sequence[Sequence[int]]
Result = TypeVar("Result")


@dataclass
class SharedSession:
    """`interface.Session` in the first of several processes."""

    inner: Session
    team: Team
    kind: Device
    local: int = 1  # processes on this machine
    _next: Mapping[str, Any] | None = field(default=None, repr=False)  # the step that the others make now
    _busy: bool = field(default=False, repr=False)  # in the middle of an exchange

    def __post_init__(self) -> None:
        self.inner.team = self.team
        self.device, self.scheme, self.shortcuts = self.inner.device, self.inner.scheme, self.inner.shortcuts
        self.lora_shapes: Modules = self.inner.lora_shapes
        self.repeatable = self.inner.repeatable
        self.shares_prefixes, self.processes = self.inner.shares_prefixes, self.team.group.size
        self._send_state(self.inner.get_state())

    def next_step(self, cut: Mapping[str, Any], weight: float, tokens: int, mine: int, last: bool) -> None:
        """Before `step`: all that the others need to find their rows of it, as JSON.

        cut: with "step", how many are done. last: whether other work comes after it.
        """
        if self._next != cut:
            self._tell({"do": "steps", **cut})
        self.team.whole(cut["step"], weight, tokens, mine, LEAVE if last else GO)
        self._next = {**cut, "step": cut["step"] + 1}

    def step(self, micro: Sequence[Batch], lr: float, total: float | None = None) -> StepResult:
        """One update from this process's share of a step and the others'. Raises as `Session.step`, Lost, and Apart."""
        try:
            result = self.inner.step(micro, lr, total)
        except OutOfMemory as error:
            self._next = None
            self.team.say_lack()
            if not self.team.lacking:  # the others have made this step
                raise MemoryError(f"after the processes' sum ({error})") from error
            raise
        except (NonFinite, Apart):
            self._next = None
            raise
        self.repeatable = self.inner.repeatable
        if self.team.left:
            self._next = None
        return replace(result, tokens=self.team.tokens)

    def score_all(self, batches: Sequence[Batch]) -> list[Scores | OutOfMemory]:
        """The scores of at most as many batches as there are processes, in their order."""
        headers: list[dict[str, Any]] = []
        arrays: dict[str, Any] = {}
        for number, batch in enumerate(batches):
            header, part = batch_arrays(batch, number)
            headers.append(header)
            arrays |= part
        with self._asking({"do": "score", "batches": headers}, arrays):
            own = attempt(partial(self.inner.score, batches[0]))
            answers = self._answers()
        others: list[Scores | OutOfMemory] = [
            OutOfMemory(header["lacks"]) if "lacks" in header else Scores(found["logprob"], found["greedy"])
            for header, found in answers[1 : len(batches)]
        ]
        return [own, *others]

    def generate_all(
        self,
        prompts: Sequence[Prompts],
        max_tokens: int,
        stop: Collection[int],
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[list[list[int]] | OutOfMemory]:
        """The answers to at most as many groups of prompts as there are processes. seeds: one for each group."""
        drawn = [(temperature, seed) if temperature else () for seed in seeds]
        header = {"do": "generate", "prompts": prompts, "most": max_tokens, "stop": sorted(stop), "drawn": drawn}
        with self._asking(header):
            own = attempt(partial(self.inner.generate, prompts[0], max_tokens, stop, *drawn[0]))
            answers = self._answers()
        others: list[list[list[int]] | OutOfMemory] = [
            OutOfMemory(found["lacks"]) if "lacks" in found else found["tokens"]
            for found, _ in answers[1 : len(prompts)]
        ]
        return [own, *others]

    def score(self, batch: Batch) -> Scores:
        return self.inner.score(batch)

    def states(self, batch: Batch) -> FloatArray:
        return self.inner.states(batch)

    def generate(
        self, prompts: Prompts, max_tokens: int, stop: Collection[int], temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        return self.inner.generate(prompts, max_tokens, stop, temperature, seed)

    def base_weight(self, module: str) -> FloatArray:
        return self.inner.base_weight(module)

    def untrained(self) -> dict[str, FloatArray]:
        return self.inner.untrained()

    def trained(self) -> dict[str, FloatArray]:
        return self.inner.trained()

    def set_trained(self, tensors: Mapping[str, FloatArray]) -> None:
        """As `set_state`."""
        self._in_every_process(lambda: self.inner.set_trained(tensors))

    def get_state(self) -> TrainState:
        return self.inner.get_state()

    def set_state(self, state: TrainState) -> None:
        """In every process. Raises Apart where they held other numbers before."""
        self._in_every_process(lambda: self.inner.set_state(state))

    def _in_every_process(self, change: Callable[[], None]) -> None:
        before = self.inner.get_state()
        change()
        marks = self._send_state(self.inner.get_state())
        compare([digest(before), *marks[1:]], before.step)

    @property
    def kept_states(self) -> None:
        """Each process keeps those of its own rows."""

    def take_kept_states(self, states: Any) -> None:
        """It has none of the others'."""

    def peak_bytes(self) -> int:
        return self.inner.peak_bytes()

    def free_bytes(self) -> int | None:
        """For each process: those on one machine share its memory where there is no GPU."""
        free = self.inner.free_bytes()
        return free if free is None or self.kind == "gpu" else free // self.local

    def end(self) -> None:
        """The others end, where the last exchange with them was whole; else they see that this process is gone."""
        if not self._busy:
            self._tell({"do": "end"})

    def _send_state(self, state: TrainState) -> list[bytes]:
        with self._asking({"do": "state", "step": state.step}, state_arrays(state)):
            return [bytes.fromhex(header.get("mark", "")) for header, _ in self._answers()]

    def _tell(self, header: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> None:
        self._leave()
        self.team.group.broadcast(pack(header, arrays))

    def _leave(self) -> None:
        """The others stop making steps. The one that they have begun is called off."""
        if self._next is None:
            return
        self._next = None
        with suppress(Abandoned, OutOfMemory):
            self.team.absent(order=ABANDON)

    @contextmanager
    def _asking(self, header: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> Iterator[None]:
        self._busy = True
        self._tell(header, arrays)
        yield
        self._busy = False

    def _answers(self) -> list[tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]]:
        """Of every process, this one's empty. Raises ValueError as the work of another process did."""
        answers = [unpack(message) for message in self.team.group.gather(pack({}))]
        self._busy = False
        for rank, (header, _) in enumerate(answers):
            if "wrong" in header:
                raise ValueError(f"process {rank}: {header['wrong']}")
        return answers


def attempt(work: Callable[[], Result]) -> Result | OutOfMemory:
    """What the work gives, or the OutOfMemory that it raised."""
    try:
        return work()
    except OutOfMemory as error:
        return error.with_traceback(None)  # whose frames may hold what is to be freed


def side_by_side(session: Reader) -> int:
    """How many batches, or groups of prompts, are worked on at the same time."""
    return session.processes if isinstance(session, SharedSession) else 1


def score_all(session: Reader, batches: Sequence[Batch]) -> list[Scores | OutOfMemory]:
    """The scores of as many batches as are worked on side by side, or fewer; or why one did not fit in memory."""
    if isinstance(session, SharedSession) and len(batches) > 1:
        return session.score_all(batches)
    return [attempt(partial(session.score, batch)) for batch in batches]


def generate_all(
    session: Reader,
    prompts: Sequence[Prompts],
    max_tokens: int,
    stop: Collection[int],
    temperature: float,
    seeds: Sequence[int],
) -> list[list[list[int]] | OutOfMemory]:
    """The same with groups of prompts, each with its seed where something is drawn."""
    if isinstance(session, SharedSession) and len(prompts) > 1:
        return session.generate_all(prompts, max_tokens, stop, temperature, seeds)
    drawn = [(temperature, seed) if temperature else () for seed in seeds]
    return [
        attempt(partial(session.generate, group, max_tokens, stop, *chance))
        for group, chance in zip(prompts, drawn, strict=True)
    ]

"""Whether a run fits on a machine, and how long its training takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from backends import registry
from backends.interface import BackendError, Device
from backends.memory_plan import Costs, Footprint, Machine
from finetune.recipe.schema import MICRO_TOKENS
from finetune.training.budget import LEAST, Workload, fitting_tokens, held_here, imbalance, workload
from finetune.training.job import Job
from finetune.training.speed import Speed, rate_here


@dataclass(frozen=True)
class Forecast:
    """What a run needs on one machine."""

    backend: str
    device: Device
    needed: Footprint
    memory: float | None  # bytes that the machine can give; None: not known
    tokens: int  # at a time
    recomputed: bool  # whether activations are
    streamed: bool  # whether the model's frozen blocks are read from the disk
    seconds: float  # of training
    rate: float  # of matrix products, floating-point operations per second
    reached: float  # the share of it that steps are taken to reach
    speed: Speed

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.needed.peak <= self.memory


def forecast_here(work: Workload, backend: str, micro_tokens: int | None, processes: int = 1) -> Forecast:
    """On this machine, whose products are timed for a moment. `micro_tokens` None: as many as fit.

    Of several processes each needs that memory; without GPUs they share what is free, and the processors.
    """
    work, costs = held_here(work, backend, registry.describe(backend, work.model.device)["device"])
    free = registry.free_bytes(backend, work.model.device)
    apart = processes if costs.device == "gpu" else 1
    free = free if free is None else free * apart // processes
    work = replace(work, streamable=work.streamable and processes == 1)
    work = work.settled(costs, free, micro_tokens)
    tokens = micro_tokens or (MICRO_TOKENS if free is None else _fitting_with_model(work, costs, free))
    rate = rate_here(backend, work.model) * apart / imbalance(work, processes)
    return _forecast(work, backend, costs, free, tokens, rate)


def forecast_on(machine: Machine, work: Workload, backend: str, micro_tokens: int | None) -> Forecast:
    """On the GPU of a machine that is not at hand. `micro_tokens` None: as many as fit."""
    costs = registry.costs(backend, "gpu")
    work = work.settled(costs, machine.memory, micro_tokens)
    tokens = micro_tokens or _fitting_with_model(work, costs, machine.memory)
    return _forecast(work, backend, costs, machine.memory, tokens, machine.rate)


def _forecast(work: Workload, backend: str, costs: Costs, memory: float | None, tokens: int, rate: float) -> Forecast:
    speed = Speed.of(costs, rate)
    seconds = work.epochs * work.seconds(speed, tokens)
    needed, held = work.memory(tokens, costs), (work.model.checkpointing, work.model.streamed)
    return Forecast(backend, costs.device, needed, memory, tokens, *held, seconds, rate, costs.reached, speed)


def _fitting_with_model(work: Workload, costs: Costs, memory: float) -> int:
    """`fitting_tokens` where the model is not loaded yet."""
    least = work.memory(LEAST, costs)
    return fitting_tokens(work, costs, memory - (least.training - least.step))


def predicted_peak(job: Job, device: str, streamed: bool = False) -> int | None:
    """Bytes at most, as `plan` says them before anything is loaded; None where what is free decides, or sizes do not
    say.
    """
    train = job.recipe.train
    if "auto" in (train.micro_tokens, train.gradient_checkpointing) or not job.prepared.train.examples:
        return None
    try:
        work = workload(job.recipe, job.folder, job.prepared.train.examples)
        work, costs = held_here(replace(work, model=replace(work.model, streamed=streamed)), job.backend, device)
        return round(work.memory(job.recipe.train.tokens_at_once, costs).peak)
    except BackendError:
        return None

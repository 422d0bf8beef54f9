"""What a run will need, said before anything is loaded: memory and time, here and on machines that are not at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from backends import registry
from backends.interface import LoraSpec, ModelSpec, Session
from backends.kept_states import kept_bytes
from backends.memory import available_bytes
from backends.memory_plan import (
    Architecture,
    Device,
    Footprint,
    Micro,
    first_adapted,
    footprint,
    read_architecture,
)
from backends.model_folder import ModelFolder, trainable_parameters
from backends.rate import measured_rate
from finetune.data.collate import groups, step_indices, width
from finetune.data.rows import Example
from finetune.events import Progress, Sink
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import MICRO_TOKENS, Recipe
from finetune.recipe.specs import lora_spec, model_spec
from finetune.training.job import Job

SAMPLED = 64  # steps whose micro-batches are looked at; the one with the longest row is always among them
LEAST, MOST = 64, 2**17  # tokens at a time that `auto` chooses from
SPARE = 0.9  # of the free memory: other programs go on
REACHED = {
    "cpu": 0.6,
    "gpu": 0.35,
}  # share of the rate of matrix products that steps reach: one case timed, and assumed


@dataclass(frozen=True)
class Machine:
    """One that is not at hand. The rate is its maker's figure for matrix products, and not measured."""

    name: str
    backend: str
    memory: float  # bytes that a process can use of the device
    rate: float  # floating-point operations a second, 16-bit
    source: str


GIB = 2.0**30
MACHINES = (
    Machine("MacBook M1, 8 GB", "mlx", 5.33 * GIB, 2.6e12, "Apple, 10 November 2020: 2.6 TFLOPS; Metal gives 2/3"),
    Machine("MacBook M2, 16 GB", "mlx", 10.67 * GIB, 3.6e12, "Apple, 6 June 2022: 3.6 TFLOPS; Metal gives 2/3"),
    Machine("RTX 4060, 8 GB", "torch", 7.6 * GIB, 30e12, "NVIDIA: 15 shader TFLOPS, twice that in bf16"),
    Machine("RTX 4070, 12 GB", "torch", 11.5 * GIB, 58e12, "NVIDIA: 29 shader TFLOPS, twice that in bf16"),
    Machine("RTX 4090, 24 GB", "torch", 23.5 * GIB, 165e12, "NVIDIA Ada whitepaper: 165 TFLOPS bf16, dense"),
)


@dataclass(frozen=True)
class Workload:
    """One recipe on its data: everything that memory and time follow from."""

    architecture: Architecture
    model: ModelSpec
    lora: LoraSpec
    adapted: Mapping[str, tuple[int, int]]
    examples: Sequence[Example]
    batch_size: int
    epochs: float
    seed: int

    def memory(self, micro_tokens: int, backend: str, device: Device) -> Footprint:
        micro = largest_micro(self.examples, self.batch_size, self.seed, micro_tokens)
        return footprint(self.architecture, self.model, self.lora, self.adapted, micro, backend, device)

    def kept_on_disk(self, device: Device) -> int:
        """What frozen blocks below the first adapted one make of all rows, kept in a temporary file."""
        e = 2 if self.model.dtype == "bfloat16" or (self.model.dtype == "auto" and device == "gpu") else 4
        tokens = sum(int(np.flatnonzero(example.weights).max(initial=0)) for example in self.examples)
        return kept_bytes(tokens, self.architecture.hidden, e) if first_adapted(self.adapted) else 0

    def operations(self) -> float:
        """Floating-point operations of one epoch of training; padding, norms and the optimiser are not counted.

        A product with a frozen weight costs 2 a weight and token forward, and 2 more backward for its input's slope
        (there is no third for the weight's own); below the first adapted block there is no backward pass, and the
        forward pass is computed in one epoch alone.
        """
        shape = self.architecture
        lengths = np.array([len(example.tokens) - 1 for example in self.examples], np.float64)
        tokens = lengths.sum()
        supervised = sum(int(np.count_nonzero(example.weights[1:])) for example in self.examples)
        frozen = first_adapted(self.adapted)
        learning = shape.blocks - frozen
        block = 2.0 * shape.linear / shape.blocks * tokens + 2.0 * shape.queries * (lengths**2).sum()
        lora = 6.0 * trainable_parameters(self.adapted, self.lora.rank) * tokens
        passes = 2.0 + self.model.checkpointing
        head = 4.0 * shape.vocabulary * shape.hidden * supervised
        return float(block * (learning * passes + frozen / max(self.epochs, 1.0)) + lora + head)


def workload(recipe: Recipe, folder: ModelFolder, examples: Sequence[Example]) -> Workload:
    """Raises BackendError where the folder has no weights, or no such targets."""
    plan = make_plan(recipe, len(examples))
    return Workload(
        architecture=read_architecture(folder),
        model=model_spec(recipe, folder),
        lora=lora_spec(recipe),
        adapted=folder.lora_modules(lora_spec(recipe)),
        examples=examples,
        batch_size=recipe.train.batch_size,
        epochs=plan.steps / plan.steps_per_epoch,
        seed=recipe.seed,
    )


def largest_micro(examples: Sequence[Example], batch_size: int, seed: int, micro_tokens: int) -> Micro:
    """The micro-batch of the first epoch with the most tokens; of many steps, only a sample is looked at."""
    n = len(examples)
    steps = -(-n // batch_size)
    longest = max(range(n), key=lambda i: len(examples[i].tokens))
    chosen = {step: step_indices(n, batch_size, seed, step) for step in range(min(steps, SAMPLED))}
    chosen |= {} if steps <= SAMPLED else {-1: [longest]}
    found = Micro(1, 1, 1)
    for rows in chosen.values():
        for group in groups([len(examples[i].tokens) for i in rows], micro_tokens):
            members = [examples[rows[i]] for i in group]
            wide = width(max(len(one.tokens) for one in members) - 1)
            if len(members) * wide > found.tokens:
                found = Micro(len(members), wide, sum(int(np.count_nonzero(one.weights[1:])) for one in members))
    return found


def fitting_tokens(work: Workload, backend: str, device: Device, free: float) -> int:
    """The largest power of two of tokens at a time whose step fits in `free` bytes beside the loaded model.

    No more than a step can use, and no less than LEAST: a row is never cut.
    """
    tokens = LEAST
    heaviest = work.batch_size * max(width(len(example.tokens) - 1) for example in work.examples)
    while tokens < min(MOST, heaviest) and work.memory(2 * tokens, backend, device).step <= SPARE * free:
        tokens *= 2
    return tokens


def starting_tokens(job: Job, session: Session, sink: Sink) -> int:
    """With how many tokens at a time a new run begins: as the recipe says, but no more than fit beside the model.

    A resumed run goes on with its checkpoint's number, so that its sums are cut the same way.
    """
    asked, free = job.recipe.train.micro_tokens, session.free_bytes()
    if free is None or not job.prepared.train.examples:
        return job.recipe.train.tokens_at_once
    work = workload(job.recipe, job.folder, job.prepared.train.examples)
    device: Device = "cpu" if session.device == "cpu" else "gpu"
    if asked != "auto" and work.memory(asked, job.backend, device).step <= free:
        return asked
    fits = fitting_tokens(work, job.backend, device, free)
    chosen = fits if asked == "auto" else min(asked, fits)
    if chosen != asked:
        sink(Progress(0, f"micro-batches of at most {chosen:,} tokens: what fits in {free / 1e9:.1f} GB free", 0, 0))
    return chosen


@dataclass(frozen=True)
class Forecast:
    """What a run needs on one machine."""

    backend: str
    cpu: bool
    needed: Footprint
    memory: float | None  # bytes that can be had; None: not known
    tokens: int  # at a time
    seconds: float | None  # an epoch; None: not known
    source: str  # of the rate

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.needed.peak <= self.memory


def here(work: Workload, backend: str, micro_tokens: int | None) -> Forecast:
    """On this machine, whose products are timed for a moment; None: as many tokens at a time as fit."""
    name = str(registry.describe(backend)["device"])
    device: Device = "cpu" if name == "cpu" else "gpu"
    free = float(available_bytes()) if device == "cpu" else None
    tokens = micro_tokens or (MICRO_TOKENS if free is None else _fitting(work, backend, device, free))
    bfloat16 = work.model.dtype == "bfloat16" or (work.model.dtype == "auto" and device == "gpu")
    rate = measured_rate(backend, bfloat16)
    seconds = work.operations() / (rate * REACHED[device])
    source = f"measured now, {rate / 1e12:.2g} TFLOPS"
    return Forecast(backend, device == "cpu", work.memory(tokens, backend, device), free, tokens, seconds, source)


def on(machine: Machine, work: Workload, micro_tokens: int | None) -> Forecast:
    """On a machine that is not at hand; None: as many tokens at a time as fit there."""
    tokens = micro_tokens or _fitting(work, machine.backend, "gpu", machine.memory)
    needed = work.memory(tokens, machine.backend, "gpu")
    seconds = work.operations() / (machine.rate * REACHED["gpu"])
    return Forecast(machine.backend, False, needed, machine.memory, tokens, seconds, machine.source)


def _fitting(work: Workload, backend: str, device: Device, memory: float) -> int:
    """`fitting_tokens` before the model is loaded."""
    least = work.memory(LEAST, backend, device)
    return fitting_tokens(work, backend, device, memory - (least.training - least.step))

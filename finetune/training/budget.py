"""Predicted memory and time of a run, here and on other machines, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from backends import registry
from backends.interface import Device, LoraSpec, ModelSpec, Modules
from backends.memory_plan import (
    Architecture,
    Costs,
    Footprint,
    first_adapted,
    footprint,
    kept_states_bytes,
    read_architecture,
    trained_numbers,
)
from backends.model_folder import ModelFolder
from backends.streaming import frozen_file_bytes
from finetune.data.collate import balanced, groups, shared_prefix, step_indices, width
from finetune.data.pair_batches import as_one
from finetune.data.rows import Example
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec, model_spec
from finetune.training.sampled_steps import NO_ROWS, SAMPLED, Cut, Rows, largest_micro
from finetune.training.speed import Speed

LEAST, MOST = 64, 2**17  # tokens at a time that `auto` chooses from
ENOUGH = 1024  # of them, beyond which unpacking 4-bit weights and starting kernels is a small part of a step
PLAIN = 0.6  # times the start of an adapted layer: that of another, which has one product in the place of three
DISK_RATE = 1e9  # bytes per second of a solid-state disk, assumed: the slower ones of 2020 and later reach it
SPARE = 0.9  # of the free memory: other programs go on


@dataclass(frozen=True)
class Workload:
    """One recipe on its data: everything that memory and time follow from."""

    architecture: Architecture
    model: ModelSpec
    lora: LoraSpec
    adapted: Modules
    examples: Sequence[Example]
    batch_size: int
    epochs: float
    seed: int
    unsettled: bool = False  # whether the recipe leaves it open if activations are computed again
    streamable: bool = False  # whether the model may be streamed where it does not fit
    averaged: bool = False  # whether an average over the steps is kept

    def settled(self, costs: Costs, memory: float | None, micro_tokens: int | None) -> Workload:
        """The same, streamed if its smallest step would not fit in `memory` bytes otherwise.

        Where that is open, with recomputation if a step without it would not fit. That is a step of the tokens asked
        for, or of ENOUGH: with more at a time little is saved per token.
        """
        if self._has_to_stream(costs, memory):
            streamed = replace(self, model=replace(self.model, streamed=True), streamable=False)
            return streamed.settled(costs, memory, micro_tokens)
        if not self.unsettled:
            return self
        kept = replace(self, unsettled=False)
        needed = kept.memory(min(micro_tokens or ENOUGH, ENOUGH), costs).training
        if memory is None or needed <= SPARE * memory:
            return kept
        return replace(kept, model=replace(self.model, checkpointing=True))

    def _has_to_stream(self, costs: Costs, memory: float | None) -> bool:
        if not (self.streamable and costs.streams and first_adapted(self.adapted)) or memory is None:
            return False
        again = self.unsettled or self.model.checkpointing
        smallest = replace(self, model=replace(self.model, checkpointing=again)).memory(LEAST, costs)
        return smallest.peak > memory

    def made_later(self, costs: Costs) -> float:
        """Bytes that a loaded session does not hold before its first step: the gradient, and the best of what trains
        with its average.
        """
        numbers = trained_numbers(self.architecture, self.lora, self.adapted)
        return (8.0 + costs.average * self.averaged) * numbers

    def memory(self, micro_tokens: int, costs: Costs) -> Footprint:
        micro = largest_micro(self.examples, self.batch_size, self.seed, micro_tokens)
        return footprint(self.architecture, self.model, self.lora, self.adapted, micro, costs, self.averaged)

    def kept_on_disk(self, device: Device) -> int:
        """Bytes of the temporary file with the states of all rows that enter the first adapted block."""
        tokens = sum(int(np.flatnonzero(example.weights)[-1]) for example in self.examples if example.weights.any())
        size = kept_states_bytes(tokens, self.architecture.hidden, self.model.number_bytes(device))
        return size if first_adapted(self.adapted) else 0

    def operations(self, cut: Cut | None = None) -> float:
        """Floating-point operations of one epoch of training; norms and the optimiser are not counted.

        cut: the micro-batches; not given: the rows as they are, without padding.

        A product with a frozen weight costs 2 per weight and token forward, and 2 more backward for its input's
        gradient; the weight itself has none, or 2 more where it trains. Below the first adapted block there is no
        backward pass, and the forward pass is computed in the first epoch alone.
        """
        shape = self.architecture
        rows = cut.rows if cut else Rows.of([len(example.tokens) - 1 for example in self.examples])
        frozen = first_adapted(self.adapted)
        adapted = shape.blocks - frozen
        lora = 0.0 if self.lora.whole else 6.0 * self.lora.trainable(self.adapted) * rows.tokens
        passes = 2.0 + self.lora.whole + self.model.checkpointing
        of_output = (4.0 + 2.0 * self.lora.whole) * shape.vocabulary
        head = (6.0 * self.lora.classes or of_output) * shape.hidden * self.supervised
        return self._block(rows) * (adapted * passes + frozen / max(self.epochs, 1.0)) + lora + head

    def read_seconds(self) -> float:
        """Of one pass through a streamed model's frozen blocks, as far as the disk goes."""
        frozen = first_adapted(self.adapted) if self.model.streamed else 0
        return frozen_file_bytes(self.architecture, frozen) / DISK_RATE

    def seconds(self, speed: Speed, micro_tokens: int) -> float:
        """Of one epoch of training: products, and what is done beside them for each micro-batch and token."""
        speed = speed.of_training
        cut, passes = self.cut(micro_tokens, speed.at_once), 2 + self.model.checkpointing
        masking = 0.0
        if self.lora.dropout:
            masking = speed.masking * sum(inputs for _, inputs in self.adapted.values()) * cut.rows.tokens
        through, once = (1 - self.frozen) * passes, self.frozen / max(self.epochs, 1.0)  # as in `operations`
        alone = len(self.examples) / max(self.epochs, 1.0)  # rows that frozen blocks compute, each by itself
        elementwise = self.elementwise(speed, cut.rows) * (through + once)
        elementwise += self.elementwise(speed, NO_ROWS, self.supervised) * passes
        elementwise += self.reading_weights(speed) * (cut.batches * through + alone * self.frozen)
        layers = self.starts(speed) * cut.batches * (passes + 1) + self.frozen_starts(speed) * alone  # backward: two
        return speed.seconds(self.operations(cut) + passes * masking, layers, elementwise)

    @property
    def frozen(self) -> float:
        """The share of the blocks below the adapter, which compute each row once and by itself."""
        return first_adapted(self.adapted) / self.architecture.blocks

    def starts(self, speed: Speed) -> float:
        """Of layers in one forward pass above frozen blocks, in those of adapted ones that are not in 4 bits."""
        plain = len(self.architecture.modules) * (1 - self.frozen) - len(self.adapted)
        return (len(self.adapted) + PLAIN * plain) * self._start(speed)

    def frozen_starts(self, speed: Speed) -> float:
        """The same of the frozen blocks."""
        return PLAIN * len(self.architecture.modules) * self.frozen * self._start(speed)

    def _start(self, speed: Speed) -> float:
        return speed.four_bit_host if self.packed else 1.0

    def reading_weights(self, speed: Speed) -> float:
        """Seconds that one pass through the layers takes however few its tokens are."""
        return speed.elementwise.weight * self.architecture.linear + speed.unpacking * self.packed / speed.rate

    def elementwise(self, speed: Speed, rows: Rows, logits_of: int = 0) -> float:
        """Seconds of all that is not a product in one forward pass, and at so many positions of the output layer."""
        shape, each = self.architecture, speed.elementwise
        of_scores = each.score * shape.heads * shape.blocks * rows.pairs
        of_logits = each.logit * (self.lora.classes or shape.vocabulary) * logits_of
        return each.number * shape.widths * rows.tokens + of_scores + of_logits

    @property
    def supervised(self) -> int:
        """Tokens of all rows that the loss is taken of."""
        return sum(int(np.count_nonzero(example.weights[1:])) for example in self.examples)

    @property
    def packed(self) -> int:
        """How many weights each pass unpacks."""
        return self.architecture.linear if self.model.quantize == "4bit" else 0

    def cut(self, micro_tokens: int, at_once: int | None = None) -> Cut:
        """How the steps of the first epoch are computed; of many, only a sample is looked at.

        at_once: tokens of a micro-batch that are computed together; None: all.
        """
        n, computed, batches = len(self.examples), NO_ROWS, 0
        steps = -(-n // self.batch_size)
        looked = range(min(steps, SAMPLED))
        for step in looked:
            rows = [self.examples[i] for i in step_indices(n, self.batch_size, self.seed, step)]
            prefix = 0 if first_adapted(self.adapted) else shared_prefix(rows)
            for group in groups([len(row.tokens) - prefix for row in rows], micro_tokens, prefix):
                wide = width(max(len(rows[i].tokens) for i in group) - prefix - 1)
                computed += Rows.of([wide] * len(group), prefix) + Rows.of([prefix] * bool(prefix))
                batches += -(-len(group) // max(1, (at_once or micro_tokens) // max(1, wide)))
        return Cut(computed * (steps / len(looked)), batches * steps / len(looked))

    def scoring(self, rows: Rows, supervised: int, known: bool = False) -> float:
        """Floating-point operations of one forward pass, and the head where it is read.

        known: what frozen blocks make of the rows is.
        """
        shape = self.architecture
        lora = 0.0 if self.lora.whole else 2.0 * self.lora.trainable(self.adapted) * rows.tokens
        return (
            self._block(rows) * shape.blocks * (1 - self.frozen * known)
            + lora
            + 2.0 * (self.lora.classes or shape.vocabulary) * shape.hidden * supervised
        )

    def _block(self, rows: Rows) -> float:
        """Of one block's forward pass."""
        shape = self.architecture
        return 2.0 * shape.linear / shape.blocks * rows.tokens + 2.0 * shape.queries * rows.pairs


def workload(recipe: Recipe, folder: ModelFolder, examples: Sequence[Example]) -> Workload:
    """Raises BackendError where the folder has no weights, or no such targets."""
    plan = make_plan(recipe, len(examples))
    return Workload(
        architecture=read_architecture(folder),
        model=model_spec(recipe, folder),
        lora=lora_spec(recipe),
        adapted=folder.lora_modules(lora_spec(recipe)),
        examples=[*map(as_one, examples)],
        batch_size=recipe.train.batch_size,
        epochs=plan.predicted / plan.steps_per_epoch,
        seed=recipe.seed,
        unsettled=recipe.train.gradient_checkpointing == "auto",
        streamable=bool(folder.weights) and not folder.remote_code,
        averaged=plan.open_end,
    )


def held_here(work: Workload, backend: str, device: str) -> tuple[Workload, Costs]:
    """The same with the type of numbers that a device of this machine computes in, and what the backend needs there."""
    costs = registry.costs(backend, registry.device_kind(device))
    number = work.model.number_type(costs.device, registry.describe(backend, work.model.device)["half"])
    return replace(work, model=replace(work.model, dtype=number)), costs


def has_to_stream(recipe: Recipe, folder: ModelFolder, backend: str) -> bool:
    """Whether a model that is read, and not trained, fits here only with its frozen blocks on the disk."""
    if lora_spec(recipe).layers is None or not folder.weights:
        return False
    row = Example(np.zeros(LEAST + 1, np.int32), np.ones(LEAST + 1, np.float32), "")
    device = registry.describe(backend, recipe.device)["device"]
    work, costs = held_here(replace(workload(recipe, folder, [row]), unsettled=False), backend, device)
    return work.settled(costs, registry.free_bytes(backend, recipe.device), LEAST).model.streamed


def fitting_tokens(work: Workload, costs: Costs, free: float) -> int:
    """The largest power of two of tokens at a time whose step fits in `free` bytes beside the loaded model.

    At most what a step can use, and at least LEAST: a row is never cut.
    """
    tokens = LEAST
    heaviest = work.batch_size * max(width(len(example.tokens) - 1) for example in work.examples)
    while tokens < min(MOST, heaviest) and work.memory(2 * tokens, costs).step <= SPARE * free:
        tokens *= 2
    return tokens


def imbalance(work: Workload, processes: int) -> float:
    """How many times the mean share of a step's tokens the largest is: the others wait for it."""
    n = len(work.examples)
    most = mean = 0.0
    for step in range(min(-(-n // work.batch_size), SAMPLED)):
        lengths = [len(work.examples[i].tokens) for i in step_indices(n, work.batch_size, work.seed, step)]
        most += max(sum(lengths[row] for row in rows) for rows in balanced(lengths, processes))
        mean += sum(lengths) / processes
    return most / mean if mean else 1.0

"""Evaluations besides accuracy, and their predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backends.interface import PROMPTS_TOGETHER
from finetune.data.collate import shared_prefix
from finetune.data.pair_batches import as_one
from finetune.data.rows import Example, Prepared
from finetune.evaluation.analysis import AGAIN, SWAPPED, Questions
from finetune.evaluation.consistency import SAMPLED
from finetune.evaluation.forgetting import ANSWERED, ANSWERS, READING, WRITING, GeneralText
from finetune.evaluation.suite import ASKED, Suite
from finetune.recipe.schema import Recipe
from finetune.training.budget import Workload
from finetune.training.sampled_steps import NO_ROWS, Rows
from finetune.training.speed import Speed


@dataclass(frozen=True)
class Beside:
    questions: Questions = field(default_factory=Questions)
    suite: Suite | None = None

    def counts(self) -> dict[str, str]:
        """Of each part of a run how much there is to do, in words."""
        again, pieces = self.questions.rows, len(self.questions.general.examples)
        shown = [*([f"{again:,} rows again"] if again else []), *([f"{pieces:,} pieces of text"] if pieces else [])]
        cases = {"suite": f"{len(self.suite.cases):,} cases"} if self.suite else {}
        return {"errors": ", ".join(shown), **cases}


@dataclass(frozen=True)
class Seconds:
    """How long a model takes for rows."""

    recipe: Recipe
    prepared: Prepared
    work: Workload
    speed: Speed
    micro_tokens: int  # computed together

    def reading(self, examples: Sequence[Example], known: bool = False) -> float:
        """Their losses."""
        examples = [*map(as_one, examples)]
        supervised = sum(int(np.count_nonzero(example.weights[1:])) for example in examples)
        prefix = 0 if self.work.frozen else shared_prefix(examples)
        rows = Rows.of([len(example) - 1 - prefix for example in examples], prefix)
        if prefix:  # each batch computes it once, and a row's part of keeping it counts as a quarter (`groups`)
            tokens = int(rows.tokens) + len(examples) * prefix // 4
            rows += Rows.of([prefix]) * -(-tokens // max(self.micro_tokens - prefix, 1))
        return self.passes(rows, supervised, known)

    def choosing(self, prompts: Sequence[int], known: bool = False) -> float:
        """A label for each prompt of so many tokens, which is computed once for all labels unless blocks are frozen."""
        labels = [len(label) for label in self.prepared.label_tokens]
        if self.work.frozen:
            each = Rows.of([n + label for n in prompts for label in labels])
            return self.passes(each, sum(labels) * len(prompts), known)
        return self.passes(Rows.of([n + sum(labels) for n in prompts]), sum(labels) * len(prompts))

    def writing(self, prompts: Sequence[int], most: int) -> float:
        """An answer to each, of `most` tokens."""
        steps = -(-len(prompts) // PROMPTS_TOGETHER) * most
        together = min(PROMPTS_TOGETHER, len(prompts))
        one = Rows.of([1])
        elementwise = self.work.elementwise(self.speed, one, 1) * together + self.work.reading_weights(self.speed)
        step, layers = self.work.scoring(one, 1) * together, self.work.starts(self.speed)
        layers += self.work.frozen_starts(self.speed)
        each = self.speed.seconds(step, layers, elementwise) + self.work.read_seconds()
        return self.passes(Rows.of(prompts), len(prompts)) + steps * each

    def passes(self, rows: Rows, supervised: int, known: bool = False) -> float:
        """Of forward passes. known: what frozen blocks make of the rows is kept already."""
        frozen, batches = self.work.frozen, self.speed.pieces(rows.tokens, self.micro_tokens)
        alone = 0 if known else rows.count  # rows that frozen blocks compute, each by itself
        elementwise = self.work.elementwise(self.speed, rows) * (1 - frozen * known)
        elementwise += self.work.elementwise(self.speed, NO_ROWS, supervised)
        elementwise += self.work.reading_weights(self.speed) * (batches * (1 - frozen) + alone * frozen)
        layers = self.work.starts(self.speed) * batches + self.work.frozen_starts(self.speed) * alone
        return self.speed.seconds(self.work.scoring(rows, supervised, known), layers, elementwise)

    def evaluation(self, examples: Sequence[Example], known: bool = False) -> dict[str, float]:
        """Of each kind of evaluation of these rows, as `evaluate` names them. known: they were evaluated before."""
        parts, prompts = {"loss": self.reading(examples, known)}, lengths(examples)
        if self.prepared.task == "classification" and not self.recipe.head:
            parts["labels"] = self.choosing(prompts, known)
        elif self.prepared.task == "generation" and self.recipe.evaluate.generate:
            parts["answers"] = self.writing(prompts, self.recipe.evaluate.max_tokens)
        return parts

    def beside(self, asked: Beside, models: Sequence[str]) -> dict[str, float]:
        """By the names of `Progress.what`, in the order of the run. models: those that are measured."""
        return (
            self._again(asked.questions, models)
            | self._general(asked.questions.general)
            | self._suite(asked.suite, models)
        )

    def _again(self, questions: Questions, models: Sequence[str]) -> dict[str, float]:
        worded, swapped = questions.in_other_words.examples, questions.swapped.examples
        parts: dict[str, float] = {}
        if worded:
            each = self.writing(lengths(worded), self.recipe.evaluate.max_tokens)
            parts |= {AGAIN.format(model, time): each for model in models for time in range(1, SAMPLED + 2)}
        if swapped:
            kinds = self.evaluation(swapped)
            parts |= {f"{SWAPPED.format(model)}: {kind}": taken for model in models for kind, taken in kinds.items()}
        return parts

    def _general(self, general: GeneralText) -> dict[str, float]:
        """The base's own answers are about as long as what they follow."""
        if not general.examples:
            return {}
        base, tuned = "base model", "tuned model"
        read = self.reading(general.examples)
        parts = {READING.format(base): read, READING.format(tuned): read}
        if general.halves:
            answers, written = self.reading(general.halves), self.writing(lengths(general.halves), ANSWERED)
            parts |= {WRITING: written, ANSWERS.format(base): answers, ANSWERS.format(tuned): answers}
        return parts

    def _suite(self, suite: Suite | None, models: Sequence[str]) -> dict[str, float]:
        if suite is None:
            return {}
        prompts = lengths(suite.prepared.held_out.examples)
        labels = suite.prepared.task == "classification"
        each = self.choosing(prompts) if labels else self.writing(prompts, self.recipe.evaluate.max_tokens)
        return {ASKED.format(model): each for model in models}


def lengths(examples: Sequence[Example]) -> list[int]:
    """Of their prompts, in tokens."""
    return [len(example.prompt_tokens) for example in examples]

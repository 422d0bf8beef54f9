"""All findings about a recipe's data, before its model is loaded; also as JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backends.model_folder import ModelFolder
from finetune.check.balance import Balance, weigh
from finetune.check.duplicates import Duplicates, Pair, find_duplicates
from finetune.check.enough import Enough, judge
from finetune.check.lengths import Lengths, measure
from finetune.check.personal import Personal
from finetune.check.record_texts import everything, written
from finetune.check.tokens import Specials, TokenCheck, check_tokens, special_pattern
from finetune.data.problems import faults, listed
from finetune.data.rows import Example, Prepared, Problem
from finetune.data.tokenizer import Tokenizer
from finetune.errors import DataError
from finetune.events import Progress
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import trainable_numbers, with_classes
from finetune.training.job import beyond_context

SAMPLES = 3
_TOLD = ("rows", "good", "used", "notes", "left_out_fields", "lost_tokens", "lost_supervised_tokens")  # of a split


@dataclass(frozen=True)
class Findings:
    """What is known of the data; every list is whole, in the rows' order."""

    prepared: Prepared
    skipped: bool  # the recipe says that bad rows are left out
    broken: list[Problem]  # what stops training beside bad rows
    tokens: TokenCheck
    samples: list[Example]
    lengths: Lengths
    label_lengths: dict[str, float]  # label -> median tokens of its training rows
    duplicates: Duplicates
    balance: Balance
    enough: Enough
    personal: Personal
    specials: Specials
    beyond: str | None  # of rows longer than the model's own context, in words

    @property
    def bad(self) -> list[Problem]:
        """Rows that cannot be read, or that the template cannot write."""
        splits = self.prepared.splits
        return [problem for kind in ("bad", "refused") for split in splits for problem in getattr(split, kind)]

    @property
    def faults(self) -> int:
        """Rows and files that must be fixed before training."""
        return (0 if self.skipped else len(self.bad)) + len(self.broken) + self.tokens.total


def survey(
    recipe: Recipe, prepared: Prepared, folder: ModelFolder, tokenizer: Tokenizer
) -> Generator[Progress, None, Findings]:
    """Looks at the records and the examples. Raises DataError where no row can be trained on, RecipeError for groups
    that fit no row, BackendError where lora.targets fit no layer.
    """
    trainable = trainable_numbers(with_classes(recipe, prepared.labels), folder)
    balance = weigh(prepared.splits, prepared.labels, recipe.data.groups)
    if not prepared.train.examples:
        lost = [problem for split in prepared.splits for problem in (*split.left_out, *split.too_long)]
        remedy = "fix its rows, add some, or raise train.max_length"
        raise DataError(f"{recipe.data.train}: no row can be trained on; {remedy}", *listed(lost))
    personal, specials = yield from _words(prepared, tokenizer)
    tokens = yield from check_tokens(
        prepared, tokenizer, recipe.prompt.end_token and not recipe.head, folder.vocabulary
    )
    duplicates = yield from find_duplicates(prepared.splits, bool(prepared.labels))
    return Findings(
        prepared=prepared,
        skipped=recipe.data.on_error == "skip",
        broken=faults(prepared, recipe),
        tokens=tokens,
        samples=_samples(prepared.train.examples, personal.locations),
        lengths=measure(prepared, recipe),
        label_lengths=_label_lengths(prepared) if prepared.labels else {},
        duplicates=duplicates,
        balance=balance,
        enough=_enough(recipe, prepared, trainable, balance),
        personal=personal,
        specials=specials,
        beyond=beyond_context(folder, prepared),
    )


def _words(prepared: Prepared, tokenizer: Tokenizer) -> Generator[Progress, None, tuple[Personal, Specials]]:
    """What stands in the rows' words that people did not mean to train on."""
    assert prepared.renderer is not None
    personal, specials, pattern = Personal(), Specials(prepared.task == "text"), special_pattern(tokenizer)
    records = [record for split in prepared.splits for record in split.records]
    for number, record in enumerate(records, 1):
        personal.look(everything(record), record.location)
        specials.look(pattern, written(record, prepared.renderer), record.location)
        if number % 1000 == 0 or number == len(records):
            yield Progress(0, "data: looking for personal data", number, len(records))
    return personal, specials


def _samples(examples: Sequence[Example], hidden: Collection[str]) -> list[Example]:
    """The first that may be shown. hidden: locations of rows that must not be."""
    shown = (example for example in examples if example.location not in hidden)
    return [example for example, _ in zip(shown, range(SAMPLES), strict=False)]


def _label_lengths(prepared: Prepared) -> dict[str, float]:
    lengths: dict[str, list[int]] = defaultdict(list)
    for example in prepared.train.examples:
        lengths[example.answer or ""].append(len(example))
    return {label: statistics.median(sizes) for label, sizes in sorted(lengths.items())}


def _enough(recipe: Recipe, prepared: Prepared, trainable: int, balance: Balance) -> Enough:
    examples = prepared.train.examples
    plan = make_plan(recipe, len(examples))
    return judge(
        examples=len(examples),
        labels=balance.labels.get("train", {}),
        held_out=len(prepared.held_out.examples) or len(prepared.valid.examples),
        supervised_tokens=prepared.train.account["supervised_tokens"],
        trainable=trainable,
        epochs=plan.predicted / plan.steps_per_epoch,
    )


def as_json(findings: Findings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Plain values; lists of rows are whole."""
    prepared, lengths, specials = findings.prepared, asdict(findings.lengths), findings.specials
    return {
        "format": prepared.format,
        "task": prepared.task,
        "template": prepared.template,
        "bad_rows": _problems(findings.bad),
        "bad_rows_skipped": findings.skipped,
        "broken": _problems(findings.broken),
        "faults": findings.faults,
        "splits": {split.name: {key: split.account[key] for key in _TOLD} for split in prepared.splits},
        "tokens": findings.tokens.summary(),
        "samples": [
            {
                "place": sample.location,
                "prompt": sample.prompt,
                "tokens": [tokenizer.decode([token]) for token in sample.tokens.tolist()],
                "supervised": (sample.weights > 0).tolist(),
            }
            for sample in findings.samples
        ],
        "lengths": lengths | {"dropped": _problems(findings.lengths.dropped)},
        "label_lengths": findings.label_lengths,
        "duplicates": {
            "exact": [_pair(pair) for pair in findings.duplicates.exact],
            "near": [_pair(pair) for pair in findings.duplicates.near],
            "leaks": [{"split": a, "other_split": b} | _pair(pair) for a, b, pair in findings.duplicates.leaks],
        },
        "balance": asdict(findings.balance),
        "enough": asdict(findings.enough),
        "personal": {
            kind: {
                "count": finding.count,
                "rows": finding.rows,
                "shown": [{"place": location, "masked": value} for location, value in finding.shown],
            }
            for kind, finding in findings.personal.kinds.items()
        },
        "special_tokens": {"meant": specials.meant, "places": specials.locations, "tokens": specials.tokens},
    }


def _problems(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"place": location, "reason": reason} for location, reason in problems]


def _pair(pair: Pair) -> dict[str, Any]:
    return {"place": pair.location, "other": pair.other, "similarity": pair.similarity}

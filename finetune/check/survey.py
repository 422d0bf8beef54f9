"""Everything that can be said of a recipe's data without its model, in one walk over the rows; and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends.model_folder import ModelFolder, trainable_parameters
from finetune.check.balance import Balance, weigh
from finetune.check.duplicates import Duplicates, find_duplicates
from finetune.check.enough import Enough, judge
from finetune.check.lengths import Lengths, measure
from finetune.check.personal import Personal
from finetune.check.texts import everything, written
from finetune.check.tokens import Specials, TokenCheck, special_pattern
from finetune.check.walk import Walk
from finetune.data import split as parting
from finetune.data.prepare import Gathered, gather
from finetune.data.problems import Problem, listed, too_many
from finetune.data.read import read
from finetune.data.rows import Example
from finetune.data.tokenizer import Tokenizer
from finetune.errors import DataError
from finetune.events import Report
from finetune.recipe.schedule import make_plan
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import lora_spec

_REMEDY = "mend its rows, add some, or raise train.max_length"


@dataclass(frozen=True)
class Split:
    """One file, or what was set apart of it."""

    rows: int
    good: int  # of those, rows that are whole
    used: int  # of those, rows that fit train.max_length
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What is known of the data; every list is whole, in the rows' order."""

    format: str
    task: str
    template: str
    bad: list[Problem]
    skipped: bool  # the recipe says that bad rows are left out
    broken: list[Problem]  # beside bad rows: a file without a row, a row that is too long, too many rows left out
    splits: dict[str, Split]
    tokens: TokenCheck
    samples: list[Example]
    lengths: Lengths
    label_lengths: dict[str, float]  # label -> median tokens of its training rows
    duplicates: Duplicates
    balance: Balance
    enough: Enough
    personal: Personal
    specials: Specials

    @property
    def faults(self) -> int:
        """Rows and files that must be mended before training."""
        return (0 if self.skipped else len(self.bad)) + len(self.broken) + self.tokens.total


def survey(recipe: Recipe, folder: ModelFolder, tokenizer: Tokenizer, base: Path, progress: Report) -> Findings:
    """Raises DataError where the training file as a whole cannot be understood, RecipeError for settings that do
    not fit the rows, BackendError where lora.targets fit no layer.
    """
    progress("reading", 0, 1)
    trainable = trainable_parameters(folder.lora_modules(lora_spec(recipe)), recipe.lora.rank)
    broken: list[Problem] = []
    found = _gather(_lenient(recipe, base, broken), tokenizer, base, broken)
    balance = weigh(found.sources, found.labels, recipe.data.groups)
    progress("reading", 1, 1)
    personal, specials = _words(found, tokenizer, progress)
    walk = Walk(recipe, tokenizer, found, personal.places, folder.vocabulary)
    for source in found.sources:
        walk.through(source, progress)
    bad = [problem for source in found.sources for problem in source.bad] + walk.bad
    broken += walk.refused
    broken += [(f"data.{one.name}", f"no row is left; {_REMEDY}") for one in found.sources if not walk.used[one.name]]
    left = [one for one in found.sources if walk.used[one.name]]
    broken += [p for one in left if (p := too_many(one.name, one.rows, walk.left_out[one.name], recipe))]
    if not walk.after:
        raise DataError(f"{recipe.data.train}: no row can be trained on; {_REMEDY}\n{listed([*bad, *walk.dropped])}")
    lengths = measure(walk.before, walk.after, recipe, walk.shortened, walk.cut, walk.dropped)
    duplicates = find_duplicates(found.sources, bool(found.labels), progress)
    return Findings(
        found.layout.name,
        found.task,
        found.renderer.name,
        bad,
        recipe.data.on_error == "skip",
        broken,
        {one.name: Split(one.rows, len(one.records), walk.used[one.name], one.notes) for one in found.sources},
        walk.checker.found,
        walk.samples,
        lengths,
        {label: statistics.median(sizes) for label, sizes in sorted(walk.by_label.items())},
        duplicates,
        balance,
        _enough(recipe, trainable, walk, balance),
        personal,
        specials,
    )


def _gather(recipe: Recipe, tokenizer: Tokenizer, base: Path, broken: list[Problem]) -> Gathered:
    """All rows; as training rows alone where none can be set apart for validation."""
    try:
        return gather(recipe, tokenizer, base)
    except parting.TooFewRows as error:
        broken.append(_problem(error))
        return gather(recipe, tokenizer, base, set_apart=False)


def _lenient(recipe: Recipe, base: Path, broken: list[Problem]) -> Recipe:
    """The recipe with bad rows left out, and with the held-out files that can be read at all."""
    data = recipe.data.model_copy(update={"on_error": "skip"})
    for name in ("valid", "test"):
        try:
            if source := getattr(data, name):
                read(source, base)
        except DataError as error:
            broken.append(_problem(error))
            data = data.model_copy(update={name: None})
    return recipe.model_copy(update={"data": data})


def _problem(error: DataError) -> Problem:
    place, _, reason = str(error).partition(": ")
    return place, reason


def _words(rows: Gathered, tokenizer: Tokenizer, progress: Report) -> tuple[Personal, Specials]:
    """What stands in the rows' words that people did not mean to train on."""
    personal, specials, pattern = Personal(), Specials(rows.task == "text"), special_pattern(tokenizer)
    records = [record for source in rows.sources for record in source.records]
    for number, record in enumerate(records, 1):
        personal.look(everything(record), record.place)
        specials.look(pattern, written(record, rows.renderer), record.place)
        if number % 1000 == 0 or number == len(records):
            progress("looking for personal data", number, len(records))
    return personal, specials


def _enough(recipe: Recipe, trainable: int, walk: Walk, balance: Balance) -> Enough:
    plan = make_plan(recipe, len(walk.after))
    held_out = walk.used["test"] or walk.used["valid"]
    labels = balance.labels.get("train", {})
    return judge(len(walk.after), labels, held_out, walk.supervised, trainable, plan.steps / plan.steps_per_epoch)


def as_json(found: Findings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Plain values; lists of rows are whole."""
    lengths = asdict(found.lengths)
    return {
        "format": found.format,
        "task": found.task,
        "template": found.template,
        "bad_rows": _problems(found.bad),
        "bad_rows_skipped": found.skipped,
        "broken": _problems(found.broken),
        "faults": found.faults,
        "splits": {name: asdict(split) for name, split in found.splits.items()},
        "tokens": found.tokens.summary(),
        "samples": [
            {
                "place": one.place,
                "prompt": one.prompt,
                "tokens": [tokenizer.decode([token]) for token in one.tokens.tolist()],
                "supervised": (one.weights > 0).tolist(),
            }
            for one in found.samples
        ],
        "lengths": lengths | {"dropped": _problems(found.lengths.dropped)},
        "label_lengths": found.label_lengths,
        "duplicates": {
            "exact": [asdict(pair) for pair in found.duplicates.exact],
            "near": [asdict(pair) for pair in found.duplicates.near],
            "leaks": [{"split": a, "other_split": b} | asdict(pair) for a, b, pair in found.duplicates.leaks],
        },
        "balance": asdict(found.balance),
        "enough": asdict(found.enough),
        "personal": {
            kind: {"count": one.count, "rows": one.rows, "shown": _shown(one.shown)}
            for kind, one in found.personal.kinds.items()
        },
        "special_tokens": asdict(found.specials),
    }


def _problems(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"place": place, "reason": reason} for place, reason in problems]


def _shown(findings: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"place": place, "masked": value} for place, value in findings]

"""Error kinds: which held-out rows each model gets wrong, and how, with intervals.

What a run keeps of the analysis, and where:

- `kinds.json` in the run's folder: `Analysis.to_json()`; every `rows` there is a list of row numbers, from 0, which are
  the line numbers of `rows.jsonl` (so the place, the prompt and both answers stand there). Runs of before have none.
- `report.json` has the same under the key `analysis`, without the `rows`.
- `Analysis` is read back by `finetune.disk.run_files.read_json(file, Analysis, remedy, "ignore")`.

    {"language": "en",                      of the spelling list; null: none fits, and `misspelling` is not among kinds
     "kinds": [{"name": "repetition",       long, repetition, misspelling, inconsistency, hallucination, wrong, empty,
                                            unstopped, format; and "confusion" for each pair of labels, with
                "labels": null,             [true, predicted] here
                "measured": 200,            rows that were looked at: of a confusion those of the true label, of
                                            inconsistency those that were asked again
                "base": {"count": 9, "share": 0.045, "interval": [0.024, 0.083], "rows": [4, 17]},   null: not measured
                "tuned": {...},
                "p_value": 0.012}],         McNemar's exact test of base against tuned, Holm's over all kinds;
                                            null without a base
     "slices": [{"by": "group",             or "length" (of the prompt, in tokens)
                 "name": "women",           or "8 to 15"
                 "measure": "accuracy",     or "loss" where answers are neither right nor wrong
                 "rows": 100,
                 "base": {"value": 0.7, "interval": [0.6, 0.78]},   null: not measured
                 "tuned": {...},
                 "p_base": null,            of a difference from all other rows, Holm's over the slices of one `by`
                 "p_tuned": 0.003}],
     "swaps": null or `groups.Swaps`: rows, flips before and after, intervals, p_value,
     "forgetting": null or `forgetting.Forgetting`}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune.data.rows import Example
from finetune.evaluation.answer_form import is_empty, is_long, lacks_format, repeats
from finetune.evaluation.consistency import inconsistent
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.forgetting import Forgetting
from finetune.evaluation.groups import Slice, Swaps
from finetune.evaluation.hallucination import Known, invented
from finetune.evaluation.intervals import holm, mcnemar_exact
from finetune.evaluation.row_shares import Found
from finetune.evaluation.spelling import Speller

Asked = Mapping[int, Sequence[str]]  # a row's number -> what was answered when it was asked again


@dataclass(frozen=True)
class Kind:
    """One kind of error, before and after."""

    name: str
    measured: int  # rows that were looked at
    base: Found | None  # None where the base model was not measured
    tuned: Found
    labels: tuple[str, str] | None = None  # (true, predicted) of a confusion
    p_value: float | None = None  # McNemar's exact test of base against tuned, Holm's over all kinds

    @property
    def occurs(self) -> bool:
        """Whether any row is of this kind, before or after."""
        return bool(self.tuned.count or (self.base and self.base.count))


@dataclass(frozen=True)
class Analysis:
    """All that a run says of its errors beside their number."""

    kinds: tuple[Kind, ...] = ()
    slices: tuple[Slice, ...] = ()
    language: str | None = None  # of the spelling list; None: none fits
    swaps: Swaps | None = None
    forgetting: Forgetting | None = None

    def to_json(self, rows: bool = True) -> dict[str, Any]:
        """rows: whether the numbers of the single rows are in it."""
        values = asdict(self)
        if not rows:
            swaps = values["swaps"] or {}
            both = [*values["kinds"], swaps]
            for found in [one for each in both for one in (each.get("base"), each.get("tuned")) if one]:
                del found["rows"]
        return values


@dataclass(frozen=True)
class Data:
    """What is known of the data, to look for misspelt words and inventions by."""

    known: Known
    speller: Speller | None
    trained: bool = True  # whether `known` is of the training rows; else inventions are not looked for

    def of_row(self, example: Example) -> Known:
        return Known.of((example.prompt, example.answer or ""))


def kinds_of_answers(
    base: Evaluation | None,
    tuned: Evaluation,
    examples: Sequence[Example],
    data: Data | None,
    again: tuple[Asked, Asked] = ({}, {}),
) -> list[Kind]:
    """Of open answers. again: what each model answered when it was asked again."""
    looked_at = [data.of_row(example) for example in examples] if data else []
    before = None if base is None else _rows_by_kind(base, examples, data, looked_at, again[0])
    after = _rows_by_kind(tuned, examples, data, looked_at, again[1])
    kinds = []
    for name, rows in after.items():
        measured = len(again[1]) if name == "inconsistency" else len(examples)
        first = None if before is None or name not in before else Found.of(before[name], measured)
        kinds.append(Kind(name, measured, first, Found.of(rows, measured)))
    return _with_p_values(kinds)


def _rows_by_kind(
    evaluation: Evaluation, examples: Sequence[Example], data: Data | None, rows_own: Sequence[Known], again: Asked
) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    answers = [row.predicted or "" for row in evaluation.results]
    said = [(i, answer, examples[i].answer or "") for i, answer in enumerate(answers) if not is_empty(answer)]
    rows["wrong"] = [i for i, _, _ in said if evaluation.results[i].correct is False]
    rows["empty"] = [i for i, answer in enumerate(answers) if is_empty(answer)]
    if any(row.ended is not None for row in evaluation.results):
        rows["unstopped"] = [i for i, row in enumerate(evaluation.results) if row.ended is False]
    rows["long"] = [i for i, answer, expected in said if is_long(answer, expected)]
    rows["repetition"] = [i for i, answer, expected in said if repeats(answer, expected)]
    if any(lacks_format("", example.answer or "") for example in examples):
        rows["format"] = [i for i, answer in enumerate(answers) if lacks_format(answer, examples[i].answer or "")]
    if data:
        if data.speller:
            spelt = data.speller.misspelt
            rows["misspelling"] = [i for i, answer, _ in said if spelt(answer, data.known.words, rows_own[i].words)]
        if data.trained:
            rows["hallucination"] = [
                i for i, answer, expected in said if invented(answer, expected, data.known, rows_own[i], data.speller)
            ]
    if again:
        rows["inconsistency"] = [i for i, others in again.items() if inconsistent((answers[i], *others))]
    return rows


def confusions(base: Evaluation | None, tuned: Evaluation, most: int = 20) -> list[Kind]:
    """The pairs of labels that are mistaken for each other, the most frequent of both models first."""
    before, after = ({} if one is None else _pairs(one) for one in (base, tuned))
    frequent = sorted({*before, *after}, key=lambda pair: -len(before.get(pair, ())) - len(after.get(pair, ())))
    kinds = []
    for true, predicted in frequent[:most]:
        measured = sum(row.expected == true for row in tuned.results)
        first = None if base is None else Found.of(before.get((true, predicted), []), measured)
        second = Found.of(after.get((true, predicted), []), measured)
        kinds.append(Kind("confusion", measured, first, second, (true, predicted)))
    return _with_p_values(kinds)


def _pairs(evaluation: Evaluation) -> dict[tuple[str, str], list[int]]:
    """(true, predicted) -> the rows that are mistaken so."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(evaluation.results):
        if row.correct is False:
            pairs.setdefault((str(row.expected), str(row.predicted)), []).append(i)
    return pairs


def _with_p_values(kinds: Sequence[Kind]) -> list[Kind]:
    """McNemar's, with Holm's correction over all kinds."""
    values = [mcnemar_exact(*_changed(kind.base.rows, kind.tuned.rows)) for kind in kinds if kind.base]
    if len(values) < len(kinds):
        return list(kinds)
    return [replace(kind, p_value=p_value) for kind, p_value in zip(kinds, holm(values), strict=True)]


def _changed(before: Collection[int], after: Collection[int]) -> tuple[int, int]:
    """(gone, come)"""
    return len({*before} - {*after}), len({*after} - {*before})

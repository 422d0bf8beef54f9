"""Removes all data text from a finished run: labels become numbers; answers, prompts and file names go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.evaluation.baselines import Words
from finetune.evaluation.error_kinds import Analysis
from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.recipe.schema import Recipe
from finetune.report.finished_run import Checked, FinishedRun, ReportFigures
from finetune.report.report import compare

LEFT_OUT = "(left out)"
# Values of these sections that are the tool's own words; all other texts in them may come from the data.
_OWN_WORDS = {"format", "on_error", "long_rows", "encoding", "loss_on"}


class Numbered:
    """Texts to `label 1`, `label 2`, ...: the same text is the same number, in every run that it is asked for."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._names = {label: f"label {i + 1}" for i, label in enumerate(dict.fromkeys(labels))}
        self._answers: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        return self._names.get(text) or self._answers.setdefault(text, f"answer {len(self._answers) + 1}")


def numbered_for(runs: Sequence[FinishedRun]) -> Numbered:
    """One for all these runs."""
    return Numbered([label for run in runs for label in run.tuned.labels])


def without_rows(run: FinishedRun, numbered: Numbered | None = None) -> FinishedRun:
    """numbered: one for several runs that are compared."""
    numbered = numbered or numbered_for([run])
    base, tuned = run.base and _evaluation(run.base, numbered), _evaluation(run.tuned, numbered)
    return replace(
        run,
        path=Path(run.name),
        recipe=_recipe(run.recipe),
        figures=_without_text(run.figures, base, tuned),
        base=base,
        tuned=tuned,
        checked=run.checked and _checked(run.checked),
        analysis=run.analysis and _analysis(run.analysis, numbered),
        suite=run.suite and replace(run.suite, file="", results=[]),
        exports=[replace(one, path="", notes=[]) for one in run.exports],
        identity={key: value for key, value in run.identity.items() if key in ("kind", "rows", "base_model")},
    )


def _evaluation(whole: Evaluation, numbered: Numbered) -> Evaluation:
    rows = tuple(_row(i, row, numbered) for i, row in enumerate(whole.results))
    return replace(whole, labels=tuple(map(numbered, whole.labels)), results=rows)


def _row(number: int, row: RowResult, numbered: Numbered) -> RowResult:
    def named(text: str | None) -> str | None:
        return None if text is None else "" if not text.strip() else numbered(text)

    compared = row.compared and (named(row.compared[0]), named(row.compared[1]))
    return replace(
        row,
        location=f"row {number + 1}",
        prompt="",
        expected=named(row.expected),
        predicted=named(row.predicted),
        compared=compared,
    )


def _without_text(figures: ReportFigures, base: Evaluation | None, tuned: Evaluation) -> ReportFigures:
    """The verdict is drawn anew from figures and numbered labels, so that no text has a way into it."""
    comparison = figures.comparison
    if comparison is not None and base is not None:
        share = comparison.bag_of_words
        words = None if share is None else Words(share, tuned.rows, 0.0, "")
        comparison = replace(comparison, verdict=compare(base, tuned, words).verdict)
    facts = figures.facts
    if facts is not None:
        facts = replace(facts, model=Path(facts.model).name, data=dict.fromkeys(facts.rows, LEFT_OUT))
    loads = [replace(one, reason="") for one in figures.loads]
    return replace(figures, comparison=comparison, facts=facts, check="", loads=loads, suite=None)


def _recipe(recipe: Recipe) -> Recipe:
    sections = {
        name: section.model_copy(update={key: _value(key, value) for key, value in section})
        for name, section in (("data", recipe.data), ("prompt", recipe.prompt))
    }
    model = recipe.model.model_copy(update={"path": Path(recipe.model.path).name})
    swaps = recipe.evaluate.swaps
    named = {
        "swaps": swaps if isinstance(swaps, str) else [[LEFT_OUT] * 2],
        "suite": recipe.evaluate.suite and LEFT_OUT,
    }
    evaluate = recipe.evaluate.model_copy(update=named)
    lora = recipe.lora.model_copy(update={"start_from": recipe.lora.start_from and LEFT_OUT})
    return recipe.model_copy(
        update={**sections, "model": model, "lora": lora, "evaluate": evaluate, "output": LEFT_OUT}
    )


def _value(key: str, value: Any) -> Any:
    """Numbers, what is not set, and the tool's own words."""
    own_word = key in _OWN_WORDS or value in ("auto", "chat", "plain", "alpaca")
    if own_word or not value or isinstance(value, int | float):
        return value
    return [LEFT_OUT] if isinstance(value, list) else {LEFT_OUT: LEFT_OUT} if key == "columns" else LEFT_OUT


def _checked(checked: Checked) -> Checked:
    return replace(checked, enough=replace(checked.enough, reasons=[]), balance=replace(checked.balance, labels={}))


def _analysis(analysis: Analysis, numbered: Numbered) -> Analysis:
    """Kinds are the tool's own words, and so are slices by length; groups are the data's."""
    kinds = tuple(
        replace(kind, labels=kind.labels and (numbered(kind.labels[0]), numbered(kind.labels[1])))
        for kind in analysis.kinds
    )
    groups: dict[str, str] = {}
    slices = tuple(
        one if one.by == "length" else replace(one, name=groups.setdefault(one.name, f"{len(groups) + 1}"))
        for one in analysis.slices
    )
    swaps = analysis.swaps
    if swaps is not None:
        before = f"{swaps.base.share:.1%} before, " if swaps.base else ""
        shares = f"{before}{swaps.tuned.share:.1%} after"
        message = f"Words that should change no answer did so in {shares}, of {swaps.rows} rows."
        swaps = replace(swaps, message=message)
    return replace(analysis, kinds=kinds, slices=slices, swaps=swaps)

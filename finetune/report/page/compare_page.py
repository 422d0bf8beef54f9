"""Sections of the comparison page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation.iterations import Advice, KindLine
from finetune.report.iterations import Compared
from finetune.report.page.render import render
from finetune.report.page.run_page import MOST_ROWS, SHORT, row, sentence
from finetune.report.page.words import cut
from finetune.report.prompts import distinct

MOST_KINDS = 25
MOST_EXAMPLES = 5  # rows of each kind for which data are to be added
MOST_CHANGES = 40
STYLES = {"Better": "good", "Fixed": "good", "Worse": "bad"}


def compare_page(compared: Compared, rows: bool = True) -> str:
    """The whole page. rows: whether texts of the data are shown."""
    return render("compare.html", view(compared, rows))


def view(compared: Compared, rows: bool) -> dict[str, Any]:
    iterations = compared.iterations
    word, _, rest = compared.sentence.partition(": ")
    shares = iterations.measure != "loss"
    return {
        "compared": compared,
        "names": compared.names,
        "iterations": iterations,
        "rows_shown": rows,
        "verdict": {"word": word, "style": STYLES.get(word, "fair"), "sentence": sentence(rest)},
        "shares": shares,
        "by_loss": any(step.loss_change is not None for step in iterations.steps),
        "styles": STYLES,
        "kinds": [_kind(i, line) for i, line in enumerate(iterations.kinds[:MOST_KINDS])],
        "more_kinds": max(len(iterations.kinds) - MOST_KINDS, 0),
        "changes": [
            (step, [(one.what, cut(one.before), cut(one.after)) for one in changes[:MOST_CHANGES]])
            for step, changes in zip(iterations.steps, compared.changes, strict=True)
            if step.after == step.before + 1
        ],
        "advice": [_advice(compared, one) for one in iterations.advice],
        "changed": _changed(compared) if shares else None,
    }


def _kind(number: int, line: KindLine) -> dict[str, Any]:
    most = max(*line.counts, 1)
    cells = [(count, ends, count / most) for count, ends in zip(line.counts, line.intervals, strict=True)]
    return {"number": number, "line": line, "cells": cells, "last": line.shifts[-1]}


def _advice(compared: Compared, advice: Advice) -> dict[str, Any]:
    results = compared.runs[-1].tuned.results
    prompts = distinct([result.prompt for result in results])
    examples = [
        {
            "number": number + 1,
            "location": Path(results[number].location).name,
            "prompt": cut(prompts[number]),
            "expected": cut(results[number].expected or ""),
            "predicted": cut(results[number].predicted or ""),
            "short": max(len(results[number].expected or ""), len(results[number].predicted or "")) <= SHORT,
            "always": number in advice.rows[: advice.always],
        }
        for number in advice.rows[:MOST_EXAMPLES]
    ]
    return {"advice": advice, "examples": examples}


def _changed(compared: Compared) -> list[dict[str, Any]]:
    """Of each run against the one before: rows that it fixed and broke, with the words that changed."""
    sections = []
    for step in compared.iterations.steps:
        if step.after == step.before + 1:
            before, after = (compared.runs[i].tuned.results for i in (step.before, step.after))
            lists = [_rows(before, after, rows) for rows in (step.errors.fixed, step.errors.new)]
            sections.append({"step": step, "fixed": lists[0], "broken": lists[1]})
    return sections


def _rows(before: Sequence[Any], after: Sequence[Any], numbers: Sequence[int]) -> list[dict[str, Any]]:
    prompts = distinct([result.prompt for result in after])
    return [row(number, before[number], after[number], prompts[number]) for number in numbers[: MOST_ROWS // 2]]

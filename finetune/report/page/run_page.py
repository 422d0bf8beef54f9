"""Sections of a run's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.evaluation.evaluate import Evaluation, RowResult
from finetune.evaluation.intervals import worst_confusions
from finetune.report.eta import PHASES, TRAINING
from finetune.report.finished_run import FinishedRun
from finetune.report.measures import measures_of, value_of
from finetune.report.page.chart import loss_chart
from finetune.report.page.render import marked, render
from finetune.report.page.suite_section import suite_section
from finetune.report.page.words import changed_words, cut
from finetune.report.prompts import distinct
from finetune.report.run_differences import beyond_defaults, flat, in_words
from finetune.report.tables import MOST_LABELS, which_confusions
from finetune.text import amount, duration, shorten

MOST_ROWS = 20  # fixed rows that are shown, and as many broken ones
MOST_WRONG = 10  # rows that are wrong before and after
WORST = 15  # confusions, of a matrix with more than MOST_LABELS
MOST_CLASSES = 40
SHORT = 30  # characters of answers that stand beside each other
WIDE, NARROW = (1000, 340, 160), (360, 280, 60)  # of a chart: width, height, bands

_VERDICTS = {
    "Better": "good", "Fixed": "good", "Worse": "bad", "Mixed": "fair", "Not good yet": "fair",
}  # fmt: skip


def run_page(run: FinishedRun, rows: bool = True) -> str:
    """The whole page. rows: whether texts of the data are shown (`without_rows` has taken them out where not)."""
    return render("run.html", view(run, rows))


def view(run: FinishedRun, rows: bool = True) -> dict[str, Any]:
    """What the template shows, by section."""
    measure = run.tuned.measure
    return {
        "run": run,
        "figures": run.figures,
        "rows_shown": rows,
        "model": model_name(run),
        "data": Path(run.recipe.data.train).name if rows else "",
        "verdict": verdict(run),
        "measure": measure,
        "bars": bars(run, measure),
        "table": table(run),
        "charts": [loss_chart(run.steps, run.validations, *size) for size in (WIDE, NARROW)],
        "validations": run.validations,
        "labels": labels(run.tuned, run.base),
        "changed": changed(run) if run.base else None,
        "analysis": run.analysis,
        "absent": [kind.name for kind in run.analysis.kinds if not kind.occurs] if run.analysis else [],
        "suite": suite_section(run.suite) if run.suite else None,
        "checked": checked(run),
        "cost": cost(run),
        "recipe": recipe(run),
    }


def verdict(run: FinishedRun) -> dict[str, Any]:
    """The first word, how to colour it, and the sentences after it."""
    judged = run.tuned.accuracy is not None
    if run.figures.comparison is None:
        only = ["The base model was not measured."]
        return {"word": "Measured", "style": "fair", "sentences": only, "by": "accuracy" if judged else "loss"}
    word, _, rest = run.figures.comparison.verdict.partition(": ")
    by = "accuracy" if judged and not rest.startswith("loss") else "loss"
    return {"word": word, "style": _VERDICTS.get(word, "fair"), "sentences": [sentence(rest)], "by": by}


def sentence(text: str) -> str:
    """Begun with a capital; a p-value stays on one line."""
    return f"{text[:1].upper()}{text[1:]}".replace("p < ", "p\u00a0<\u00a0").replace("p = ", "p\u00a0=\u00a0")


def model_name(run: FinishedRun) -> str:
    """A folder by its last part, a hub id whole."""
    path = run.recipe.model.path
    return Path(path).name if Path(path).is_absolute() else path


def bars(run: FinishedRun, measure: str) -> list[dict[str, Any]]:
    """Shares with their intervals, base and tuned, on a scale from 0 to 1."""
    sections = []
    for key, bounds, name in (("accuracy", "interval", measure), ("macro_f1", "macro_f1_interval", "macro F1")):
        lines = [
            {"model": model, "value": getattr(one, key), "interval": getattr(one, bounds), "of": f"{model}.{key}",
             "bounds_of": f"{model}.{bounds}"}
            for model, one in (("base", run.base), ("tuned", run.tuned))
            if one is not None and getattr(one, key) is not None
        ]  # fmt: skip
        if lines:
            sections.append({"name": name, "lines": lines})
    return sections


def table(run: FinishedRun) -> list[dict[str, Any]]:
    """Every measure, before and after."""
    bounds = {"accuracy": "interval", "macro_f1": "macro_f1_interval"}
    base, tuned = (one.summary() if one else {} for one in (run.base, run.tuned))
    return [
        {
            "key": key,
            "name": name,
            "base": before,
            "tuned": after,
            "share": "accuracy" in key,
            "intervals": [value_of(one, bounds.get(key, "")) for one in (base, tuned)],
            "bounds": bounds.get(key),
            "better": None if before in (None, after) else (after > before) == more,
        }
        for key, name, more in measures_of(tuned)
        for before, after in [(value_of(base, key), value_of(tuned, key))]
        if after is not None
    ]


def labels(tuned: Evaluation, base: Evaluation | None) -> dict[str, Any] | None:
    """The confusions and the figures of single labels; None where there are no labels."""
    if not tuned.confusion:
        return None
    names = [shorten(label, 60) for label in tuned.labels]
    whole = len(names) <= MOST_LABELS
    pairs = worst_confusions(tuned.confusion, len(names) ** 2)
    before = {one["label"]: one["f1"] for one in base.classes} if base else {}
    return {
        "names": names,
        "matrix": tuned.confusion if whole else None,
        "totals": [max(sum(row), 1) for row in tuned.confusion],
        "worst": pairs[:WORST],
        "which": which_confusions(min(WORST, len(pairs)), len(pairs)),
        "classes": [(i, names[i], one, before.get(one["label"])) for i, one in enumerate(tuned.classes[:MOST_CLASSES])],
        "more": max(len(names) - MOST_CLASSES, 0),
    }


def changed(run: FinishedRun) -> dict[str, Any]:
    """Rows that were fixed, broken, and wrong both times, with the words of the answers that changed."""
    assert run.base is not None
    pairs = list(zip(run.base.results, run.tuned.results, strict=True))
    fixed = [i for i, (base, tuned) in enumerate(pairs) if base.correct is False and tuned.correct]
    broken = [i for i, (base, tuned) in enumerate(pairs) if base.correct and tuned.correct is False]
    wrong = [i for i, (base, tuned) in enumerate(pairs) if base.correct is False and tuned.correct is False]
    prompts = distinct([tuned.prompt for _, tuned in pairs])
    return {
        "fixed": [row(i, *pairs[i], prompts[i]) for i in fixed[:MOST_ROWS]],
        "broken": [row(i, *pairs[i], prompts[i]) for i in broken[:MOST_ROWS]],
        "wrong": [row(i, *pairs[i], prompts[i]) for i in wrong[:MOST_WRONG]],
        "shown": bool(fixed or broken or wrong),
        "counts": (len(fixed), len(broken)),
        "still": len(wrong),
        "judged": run.tuned.accuracy is not None,
    }


def row(number: int, base: RowResult, tuned: RowResult, prompt: str) -> dict[str, Any]:
    before, after = changed_words(cut(base.predicted or ""), cut(tuned.predicted or ""))
    return {
        "number": number + 1,
        "location": Path(tuned.location).name,  # its folder is nobody's matter
        "prompt": cut(prompt),
        "expected": cut(tuned.expected or ""),
        "base": marked(before, "del"),
        "tuned": marked(after, "ins"),
        "short": max(map(len, (tuned.expected or "", base.predicted or "", tuned.predicted or ""))) <= SHORT,
    }


def checked(run: FinishedRun) -> dict[str, Any] | None:
    """What was found in the data, as counts. None where the run has not recorded it."""
    found = run.checked
    if found is None:
        return None
    problems = {
        "repeated rows": len(found.duplicates.exact) + len(found.duplicates.near),
        "rows leaked from one split to another": len(found.duplicates.leaks),
        "rows with personal data": sum(kind.rows for kind in found.personal.values()),
        "bad rows": len(found.bad_rows),
        "faults in the tokens": found.faults,
    }
    return {
        "splits": found.splits,
        "problems": problems,
        "level": found.enough.level,
        "reasons": found.enough.reasons,
        "labels": balance(found.balance.labels),
    }


def balance(labels_of: Mapping[str, Mapping[str, int]]) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """(split, [(label, rows, share of the largest)]) of each split, the most frequent labels first."""
    sections = []
    for split, counts in labels_of.items():
        if not counts:
            continue
        most = max(counts.values(), default=1)
        frequent = sorted(counts.items(), key=lambda count: -count[1])[:MOST_LABELS]
        sections.append((split, [(shorten(label, 60), count, count / max(most, 1)) for label, count in frequent]))
    return sections


def cost(run: FinishedRun) -> list[dict[str, Any]]:
    """What the run took, beside what was predicted where the run has recorded that."""
    facts, time = run.figures.facts, run.figures.time
    lines: list[dict[str, Any]] = []
    if facts is not None and facts.steps:
        lines = [
            _cost(
                "training", "facts.seconds", facts.seconds, duration, time.predicted.get("training") if time else None
            ),
            _cost("memory at most", "facts.peak_bytes", facts.peak_bytes, amount, facts.predicted_bytes),
            _cost("speed", "facts.tokens_per_second", facts.tokens_per_second, lambda rate: f"{rate:,.0f} tokens/s"),
            _cost("steps", "facts.steps", facts.steps, lambda steps: f"{steps:,}"),
        ]
    if time is not None:
        parts = [part for part in (*PHASES, *time.measured) if part in time.measured]
        parts = [part for part in dict.fromkeys(parts) if part != TRAINING or not lines]
        of = "time.measured."
        lines += [_cost(part, of + part, time.measured[part], duration, time.predicted.get(part)) for part in parts]
    return lines


def _cost(
    name: str, of: str, value: float, shown: Callable[[float], str], predicted: float | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "of": of,
        "value": value,
        "shown": shown(value),
        "predicted": None if predicted is None else shown(predicted),
        "ratio": value / predicted if predicted else None,
    }


def recipe(run: FinishedRun) -> dict[str, Any]:
    return {
        "beyond": [
            (key, in_words(default), cut(in_words(value))) for key, default, value in beyond_defaults(run.recipe)
        ],
        "all": [(key, cut(in_words(value))) for key, value in flat(run.recipe).items()],
    }

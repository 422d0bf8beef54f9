"""The suite section of a run's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.report.finished_suite import SuiteFigures
from finetune.report.page.words import cut

MOST_CASES = 20  # that are shown, of those that the tuned model fails


def suite_section(figures: SuiteFigures) -> dict[str, Any]:
    """How many cases each model passes, and those that the tuned model fails."""
    failed = [case for case in figures.results if case.tuned.failures]
    models = [("base", figures.base), ("tuned", figures.tuned)]
    return {
        "figures": figures,
        "lines": [(model, found, found.passed / max(figures.cases, 1)) for model, found in models if found],
        "failed": [
            {
                "title": f"{Path(case.location).name}{f' ({case.name})' if case.name else ''}",
                "why": [cut(why) for why in case.tuned.failures],
                "answer": cut(case.tuned.answer),
                "base": "" if case.base is None else "it fails too" if case.base.failures else "it passes",
            }
            for case in failed[:MOST_CASES]
        ],
        "fails": figures.cases - figures.tuned.passed,
    }

"""Verification of an export against the run's model: checks, limits, and their messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.table import Table

from finetune.data.rows import Message
from finetune.data.tokenizer import Tokenizer, encode, encode_prompt, special_texts
from finetune.evaluation.paired_changes import SIGNIFICANT
from finetune.export.measure import Exported, Measured, share_kept
from finetune.export.prompt import PROBES, Prompts
from finetune.report.report import compare
from finetune.text import from_here, shorten

Verdict = Literal["yes", "warning", "no"]
KEPT = "tuning that is kept"
KEPT_WELL, KEPT_AT_ALL = 0.9, 0.5  # below the first a warning, below the second a failure
_SHOWN = 3  # rows or probes that are named


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    name: str
    on: str  # how many, of what
    result: str
    holds: Verdict
    where: str = ""  # the worst, or the first that differ


class Limits(NamedTuple):
    """How far an export may be from the run's model. Natural logarithms, per supervised token."""

    worst: float  # error of a log-probability
    mean: float
    greedy: tuple[float, float]  # least shares of tokens whose most probable one is the same: without a word, at all
    answers: float  # greatest share of the answers that differ, rounded up: long ones fork where two tokens are near
    ended: float  # least share of the answers that end, of those that ended


_LIMITS = {
    "f32": Limits(1e-3, 1e-4, (0.99, 0.99), 0.0, 1.0),
    "f16": Limits(math.inf, 0.01, (0.98, 0.98), 0.1, 0.9),
    "bf16": Limits(math.inf, 0.05, (0.98, 0.98), 0.1, 0.9),
}
# Their errors are large where training matters little: what is kept of the tuning decides.
_QUANTISED = Limits(math.inf, math.inf, (0.9, 0.8), 1.0, 0.5)


def text_checks(export: Exported, tokenizer: Tokenizer, prompts: Prompts) -> list[Check]:
    """Tokens of every held-out row and of the special tokens, prompts of every held-out row, and conversations that are
    in no row: where those differ, the export is right for the rows all the same.
    """
    rendered = prompts.renderer.render_all(prompts.prepared.held_out.records)
    texts = [(one.record.location, one.text) for row in rendered if not isinstance(row, ValueError) for one in row]
    texts += [(text, text) for text in sorted(special_texts(tokenizer))]
    ours = encode(tokenizer, [text for _, text in texts])
    other = [where for (where, text), own in zip(texts, ours, strict=True) if list(export.tokenise(text)) != own.tokens]

    def wrong(messages: Sequence[Message], tools: Sequence[Any], text: str) -> bool:
        try:
            return list(export.prompt(messages, tools)) != encode_prompt(tokenizer, text)
        except ValueError:  # its template refuses them
            return True

    asked = list(prompts.rows())
    rows = [where for where, messages, tools, text in asked if wrong(messages, tools, text)]
    different = []
    for probe in PROBES:
        with suppress(ValueError):  # the run's template refuses it: there is nothing to compare
            if wrong(probe, (), prompts.asked(probe)):
                turns = (f"{message['role']}: {shorten(message['content'], 24)}" for message in probe)
                different.append(" / ".join(turns))
    return [
        _equal("tokens", f"{len(texts):,} texts", other),
        _equal("prompts", f"{len(asked):,} rows", rows),
        _equal("other prompts", f"{len(PROBES)} probes", different, "warning"),
    ]


def _equal(name: str, on: str, wrong: Sequence[str], otherwise: Verdict = "no") -> Check:
    more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    result = f"{len(wrong)} differ" if wrong else "equal"
    return Check(name, on, result, otherwise if wrong else "yes", ", ".join(wrong[:_SHOWN]) + more)


def model_checks(base: Measured, tuned: Measured, export: Measured, kind: str) -> Iterator[Check]:
    """What the two models make of the same rows. kind: of the numbers in the file, or of those that the model computes
    with where these are coarser.
    """
    bounds, ours, theirs = _LIMITS.get(kind, _QUANTISED), tuned.evaluation, export.evaluation
    rows = f"{ours.rows} rows"
    yield from _token_checks(tuned, export, bounds)
    yield Check("loss", rows, f"{ours.loss:.4f} of the run, {theirs.loss:.4f} exported", "yes")
    if kept := share_kept(base.evaluation, ours, theirs):
        result = "{:.1%} ({:.1%} to {:.1%})".format(*kept)
        yield Check(KEPT, rows, result, graded(kept[0]))
    else:
        yield Check(KEPT, rows, "not known: training changed the loss of these rows too little", "yes")
    if ours.accuracy is not None and theirs.accuracy is not None:
        changed = compare(ours, theirs)
        p = changed.p_value or 0.0
        worse = len(changed.broken) > len(changed.fixed) and p < SIGNIFICANT
        result = f"{ours.accuracy:.1%} of the run, {theirs.accuracy:.1%} exported (p = {p:.2g})"
        where = changed.broken[0][0].location if changed.broken else ""
        yield Check(ours.measure, rows, result, "no" if worse else "yes", where)
    if tuned.answers:
        yield from _answer_checks(tuned, export, bounds)


def graded(share: float, well: float = KEPT_WELL, at_all: float = KEPT_AT_ALL) -> Verdict:
    return "yes" if share >= well else "warning" if share >= at_all else "no"


def _token_checks(tuned: Measured, export: Measured, bounds: Limits) -> Iterator[Check]:
    pairs = list(zip(tuned.tokens, export.tokens, strict=True))
    errors = [np.abs(np.subtract(ours[0], theirs[0], dtype=np.float64)) for ours, theirs in pairs]
    flat = np.concatenate(errors)
    worst, mean = float(flat.max()), float(flat.mean())
    row = max(range(len(errors)), key=lambda at: float(np.max(errors[at], initial=0.0)))
    holds = worst <= bounds.worst and mean <= bounds.mean and math.isfinite(worst)
    result, where = f"error {worst:.1e} at most, {mean:.1e} on average", tuned.evaluation.results[row].location
    yield Check("log-probabilities", f"{len(flat):,} tokens", result, "yes" if holds else "no", where)
    share = float(np.concatenate([ours[1] == theirs[1] for ours, theirs in pairs]).mean())
    grade = graded(share, *bounds.greedy)
    yield Check("most probable tokens", f"{len(flat):,} tokens", f"{share:.1%} the same", grade)


def _answer_checks(tuned: Measured, export: Measured, bounds: Limits) -> Iterator[Check]:
    pairs = list(zip(tuned.evaluation.results, tuned.answers, export.answers, strict=False))
    wrong = [row.location for row, ours, theirs in pairs if ours.text != theirs.text]
    check = _equal("answers", f"{len(pairs)} rows", wrong)
    yield replace(check, holds="yes") if len(wrong) <= math.ceil(bounds.answers * len(pairs)) else check
    ends = [theirs.ended for _, ours, theirs in pairs if ours.ended]
    if ends:
        result, holds = f"{sum(ends)} of {len(ends)} end with their end token", sum(ends) / len(ends) >= bounds.ended
        yield Check("ends of answers", f"{len(ends)} rows", result, "yes" if holds else "no")


_REMEDIES = {
    "file": "the disk or its driver changed what was written: check the disk, and export again",
    "tokens": "this form of model reads texts otherwise than the run's tokenizer: use --to merged",
    "prompts": "the run's prompt cannot be written by a chat template: use `finetune chat`",
    "ends of answers": "the export does not know the token that ends an answer: please report it",
}


def sentence(checks: Iterable[Check], what: str, finer: str) -> str | None:
    """The first failure with its remedy, in one sentence; None where all checks hold. finer: what loses less."""
    failed = next((check for check in checks if check.holds == "no"), None)
    if failed is None:
        return None
    where = f", the first at {failed.where}" if failed.where else ""
    advice = _REMEDIES.get(failed.name) or finer or "the file does not compute what the run computes: please report it"
    return f"{what} does not do what the run's model does: {failed.name}: {failed.result}{where}; {advice}"


def checks_table(checks: Iterable[Check], title: str) -> Table:
    table = Table("compared", "on", "result", "holds", "where", title=title, title_justify="left")
    styles: Mapping[str, str | None] = {"yes": None, "warning": "yellow", "no": "bold red"}
    for check in checks:
        cells = (check.name, check.on, check.result, check.holds, from_here(check.where))
        table.add_row(*cells, style=styles[check.holds])
    return table

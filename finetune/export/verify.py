"""Does an export do what the run's own model does? The checks, each with its limit, and what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Table

from backends.interface import FloatArray
from finetune.data.rows import Message
from finetune.data.tokenizer import encode, encode_prompt, special_texts
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.verdict import SIGNIFICANT
from finetune.export.measure import Exported, Kept, Measured, share_kept
from finetune.export.prompt import PROBES, as_the_run_asks, asked_rows
from finetune.report.report import compare
from finetune.text import shorten
from finetune.training.job import Job

Verdict = Literal["yes", "warning", "no"]
KEPT_WELL, KEPT_AT_ALL = 0.9, 0.5  # of the tuning; below the first a warning, below the second a failure
_SHOWN = 3  # rows or probes that are named
_FOLDERS = re.compile(r"[^\s,]*/(?=[^/\s,]+:\d+)")  # before the name of a file with a line


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    name: str
    on: str  # how many, of what
    result: str
    holds: Verdict
    where: str = ""  # the worst, or the first that differ


@dataclass(frozen=True)
class Limits:
    """How far an export may be from the run's model. Natural logarithms, per supervised token."""

    worst: float | None  # error of a log-probability
    mean: float | None
    greedy: float  # least share of the tokens whose most probable token is the same
    answers: float  # least share of the answers that are the same
    ended: float  # least share of the answers that end, of those that ended


_LIMITS = {
    "f32": Limits(1e-3, 1e-4, 0.99, 1.0, 1.0),
    "f16": Limits(None, 0.01, 0.98, 0.9, 0.9),
    "bf16": Limits(None, 0.05, 0.98, 0.9, 0.9),
}
_QUANTISED = Limits(None, None, 0.9, 0.0, 0.5)  # their errors are large where training matters little: see `kept`


def limits(kind: str) -> Limits:
    """kind: of the numbers in the file, or of those that the model computes with where these are coarser."""
    return _LIMITS.get(kind, _QUANTISED)


def token_check(export: Exported, job: Job) -> Check:
    """The tokens of every held-out row and of the special tokens, by the export's tokenizer and by the run's."""
    assert job.prepared.renderer is not None
    records = job.prepared.held_out.records
    written = job.prepared.renderer.render_all(records)
    texts = [(one.record.location, one.text) for row in written if not isinstance(row, ValueError) for one in row]
    texts += [(text, text) for text in sorted(special_texts(job.tokenizer))]
    ours = encode(job.tokenizer, [text for _, text in texts])
    wrong = [
        where for (where, text), own in zip(texts, ours, strict=True) if list(export.tokenise(text)) != list(own.tokens)
    ]
    return _equal("tokens", f"{len(texts):,} texts", wrong)


def prompt_check(export: Exported, job: Job, always: Mapping[str, str | None]) -> Check:
    """The prompt of every held-out row, as the export writes it for a conversation."""
    assert job.prepared.renderer is not None
    asked = list(asked_rows(job.prepared.renderer, job.prepared.format, job.prepared.held_out.records, always))
    wrong = [
        where
        for where, messages, tools, text in asked
        if _prompt(export, messages, tools) != encode_prompt(job.tokenizer, text)
    ]
    return _equal("prompts", f"{len(asked):,} rows", wrong)


def probe_check(export: Exported, job: Job) -> Check:
    """Conversations that are in no row. Where they differ the export is right for the rows all the same."""
    assert job.prepared.renderer is not None
    different = []
    for probe in PROBES:
        try:
            text = as_the_run_asks(job.prepared.renderer, job.prepared.format, probe)
        except ValueError:  # the run's template refuses it: there is nothing to compare
            continue
        if _prompt(export, probe, ()) != encode_prompt(job.tokenizer, text):
            different.append(" / ".join(f"{message['role']}: {shorten(message['content'], 24)}" for message in probe))
    check = _equal("other prompts", f"{len(PROBES)} probes", different)
    return check if check.holds == "yes" else Check(check.name, check.on, check.result, "warning", check.where)


def _prompt(export: Exported, messages: Sequence[Message], tools: Sequence[object]) -> list[int] | None:
    try:
        return list(export.prompt(messages, tools))
    except ValueError:
        return None


def _equal(name: str, on: str, wrong: Sequence[str]) -> Check:
    if not wrong:
        return Check(name, on, "equal", "yes")
    more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return Check(name, on, f"{len(wrong)} differ", "no", ", ".join(wrong[:_SHOWN]) + more)


def model_checks(base: Evaluation, tuned: Measured, export: Measured, kind: str) -> Iterator[Check]:
    """What the two models make of the same rows."""
    bounds = limits(kind)
    yield _logprobs(tuned, export, bounds)
    yield _greedy(tuned, export, bounds)
    yield _loss(tuned.evaluation, export.evaluation)
    yield _kept(share_kept(base, tuned.evaluation, export.evaluation), tuned.evaluation)
    yield from _task(tuned.evaluation, export.evaluation)
    yield from _answers(tuned, export, bounds)


def _logprobs(tuned: Measured, export: Measured, bounds: Limits) -> Check:
    errors: list[FloatArray] = [
        np.abs(ours - theirs) for ours, theirs in zip(tuned.logprobs, export.logprobs, strict=True)
    ]
    flat = np.concatenate(errors).astype(np.float64)
    worst, mean = float(np.max(flat)), float(np.mean(flat))
    row = max(range(len(errors)), key=lambda at: float(np.max(errors[at], initial=0.0)))
    finite = np.isfinite(flat).all()
    holds = finite and worst <= (bounds.worst or np.inf) and mean <= (bounds.mean or np.inf)
    result = f"error {worst:.1e} at most, {mean:.1e} on average"
    where = tuned.evaluation.results[row].location
    return Check("log-probabilities", f"{len(flat):,} tokens", result, "yes" if holds else "no", where)


def _greedy(tuned: Measured, export: Measured, bounds: Limits) -> Check:
    same = np.concatenate([ours == theirs for ours, theirs in zip(tuned.greedy, export.greedy, strict=True)])
    share = float(same.mean())
    holds: Verdict = "yes" if share >= bounds.greedy else "no"
    return Check("most probable tokens", f"{len(same):,} tokens", f"{share:.1%} the same", holds)


def _loss(tuned: Evaluation, export: Evaluation) -> Check:
    return Check("loss", f"{export.rows} rows", f"{tuned.loss:.4f} of the run, {export.loss:.4f} exported", "yes")


def _kept(share: Kept | None, tuned: Evaluation) -> Check:
    on = f"{tuned.rows} rows"
    if share is None:
        return Check("tuning that is kept", on, "not known: training changed the loss of these rows too little", "yes")
    low, high = share.interval
    holds: Verdict = "yes" if share.share >= KEPT_WELL else "warning" if share.share >= KEPT_AT_ALL else "no"
    return Check("tuning that is kept", on, f"{share.share:.1%} ({low:.1%} to {high:.1%})", holds)


def _task(tuned: Evaluation, export: Evaluation) -> Iterator[Check]:
    if tuned.accuracy is None or export.accuracy is None:
        return
    changed = compare(tuned, export)
    p = changed.p_value or 0.0
    name = "accuracy" if tuned.labels else "exact match"
    result = f"{tuned.accuracy:.1%} of the run, {export.accuracy:.1%} exported (p = {p:.2g})"
    worse = len(changed.broken) > len(changed.fixed) and p < SIGNIFICANT
    where = changed.broken[0][0].location if changed.broken else ""
    yield Check(name, f"{tuned.rows} rows", result, "no" if worse else "yes", where)


def _answers(tuned: Measured, export: Measured, bounds: Limits) -> Iterator[Check]:
    rows = tuned.evaluation.results
    pairs = list(zip(tuned.answers, export.answers, strict=True))
    if not pairs:
        return
    wrong = [row.location for row, (ours, theirs) in zip(rows, pairs, strict=False) if ours != theirs]
    share = 1 - len(wrong) / len(pairs)
    result = "equal" if not wrong else f"{len(wrong)} differ"
    where = ", ".join(wrong[:_SHOWN])
    yield Check("answers", f"{len(pairs)} rows", result, "yes" if share >= bounds.answers else "no", where)
    ends = [theirs for ours, theirs in zip(tuned.ended, export.ended, strict=True) if ours]
    if ends:
        ended = sum(ends) / len(ends)
        result = f"{sum(ends)} of {len(ends)} end with their end token"
        yield Check("ends of answers", f"{len(ends)} rows", result, "yes" if ended >= bounds.ended else "no")


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
        places = _FOLDERS.sub("", check.where)
        table.add_row(check.name, check.on, check.result, check.holds, places, style=styles[check.holds])
    return table

"""Findings as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from finetune.check.survey import Findings
from finetune.data.problems import Problem
from finetune.data.tokenizer import Tokenizer


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


def headline(found: dict[str, Any]) -> str:
    """One line of what `as_json` gave, for the end of a run."""
    pairs = found["duplicates"]
    personal = sum(one["rows"] for one in found["personal"].values())
    specials = found["special_tokens"]
    counts = {
        "repeated": len(pairs["exact"]) + len(pairs["near"]),
        "leaked from one split to another": len(pairs["leaks"]),
        "with personal data": personal,
        "with special tokens written out": 0 if specials["meant"] else len(specials["places"]),
        "faulty": found["faults"],
    }
    said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    enough = found["enough"]
    return f"rows: {said or 'none repeated, leaked or faulty'}; {enough['level']}: {enough['reasons'][0]}"

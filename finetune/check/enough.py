"""Is there enough data? A plain judgement, with its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["too little", "thin", "enough"]
# Rows from which an adapter has been seen to learn a task at all, and to learn it well.
ROWS = {"label": (10, 50), "answer": (50, 500)}
MANY_PASSES = 4  # of a small file, from which the rows themselves are learned
IMBALANCE = 10


@dataclass(frozen=True)
class Enough:
    level: Level
    reasons: tuple[str, ...]
    examples: int
    trainable: int  # parameters of the adapter
    supervised_tokens: int
    epochs: float


def judge(
    examples: int,
    labels: Mapping[str, int],
    held_out: int,
    supervised_tokens: int,
    trainable: int,
    epochs: float,
) -> Enough:
    """labels: training rows of each; empty where answers are open. held_out: rows of the final figures."""
    scarce, label = min((count, name) for name, count in labels.items()) if labels else (examples, "")
    few, many = ROWS["label" if labels else "answer"]
    what = f'rarest label "{label}" has {scarce:,} rows' if labels else f"{scarce:,} examples to learn from"
    level: Level = "too little" if scarce < few else "thin" if scarce < many else "enough"
    wanted = {"too little": f"below {few} little is learned", "thin": f"{many} or more learn steadily"}
    reasons = [what + (f"; {wanted[level]}" if level in wanted else "")]
    most = max(labels.values(), default=0)
    if labels and most > IMBALANCE * max(scarce, 1):
        reasons.append(f"the commonest label has {most:,} rows: macro F1 says more than accuracy here")
    if supervised_tokens:
        ratio = trainable / supervised_tokens
        reasons.append(
            f"{trainable:,} trainable parameters for {supervised_tokens:,} supervised tokens, {ratio:.1f} to one, "
            f"seen {epochs:g} times"
        )
        if ratio > 10 and epochs >= MANY_PASSES:
            reasons.append("so the rows can be learned by heart: watch the validation loss, or set early_stopping")
    if held_out:
        reasons.append(_resolution(held_out))
    return Enough(level, tuple(reasons), examples, trainable, supervised_tokens, epochs)


def _resolution(held_out: int) -> str:
    """The widest 95 % interval of a share of so many rows (Wald's, at one half)."""
    points = 100 * 1.96 * (0.25 / held_out) ** 0.5
    rows = f"{held_out:,} held-out row{'s' * (held_out > 1)}"
    return f"{rows}: an accuracy on them is known to within {points:.0f} points either way"

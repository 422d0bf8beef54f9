"""Order of a duel: which answers meet on which row, drawn once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations

from finetune.evaluation.bradley_terry import Choice, Vote


@dataclass(frozen=True)
class Answered:
    """One row, and what each model answers to it."""

    row: str  # file:line, or more where several examples come from that line
    prompt: str
    answers: Mapping[str, str]  # by model


@dataclass(frozen=True)
class Meeting:
    """Two answers to one row, side by side."""

    row: str
    prompt: str
    left: str  # the models
    right: str
    left_answer: str
    right_answer: str

    def voted(self, choice: Choice) -> Vote:
        return Vote(self.row, self.left, self.right, choice, self.left_answer, self.right_answer)


def meetings(rows: Sequence[Answered], models: Sequence[str], seed: int) -> list[Meeting]:
    """Every two models on every row, but for answers that are the same. The order, and who stands left, are drawn: the
    same ones each time, whoever else takes part.
    """
    drawn: list[tuple[bytes, Meeting]] = []
    for row in rows:
        for pair in combinations(sorted(models), 2):
            if row.answers[pair[0]].strip() == row.answers[pair[1]].strip():
                continue
            lot = blake2b("\0".join((str(seed), row.row, *pair)).encode(), digest_size=16).digest()
            left, right = pair if lot[-1] % 2 else (pair[1], pair[0])
            drawn.append((lot, Meeting(row.row, row.prompt, left, right, row.answers[left], row.answers[right])))
    return [meeting for _, meeting in sorted(drawn, key=lambda pair: pair[0])]


def left_to_vote(all_meetings: Sequence[Meeting], votes: Sequence[Vote]) -> list[Meeting]:
    """Those that no vote was given on yet, of these very answers."""
    done = {(vote.pair, frozenset((vote.left_answer, vote.right_answer))) for vote in votes}
    return [
        meeting
        for meeting in all_meetings
        if (meeting.voted("skip").pair, frozenset((meeting.left_answer, meeting.right_answer))) not in done
    ]

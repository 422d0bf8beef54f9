"""The test rows, stored in the run's folder, so that they can be measured again without the original files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from finetune.data.rows import Example, Prepared, Split
from finetune.disk.atomic import write_file
from finetune.disk.run_files import read_json_lines
from finetune.disk.run_folder import RunFolder
from finetune.errors import Incompatible

REMEDY = "delete it, and the rows are read from the recipe's files"
_Flag = Literal["apart", "cut", "piece"]  # of an Example
_FLAGS: tuple[_Flag, ...] = ("apart", "cut", "piece")
_Number = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class _Row:
    """One line of the file."""

    location: Annotated[str, Field(validation_alias="place")]
    prompt: str
    expected: str | None
    tokens: Annotated[list[_Number], Field(min_length=1)]
    supervised: list[tuple[_Number, _Number]]  # (start, end) of each run of them
    answer: tuple[_Number, _Number] | None  # (start, end) of its tokens
    flags: list[_Flag]


@dataclass(frozen=True)
class HeldOut:
    """What a run recorded of the rows that it measured."""

    split: Split
    labels: tuple[str, ...]
    label_tokens: tuple[tuple[int, ...], ...]


def write_held_out(run: RunFolder, prepared: Prepared) -> None:
    """held-out.jsonl, whole or absent: every row with its texts and tokens, but for pairs. Raises DiskError."""
    if prepared.task == "preference":
        return
    lines = (json.dumps(_as_json(example), ensure_ascii=False) for example in prepared.held_out.examples)
    write_file(run.held_out, "".join(f"{line}\n" for line in lines))


def described(prepared: Prepared) -> dict[str, Any] | None:
    """What of them stands in data.json: their split, and the tokens by which each label is measured; nothing of pairs,
    which are read from the recipe's files again.
    """
    if prepared.task == "preference":
        return None
    return {"split": prepared.held_out.name, "label_tokens": [list(tokens) for tokens in prepared.label_tokens]}


def read_held_out(run: RunFolder) -> HeldOut | None:
    """None where the run has recorded none, as runs of 0.1.0 have not. Raises Incompatible for what no run writes."""
    account = run.account()
    if account is None or account.held_out is None:
        return None
    rows = read_json_lines(run.held_out, _Row, REMEDY)
    if rows is None:
        return None
    labels, tokens = tuple(account.labels), tuple(map(tuple, account.held_out.label_tokens))
    if not rows or len(labels) != len(tokens) or (labels and not {row.expected for row in rows} <= {*labels}):
        raise Incompatible(f"{run.held_out}: not the rows of this run; {REMEDY}")
    split = Split(account.held_out.split, len(rows), examples=tuple(map(_as_example, rows)))
    return HeldOut(split, labels, tokens)


def _as_json(example: Example) -> dict[str, Any]:
    """A row's location has the key `place`, as in rows.jsonl."""
    return {
        "place": example.location,
        "prompt": example.prompt,
        "expected": example.answer,
        "tokens": example.tokens.tolist(),
        "supervised": _runs(example),
        "answer": None if example.answer_start is None else [example.answer_start, example.answer_end],
        "flags": [flag for flag in _FLAGS if getattr(example, flag)],
    }


def _runs(example: Example) -> list[list[int]]:
    """(start, end) of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(example.weights > 0, prepend=False, append=False))
    runs: list[list[int]] = edges.reshape(-1, 2).tolist()
    return runs


def _as_example(row: _Row) -> Example:
    start, end = row.answer or (None, None)
    return Example(
        tokens=np.array(row.tokens, np.int32),
        weights=_weights(len(row.tokens), row.supervised),
        location=row.location,
        answer=row.expected,
        prompt=row.prompt,
        answer_start=start,
        answer_end=end,
        apart="apart" in row.flags,
        cut="cut" in row.flags,
        piece="piece" in row.flags,
    )


def _weights(count: int, supervised: Sequence[tuple[int, int]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    weights = np.zeros(count, np.float32)
    for start, end in supervised:
        weights[start:end] = 1.0
    return weights

"""check.json read back: of what a run wrote about its data, the part that a resumed run says again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from finetune.disk.run_files import read_json


class _Pairs(BaseModel):
    exact: list[Any]
    near: list[Any]
    leaks: list[Any]


class _Kind(BaseModel):
    rows: int


class _Enough(BaseModel):
    level: str
    reasons: list[str] = Field(min_length=1)


class _Specials(BaseModel):
    meant: bool
    places: list[Any]


class _Split(BaseModel):
    left_out_fields: dict[str, int] = {}  # an earlier version wrote none


class _Told(BaseModel):
    splits: dict[str, _Split]
    duplicates: _Pairs
    personal: dict[str, _Kind]
    special_tokens: _Specials
    faults: int
    enough: _Enough


def read_told(file: Path) -> dict[str, Any] | None:
    """What `finetune.check.show.headline` needs; None where there is no such file. Raises Incompatible."""
    told = read_json(file, _Told, "delete it, and the data are checked again", extra="ignore")
    return None if told is None else told.model_dump()

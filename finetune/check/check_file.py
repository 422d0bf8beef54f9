"""Reads check.json back: the findings that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from finetune.disk.run_files import read_json


class _Leak(BaseModel):
    split: str
    other_split: str
    location: str = Field(alias="place")


class _Pairs(BaseModel):
    exact: list[Any]
    near: list[Any]
    leaks: list[_Leak]


class _Kind(BaseModel):
    rows: int


class _Enough(BaseModel):
    level: str
    reasons: list[str] = Field(min_length=1)


class _Specials(BaseModel):
    meant: bool
    places: list[Any]


class _Split(BaseModel):
    left_out_fields: dict[str, int] = {}  # a check.json of an earlier version has none


class _Findings(BaseModel):
    splits: dict[str, _Split]
    duplicates: _Pairs
    personal: dict[str, _Kind]
    special_tokens: _Specials
    faults: int
    enough: _Enough


def leaked_into(findings: Mapping[str, Any], split: str) -> frozenset[str]:
    """The locations of a split's rows that stand in the training rows too. told: of `read_told`, or what it reads."""
    leaks = findings["duplicates"]["leaks"]
    return frozenset(leak["place"] for leak in leaks if (leak["split"], leak["other_split"]) == (split, "train"))


def read_findings(file: Path) -> dict[str, Any] | None:
    """What `finetune.check.show.headline` needs; None where there is no such file. Raises Incompatible."""
    findings = read_json(file, _Findings, "delete it, and the data are checked again", extra="ignore")
    return None if findings is None else findings.model_dump(by_alias=True)

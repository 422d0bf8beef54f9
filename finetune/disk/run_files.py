"""Reads a run's JSON files by typed schemas, and refuses anything else with the file's name."""

from __future__ import annotations

import json
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from finetune.disk.atomic import disk_errors
from finetune.errors import Incompatible
from finetune.text import shorten

T = TypeVar("T")


def read_regular(file: Path) -> bytes | None:
    """The bytes of a file; None where there is none. Raises Incompatible for a pipe or a folder; DiskError."""
    if not os.path.lexists(file):
        return None
    with disk_errors(file):
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as opened:  # a pipe would keep us waiting, so it is opened before it is asked
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Incompatible(f"{file}: not a regular file; remove it")
            return opened.read()


def read_json(file: Path, kind: type[T], remedy: str, extra: Literal["forbid", "ignore"] = "forbid") -> T | None:
    """What a file holds; None where there is none. Raises Incompatible for what no run writes; DiskError.

    extra: what keys that `kind` does not name are.
    """
    data = read_regular(file)
    if data is None:
        return None
    try:
        value: T = _validated(kind, data, extra)
    except ValidationError as error:
        raise _refusal(error, str(file), remedy) from None
    return value


def read_json_lines(file: Path, kind: type[T], remedy: str) -> list[T] | None:
    """A `kind` from each line; None where there is no file. Raises as `read_json`, with the line."""
    data = read_regular(file)
    if data is None:
        return None
    rows: list[T] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            rows.append(_validated(kind, line, "forbid"))
        except ValidationError as error:
            raise _refusal(error, f"{file}:{number}", remedy) from None
    return rows


def check_values(
    values: Any, kind: type[T], where: str, remedy: str, extra: Literal["forbid", "ignore"] = "forbid"
) -> T:
    """Values that came from JSON, as a `kind`. Raises Incompatible, with `where` they stand, for what no run writes."""
    try:
        value: T = _validated(kind, json.dumps(values), extra)
    except ValidationError as error:
        raise _refusal(error, where, remedy) from None
    return value


def _validated(kind: Any, data: bytes | str, extra: Literal["forbid", "ignore"]) -> Any:
    return _adapter(kind).validate_json(data, strict=True, extra=extra)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _refusal(error: ValidationError, where: str, remedy: str) -> Incompatible:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"]))
    what = shorten(f"{key}: {first['msg']}" if key else first["msg"], 200)
    return Incompatible(f"{where}: not what a run writes ({what}); {remedy}")

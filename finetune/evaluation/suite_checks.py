"""Checks of a suite case against an answer, with the reason for each failure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from finetune.evaluation.answers import part_of
from finetune.text import harmless, shorten

PATIENCE = 1.0  # seconds that a pattern may search an answer: some would search for years
_MOST = 2_000  # characters of a pattern
_SHOWN = 60  # characters of what is expected
_NAMED = ("properties", "$defs", "definitions", "dependentSchemas")  # keywords whose keys are names
_DATA = ("const", "enum", "default", "examples")
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Number(_Strict):
    """The last number of an answer, and how far from it the answer may be."""

    value: float
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0


class Checks(_Strict):
    """All of those that are given must pass. White space around an answer does not count."""

    equals: str | None = None
    one_of: _Texts | None = None
    contains: _Text | _Texts | None = None  # all of them
    not_contains: _Text | _Texts | None = None  # none of them
    regex: _Text | None = None  # somewhere in the answer
    json_schema: dict[str, Any] | None = None  # of the answer, or of its one block between fences
    number: float | Number | None = None
    longest: Annotated[int, Field(ge=0)] | None = None  # characters

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            if len(pattern) > _MOST:
                raise ValueError(f"{len(pattern):,} characters, and {_MOST:,} are the most for a pattern")
            _check_pattern(pattern)
        return pattern

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            _check_schema(schema)
        return schema

    def failures(self, answer: str) -> list[str]:
        """Why the answer does not pass, a phrase for each check that it fails."""
        return list(self._failures(answer.strip()))

    def _failures(self, answer: str) -> Iterator[str]:
        if self.equals is not None and answer != self.equals.strip():
            yield f"is not {_quoted(self.equals)}"
        if self.one_of is not None and answer not in [text.strip() for text in self.one_of]:
            yield f"is none of {', '.join(map(_quoted, self.one_of))}"
        for text in _listed(self.contains):
            if text not in answer:
                yield f"does not contain {_quoted(text)}"
        for text in _listed(self.not_contains):
            if text in answer:
                yield f"contains {_quoted(text)}"
        if self.regex is not None and (why := _unmatched(self.regex, answer)):
            yield why
        if self.json_schema is not None and (why := _unfit(self.json_schema, answer)):
            yield why
        if self.number is not None and (why := _other_number(self.number, answer)):
            yield why
        if self.longest is not None and len(answer) > self.longest:
            yield f"has {len(answer):,} characters, more than {self.longest:,}"


def _listed(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else texts or []


def _quoted(text: str) -> str:
    return f'"{harmless(shorten(text, _SHOWN))}"'


def _check_pattern(pattern: str) -> None:
    """Raises ValueError for what is no regular expression."""
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression ({error})") from None


def _search(pattern: str, text: str) -> bool:
    """Whether it matches somewhere. Raises TimeoutError after PATIENCE."""
    import regex

    return regex.search(pattern, text, timeout=PATIENCE) is not None


def _unmatched(pattern: str, answer: str) -> str | None:
    try:
        return None if _search(pattern, answer) else f"does not match {_quoted(pattern)}"
    except TimeoutError:
        return f"takes longer than {PATIENCE:g} s to search for {_quoted(pattern)}; write a simpler pattern"


def _other_number(wanted: float | Number, answer: str) -> str | None:
    wanted = wanted if isinstance(wanted, Number) else Number(value=wanted)
    last = part_of(answer, "last_number")
    if last is None:
        return "has no number"
    if abs(Decimal(last) - Decimal(str(wanted.value))) <= Decimal(str(wanted.tolerance)):
        return None
    within = f" within {wanted.tolerance:g}" if wanted.tolerance else ""
    return f"its last number is {shorten(last, _SHOWN)}, not {wanted.value:g}{within}"


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no JSON schema, or one that needs more than itself."""
    from jsonschema import SchemaError

    try:
        _validator(json.dumps(schema)).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON schema ({shorten(error.message, 200)})") from None
    for key, value in _keys(schema):
        if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str) and value[:1] != "#":
            raise ValueError(f"{key} {shorten(value, _SHOWN)}: leads out of the schema; write that part into it")
        if key == "patternProperties":
            raise ValueError("patternProperties is not known here; name the properties")
        if key == "pattern" and isinstance(value, str):
            _check_pattern(value)


def _keys(node: Any) -> Iterator[tuple[str, Any]]:
    """The keywords of a schema and of those in it; no name of a property, and nothing of values that are data."""
    if isinstance(node, list):
        for one in node:
            yield from _keys(one)
    for key, value in node.items() if isinstance(node, Mapping) else ():
        yield key, value
        if key in _NAMED and isinstance(value, Mapping):
            yield from _keys(list(value.values()))
        elif key not in _DATA:
            yield from _keys(value)


@cache
def _validator(schema: str) -> Any:
    """Of the schema's own draft, or the newest one; its patterns are bounded in time, and it fetches nothing."""
    from jsonschema import Draft202012Validator, ValidationError, validators
    from referencing import Registry

    def pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(instance, "string") and (why := _unmatched(wanted, instance)):
            yield ValidationError(f"{_quoted(instance)} {why}")

    values = json.loads(schema)
    kind = validators.extend(validators.validator_for(values, Draft202012Validator), {"pattern": pattern})
    return kind(values, registry=Registry())


def _unfit(schema: Mapping[str, Any], answer: str) -> str | None:
    text = part_of(answer, "json")
    if text is None:
        return "is not JSON"
    from jsonschema import exceptions

    try:
        error = exceptions.best_match(_validator(json.dumps(schema)).iter_errors(json.loads(text)))
    except RecursionError:
        return "does not fit the schema: it refers to itself without end"
    except exceptions._WrappedReferencingError as unresolved:
        return f"does not fit the schema: {shorten(str(unresolved), 200)}"
    if error is None:
        return None
    where = "".join(f".{key}" if isinstance(key, str) else f"[{key}]" for key in error.absolute_path)
    return f"does not fit the schema{' at ' + harmless(where) if where else ''}: {shorten(error.message, 200)}"

"""Rows and conversations to records: the same fields whatever the file called them, checked one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.encoding import check_text
from finetune.data.formats import ANSWER, REQUIRED, Layout
from finetune.data.rows import Message, Problem, Record, Row

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_AFTER = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_KEPT = ("name", "tool_call_id", "reasoning_content")


class BadRow(ValueError):
    """Why a row cannot be trained on; the caller knows its location."""


def read_records(
    rows: Sequence[Row], layout: Layout, labels: Sequence[str] | None = None
) -> tuple[list[Record], list[Problem]]:
    """Records of the rows that fit the layout, and the others with the reason. labels: those allowed."""
    records: list[Record] = []
    bad: list[Problem] = []
    for row in rows:
        try:
            records.append(_record(row, layout, labels))
        except ValueError as error:
            bad.append((row.location, str(error)))
    return records, bad


def _record(row: Row, layout: Layout, labels: Sequence[str] | None) -> Record:
    missing = [layout.columns[part] for part in REQUIRED[layout.name] if row.fields.get(layout.columns[part]) is None]
    if missing:
        raise BadRow(f"{', '.join(missing)} is missing, and the other rows are {layout.name}; add it")
    if layout.name in ("chat", "sharegpt"):
        part = "messages" if layout.name == "chat" else "conversations"
        messages = read_messages(row.fields[layout.columns[part]], layout.columns[part])
        tools = read_tools(row.fields, layout.columns)
        return Record(row.location, repr(messages), _scalars(row), messages=messages, tools=tools)
    return _plain_record(row, layout, labels)


def _plain_record(row: Row, layout: Layout, labels: Sequence[str] | None) -> Record:
    columns = {name: "" if value is None else str(value) for name, value in row.fields.items()}
    standard = {part: _text(row.fields.get(column), column, part) for part, column in layout.columns.items()}
    for part in REQUIRED[layout.name]:
        if not standard[part].strip():
            raise BadRow(f"{layout.columns[part]} is empty; give it some text, or remove the row")
    answer_part = ANSWER.get(layout.name)
    if answer_part == "label":
        standard["label"] = standard["label"].strip()
        if labels is not None and standard["label"] not in labels:
            raise BadRow(f"label {standard['label']!r} is not one of {', '.join(labels)}; correct it, or add it")
    key = "\0".join(standard[part] for part in standard if part != answer_part)
    return Record(row.location, key, {**columns, **standard}, standard[answer_part] if answer_part else None)


def _scalars(row: Row) -> dict[str, str]:
    """The columns beside a conversation that hold one value: an id, a source, a group."""
    return {name: str(value) for name, value in row.fields.items() if isinstance(value, (str, int, float))}


def _text(value: Any, column: str, part: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and part == "label":
        return str(int(value))  # tables with gaps hold whole numbers as floats
    if isinstance(value, str):
        check_text(value, column)
        return value
    if isinstance(value, (bool, int)) and part in ("label", "completion", "output"):
        return str(value)
    kinds = "text, a whole number or true/false" if part == "label" else "text"
    raise BadRow(f"{column} is {type(value).__name__}, and must be {kinds}; write it as text")


def read_messages(value: Any, column: str) -> tuple[Message, ...]:
    """The conversation of one row. Raises ValueError with the reason where it is not one."""
    if isinstance(value, str):
        value = _parsed(value, column)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{column} must be a list of at least a user and an assistant message")
    messages = tuple(_message(one, f"{column}[{number}]") for number, one in enumerate(value))
    before = ""
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in _AFTER[before]:
            position = f"after {before}" if before else "first"
            wanted = " or ".join(_AFTER[before])
            raise ValueError(f"{column}[{number}]: {role} cannot stand {position}, only {wanted}; fix the turns")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{column}: no assistant turn to learn from; add one, or remove the row")
    return messages


def _parsed(value: str, column: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{column} is text that is no JSON list ({error}); write the messages as JSON") from None


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object with role and content")
    named = _first(value, "role", "from")
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"{where}: unknown role {named!r}; use system, user, assistant or tool")
    message: dict[str, Any] = {"role": role, "content": _content(_first(value, "content", "value"), where)}
    calls = _tool_calls(value, where) if role == "assistant" else []
    if calls:
        message["tool_calls"] = calls
    elif not message["content"].strip():
        raise ValueError(f"{where} ({role}) is empty; give it some text, or remove the row")
    message.update({key: value[key] for key in _KEPT if isinstance(value.get(key), str)})
    weight = _first(value, "weight", "loss_weight")
    if weight is not None and role == "assistant":
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f"{where}: weight {weight!r} must be 0 (not learned) or 1")
        message["weight"] = int(weight)
    return message


def _first(value: Mapping[str, Any], *keys: str) -> Any:
    """The first of the keys that holds something: Parquet gives every row every key."""
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _content(value: Any, where: str) -> str:
    """Text, nothing, or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return "".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: content is {type(value).__name__}; write it as text")
    check_text(value, f"{where}: content")
    return value


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind == "str":
        return _content(part, where)
    text = _first(part, "text", "value") if kind == "text" else None
    if not isinstance(text, str):
        raise ValueError(f"{where}: a content part of type {kind}; only text parts can be learned")
    return _content(text, where)


def _tool_calls(value: Mapping[str, Any], where: str) -> list[Any]:
    """Calls as templates expect them: arguments as an object, an old function_call as a tool call."""
    calls = value.get("tool_calls") or ()
    if value.get("function_call"):
        calls = [{"type": "function", "function": value["function_call"]}]
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call must have a function with a name; fix the call")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"{where}: the arguments of {function['name']}")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def read_tools(fields: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Any, ...]:
    """The tools offered in a row; old `functions` are wrapped as tools."""
    tools = fields.get(columns.get("tools", "tools")) or ()
    functions = fields.get(columns.get("functions", "functions")) or ()
    if isinstance(tools, str):
        tools = _parsed(tools, "tools")
    if not isinstance(tools, (list, tuple)) or not isinstance(functions, (list, tuple)):
        raise ValueError("tools must be a list of tools; fix it")
    return (*tools, *({"type": "function", "function": one} for one in functions))

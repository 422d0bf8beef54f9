"""Tool calls and tool definitions in OpenAI's form, which chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.encoding import check_text
from finetune.data.rows import Message

DEEPEST = 64  # values within values; honest tools have some ten
_TOO_DEEP = "is nested too deeply; make it flatter, or remove the row"


def parsed(value: str, column: str) -> Any:
    """The value of a JSON text. Raises ValueError with the reason."""
    try:
        return json.loads(value)
    except RecursionError:
        raise ValueError(f"{column} {_TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"{column} is text that is no JSON list ({error}); write the messages as JSON") from None


def check_nested(value: Any, what: str) -> None:
    """Raises ValueError for text in it that no tokenizer should see, and for more depth than anything can render."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                check_text(one, what)
            elif isinstance(one, Mapping):
                below += [*one, *one.values()]
            elif isinstance(one, (list, tuple)):
                below += one
        if not below:
            return
        level = below
    raise ValueError(f"{what} {_TOO_DEEP}")


def read_calls(value: Any, where: str) -> list[Any]:
    """The calls of a turn: a list of them, or one; with a function inside or bare. Arguments become objects."""
    if isinstance(value, str):
        value = parsed(value, f"{where}: the call")
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{where}: a tool call must have a function with a name; fix the call")
    return [_call(parsed(one, f"{where}: the call") if isinstance(one, str) else one, where) for one in calls]


def as_call(value: Any, where: str) -> list[Any]:
    """The calls of a turn that ShareGPT's form has for them: JSON text, or the objects themselves."""
    try:
        return read_calls(value, where)
    except ValueError as error:
        raise ValueError(f"{error} (such a turn is JSON of name and arguments)") from None


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _wrapped(call) if isinstance(call, Mapping) else {}
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call must have a function with a name; fix the call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}", f"{where}: the arguments of {function['name']}")
    read = {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}
    check_nested(read, f"{where}: the call of {function['name']}")
    return read


def _wrapped(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """A bare call or tool with its function inside; an id stays outside."""
    if "function" in item or not isinstance(item.get("name"), str):
        return item
    outside = {key: item[key] for key in ("id",) if key in item}
    inside = {key: value for key, value in item.items() if key not in ("id", "type")}
    if "input_schema" in inside and "parameters" not in inside:
        inside["parameters"] = inside.pop("input_schema")
    return {**outside, "type": "function", "function": inside}


def read_tools(fields: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Any, ...]:
    """The tools offered in a row, each with its function inside; old `functions` are tools too."""
    found = []
    for name in ("tools", "functions"):
        tools = fields.get(columns.get(name, name)) or ()
        if isinstance(tools, str):
            tools = parsed(tools, name)
        if not isinstance(tools, (list, tuple)):
            raise ValueError("tools must be a list of tools; fix it")
        for tool in tools:
            tool = parsed(tool, name) if isinstance(tool, str) else tool
            check_nested(tool, name)
            found.append(_wrapped(tool) if isinstance(tool, Mapping) else tool)
    return tuple(found)


def with_short_ids(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The messages with ids of nine letters or digits, which Mistral's templates ask for; None where there is no call.

    A result without an id belongs to the first call before it that has none yet.
    """
    names: dict[str, str] = {}
    waiting: list[str] = []
    renamed: list[Message] = []
    count = 0
    for message in messages:
        if message.get("tool_calls"):
            calls, waiting = [], []
            for call in message["tool_calls"]:
                count += 1
                short = f"call{count:05}"
                if isinstance(call.get("id"), str):
                    names[call["id"]] = short
                waiting.append(short)
                calls.append({**call, "id": short})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            given = names.get(message.get("tool_call_id", ""))
            short = given or next(iter(waiting), message.get("tool_call_id", ""))
            waiting = [one for one in waiting if one != short]
            message = {**message, "tool_call_id": short}
        renamed.append(message)
    return tuple(renamed) if count else None

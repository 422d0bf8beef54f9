"""A row's conversation as messages for chat templates: roles, content, reasoning and flags validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.calls import as_call, check_nested, parsed, read_calls
from finetune.data.encoding import check_text
from finetune.data.rows import Message

CALL = "call"  # a turn that is nothing but calls of tools; it becomes the assistant's
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
    "function_call": CALL,
    "functioncall": CALL,
    "tool_call": CALL,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_AFTER = {
    "": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_KEPT = ("name", "tool_call_id")
THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")  # the first is our own name for them
# Whether a turn is learned, by the names that tools for fine-tuning give it.
_LEARNED = ("weight", "loss_weight", "train", "training", "trainable", "learn", "train_on_turn")
_NOT_LEARNED = ("masked", "mask", "ignore")
_TRUTH = {"true": True, "false": False, "1": True, "0": False}
_TEXT_PARTS = ("text", "input_text", "output_text")
_PLAIN = (frozenset(("role", "content")), frozenset(("from", "value")))
EMPTY_SYSTEM = "empty system messages"


def read_messages(value: Any, column: str, left_out: list[str] | None = None) -> tuple[Message, ...]:
    """The conversation of one row. Raises ValueError with the reason where it is not one.

    left_out: takes the names of what is in no message. Fields that are unknown here stay in their message: a template
    may read them. An answer that no user has asked for (a greeting) is not learned unless the row says so.
    """
    left_out = [] if left_out is None else left_out
    if isinstance(value, str):
        value = parsed(value, column)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{column} must be a list of at least a user and an assistant message")
    messages: list[dict[str, Any]] = []
    before, greetings = "", 0
    for number, one in enumerate(value):
        where = f"{column}[{number}]"
        message, only_calls = _message(one, where, left_out)
        role = message["role"]
        if role == "system" and not message["content"].strip():
            left_out.append(EMPTY_SYSTEM)
            continue
        if only_calls and before == "assistant":  # the words before a call, or calls at the same time
            _join(messages[-1], message)
            continue
        if role not in _AFTER[before]:
            position = f"after {before}" if before else "first"
            raise ValueError(
                f"{where}: {role} cannot stand {position}, only {' or '.join(_AFTER[before])}; fix the turns"
            )
        if role == "assistant" and before in ("", "system"):
            greetings += not message.setdefault("weight", 0)
        messages.append(message)
        before = role
    if sum(message["role"] == "assistant" for message in messages) == greetings:
        raise ValueError(f"{column}: no assistant turn to learn from; add one, or remove the row")
    return tuple(messages)


def is_answer(message: Any) -> bool:
    """Whether a turn of a row, as its file has it, is the assistant's."""
    named = _held(message, "role", "from") if isinstance(message, Mapping) else None
    return named is not None and _ROLES.get(str(message[named]).lower()) in ("assistant", CALL)


def without_extras(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What is said in them, which tells rows that ask the same: no ids of an export, no times."""
    known = ("role", "content", "tool_calls", *_KEPT, THOUGHTS[0], "weight")
    return [{key: value for key, value in message.items() if key in known} for message in messages]


def joined(prompt: Any, completion: Any) -> list[Any]:
    """A prompt and a completion, one of them at least a list of messages, as one list. The completion is learned."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    answer = [answer] if isinstance(answer, Mapping) else answer
    if not isinstance(asked, (list, tuple)) or not isinstance(answer, (list, tuple)) or not answer:
        raise ValueError("prompt and completion must be text or lists of messages; fix them")
    return [*({"weight": 0, **one} if isinstance(one, Mapping) else one for one in asked), *answer]


def _message(value: Any, where: str, left_out: list[str]) -> tuple[dict[str, Any], bool]:
    """The message, and whether it is a turn of nothing but calls."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object with role and content")
    named = _held(value, "role", "from")
    role = _ROLES.get(value[named].lower()) if named and isinstance(value[named], str) else None
    if role is None:
        raise ValueError(f"{where}: unknown role {value.get(named or 'role')!r}; use system, user, assistant or tool")
    said = _held(value, "content", "value")
    if role == CALL:
        content, calls = "", as_call(value.get(said or "content"), where)
        message: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": calls}
    else:
        content = value[said] if said else ""
        message = {"role": role, "content": content}
    if value.keys() in _PLAIN and isinstance(content, str):  # most messages of most files
        check_text(content, f"{where}: content")
    else:
        _read_fields(message, {key: one for key, one in value.items() if key not in (named, said)}, where, left_out)
    if not message["content"].strip() and role != "system" and not message.get("tool_calls"):
        raise ValueError(f"{where} ({role}) is empty; give it some text, or remove the row")
    return message, role == CALL


def _held(value: Mapping[str, Any], *keys: str) -> str | None:
    """The first of the keys that holds something: Parquet gives every row every key."""
    return next((key for key in keys if value.get(key) is not None), None)


def _read_fields(message: dict[str, Any], others: dict[str, Any], where: str, left_out: list[str]) -> None:
    """Puts the fields beside role and content into the message; those that are unknown last. Changes `others`."""
    message["content"], thoughts = _content(message["content"], where, left_out)
    others = {key: one for key, one in others.items() if one not in (None, "", [], {})}
    if message["role"] == "assistant":
        for key in ("tool_calls", "function_call"):
            if "tool_calls" not in message and key in others:
                message["tool_calls"] = read_calls(others.pop(key), where)
    kept = {key: others.pop(key) for key in _KEPT if isinstance(others.get(key), str)}
    for key in THOUGHTS:
        if not thoughts and isinstance(others.get(key), str):
            thoughts = others.pop(key)
    if thoughts.strip():
        kept[THOUGHTS[0]] = thoughts
    if message["role"] != "assistant":
        _drop_flags(others)
    elif (weight := _weight(others, where)) is not None:
        kept["weight"] = weight
    for key, one in others.items():
        check_nested(one, f"{where}: {key}")
    for key, one in kept.items():
        check_text(str(one), f"{where}: {key}")
    message.update(kept | {key: one for key, one in others.items() if key not in message and isinstance(key, str)})


def _weight(others: dict[str, Any], where: str) -> int | None:
    """1 where the turn is learned, 0 where not, None where the row does not say. Takes the flags out of `others`."""
    found: dict[str, bool] = {}
    for name in (*_LEARNED, *_NOT_LEARNED):
        if name not in others:
            continue
        truth = _TRUTH.get(str(others[name]).lower().removesuffix(".0"))
        if truth is not None:
            del others[name]
            found[name] = truth == (name in _LEARNED)
        elif "weight" in name:
            raise ValueError(f"{where}: {name} {others[name]!r} must be 0 (not learned) or 1")
    if len(set(found.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(found)} disagree on whether the turn is learned; keep one of them")
    return int(next(iter(found.values()))) if found else None


def _drop_flags(others: dict[str, Any]) -> None:
    """What a turn says that is never learned anyway is no news, unless it asks to be learned."""
    for name in (*_LEARNED, *_NOT_LEARNED):
        truth = _TRUTH.get(str(others.get(name)).lower().removesuffix(".0"))
        if truth is not None and truth != (name in _LEARNED):
            del others[name]


def _content(value: Any, where: str, left_out: list[str]) -> tuple[str, str]:
    """(text, thoughts) of text or a list of parts."""
    if isinstance(value, (list, tuple)):
        read = [_part(part, where, left_out) for part in value]
        return "".join(text for text, _ in read), "\n".join(thought for _, thought in read if thought)
    if not isinstance(value, str):
        raise ValueError(f"{where}: content is {type(value).__name__}; write it as text")
    check_text(value, f"{where}: content")
    return value, ""


def _part(part: Any, where: str, left_out: list[str]) -> tuple[str, str]:
    if isinstance(part, str):
        return _content(part, where, left_out)
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    thinks = kind in THOUGHTS
    held = _held(part, *(THOUGHTS if thinks else ()), "text", "value") if thinks or kind in _TEXT_PARTS else None
    if held is None:
        raise ValueError(f"{where}: a content part of type {kind}; only text parts can be learned")
    left_out += [f"messages[].content[].{key}" for key, one in part.items() if key not in ("type", held) and one]
    text, _ = _content(part[held], where, left_out)
    return ("", text) if thinks else (text, "")


def _join(message: dict[str, Any], more: Mapping[str, Any]) -> None:
    """A turn of calls becomes part of the assistant's turn before it."""
    calls = [*message.get("tool_calls", ()), *more["tool_calls"]]
    message.update({key: value for key, value in more.items() if key not in message} | {"tool_calls": calls})

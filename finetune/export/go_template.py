"""A chat template as Ollama's own templates are written (Go's text/template), where that says the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from finetune.data.rows import Message
from finetune.export.prompt import PROBES

Write = Callable[[Sequence[Message]], str]  # what the chat template writes. Raises ValueError where it refuses
_SYSTEM, _FIRST, _ANSWER, _SECOND = "Qsystemq", "Qfirstq", "Qanswerq", "Qsecondq"


@dataclass(frozen=True)
class GoTemplate:
    """A prompt in pieces: what stands before, between and after the texts of a conversation."""

    begin: str  # before the first question
    system: tuple[str, str] | None  # before and after a system text, instead of `begin`; None: it is not written
    answer: tuple[str, str] | None  # before and after an answer; None: the last question alone is written
    end: str  # after the last question

    def write(self, messages: Sequence[Message]) -> str:
        """What `text` makes of a conversation that ends with the user."""
        told = [message["content"] for message in messages if message["role"] == "system"]
        text = self.begin
        if told and self.system:
            text = self.system[0] + "\n\n".join(told) + self.system[1]
        if self.answer is None:
            return str(text + messages[-1]["content"] + self.end)
        turns = [message for message in messages if message["role"] != "system"]
        for message, after in zip(turns, [*turns[1:], None], strict=True):
            if message["role"] == "user":
                text += message["content"] + (self.answer[0] if after else self.end)
            else:
                text += message["content"] + self.answer[1]
        return text

    @property
    def text(self) -> str:
        """For `TEMPLATE`. Never three quotes in a row: those within a text are escaped."""
        begin = _said(self.begin)
        if self.system:
            before, after = map(_said, self.system)
            told = f"{before}{{{{ .System }}}}{after}"
            begin = f"{{{{ if .System }}}}{told}{{{{ else }}}}{begin}{{{{ end }}}}"
        last = "eq (len (slice $.Messages $i)) 1"
        if self.answer is None:
            turns = f'{{{{ if and ({last}) (eq $m.Role "user") }}}}{{{{ $m.Content }}}}{_said(self.end)}{{{{ end }}}}'
        else:
            turns = (
                f'{{{{ if eq $m.Role "user" }}}}{{{{ $m.Content }}}}{{{{ if {last} }}}}{_said(self.end)}{{{{ else }}}}'
                f'{_said(self.answer[0])}{{{{ end }}}}{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}'
                f"{_said(self.answer[1])}{{{{ end }}}}"
            )
        return f"{begin}{{{{ range $i, $m := .Messages }}}}{turns}{{{{ end }}}}"


def go_template(write: Write, begin: str, rows: Iterable[Sequence[Message]]) -> GoTemplate | None:
    """The same prompt for Ollama; None where no such template writes all rows and probes as `write` does.

    begin: what the tokenizer puts before a text by itself, and so the template must not. Probes may differ in the white
    space at the ends of a text, which Go's templates cannot take away.
    """
    found = _pieces(write)
    if found is None:
        return None
    expected = [(messages, text) for messages in (*PROBES, *rows) if (text := _written(write, messages)) is not None]
    for messages, text in expected:
        if found.write(messages) != text and not (messages in PROBES and _spaced(messages)):
            return None
    before = found.system and (found.system[0].removeprefix(begin), found.system[1])
    return GoTemplate(found.begin.removeprefix(begin), before, found.answer, found.end)


def _pieces(write: Write) -> GoTemplate | None:
    question, turns = _message("user", _FIRST), [_message("assistant", _ANSWER), _message("user", _SECOND)]
    alone = _cut(_written(write, [question]), _FIRST)
    if alone is None:
        return None
    begin, end = alone
    several = _cut(_written(write, [question, *turns]), _FIRST, _ANSWER, _SECOND)
    answer = (several[1], several[2]) if several else None
    led = _cut(_written(write, [_message("system", _SYSTEM), question]), _SYSTEM, _FIRST)
    return GoTemplate(begin, (led[0], led[1]) if led else None, answer, end)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _written(write: Write, messages: Sequence[Message]) -> str | None:
    try:
        return write(messages)
    except ValueError:
        return None


def _cut(text: str | None, *marks: str) -> list[str] | None:
    """The text cut at these marks; None where one of them is not in it once, in this order."""
    pieces = []
    for mark in marks:
        if text is None or text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, str(text)]


def _spaced(messages: Sequence[Message]) -> bool:
    return any(message["content"] != message["content"].strip() for message in messages)


def _said(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

"""Prompts written by a chat template, and the assistant's turns found in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from finetune.data.column_template import LossOn, Pieces, fill_answer
from finetune.data.rows import Record, Rendered, Span
from finetune.data.template_sandbox import Conversation, render_all
from finetune.data.tokenizer import Tokenizer, end_of_turn, special_texts

# For models without a chat template, on request.
PLAIN_CHAT = (
    "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'Assistant: ' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ (eos_token or '') + '\n' }}"
    "{% elif message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Some templates write today's date unless they are given one; a run must not change at midnight.
DATE = "26 Jul 2024"
TOGETHER, CHARACTERS = 256, 2**22  # conversations whose texts are held at a time, and characters of those texts

Prefixes = list[tuple[int, bool]]  # (how many messages, with the prompt for an answer after them)


class Rewritten(Exception):
    """The template writes an earlier turn in another way once more turns follow."""


class ChatRenderer:
    """A chat template over the messages; rows of other formats become one user and one assistant message."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        template: str | None = None,
        system: str | None = None,
        form: Pieces = (("", "completion"),),
        loss_on: LossOn = "completion",
        end_token: bool = True,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self.system = system
        self.form = form
        self.loss_on = loss_on
        self.end_token = end_token
        self.specials = tuple(filter(None, special_texts(tokenizer)))

    def render(self, record: Record) -> list[Rendered]:
        texts = self.render_all([record])[0]
        if isinstance(texts, ValueError):
            raise texts
        return texts

    def render_all(self, records: Sequence[Record]) -> list[list[Rendered] | ValueError]:
        whole = [self._until_last_answer(self._with_system(self._as_messages(record))) for record in records]
        texts = self._apply(whole, [self._prefixes(record) for record in whole])
        return [self._rendered(*row) for row in zip(whole, texts, strict=True)]

    def _until_last_answer(self, record: Record) -> Record:
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        if last + 1 == len(record.messages):
            return record
        return dataclasses.replace(record, messages=record.messages[: last + 1])

    def _rendered(self, record: Record, texts: list[str] | ValueError) -> list[Rendered] | ValueError:
        if isinstance(texts, ValueError):
            return texts
        try:
            return [self._find_turns(record, texts)]
        except Rewritten:
            return self._unrolled(record)

    def _unrolled(self, record: Record) -> list[Rendered] | ValueError:
        """A row for each answer, of a conversation whose earlier answers are written otherwise than its last."""
        turns = self._supervised(record)
        if turns == [len(record.messages) - 1]:
            return ValueError(
                "the chat template does not begin a finished conversation with the prompt it writes for the answer, "
                "so where the answer begins cannot be known; set prompt.template to plain"
            )
        parts = [dataclasses.replace(record, messages=record.messages[: turn + 1], last_only=True) for turn in turns]
        rows: list[Rendered] = []
        for part, texts in zip(parts, self._apply(parts, [self._prefixes(part) for part in parts]), strict=True):
            if isinstance(texts, ValueError):
                return texts
            rows.append(self._find_turns(part, texts))
        return rows

    def _as_messages(self, record: Record) -> Record:
        if record.messages:
            return record
        values = record.values
        asked = values.get("instruction") or values.get("prompt") or values.get("text") or ""
        if values.get("instruction") and values.get("input"):
            asked = f"{asked}\n\n{values['input']}"
        user = {"role": "user", "content": asked}
        answer = {"role": "assistant", "content": fill_answer(self.form, record.answer or "")}
        return dataclasses.replace(record, messages=(user, answer))

    def _with_system(self, record: Record) -> Record:
        if self.system is None or record.messages[0]["role"] == "system":
            return record
        return dataclasses.replace(record, messages=({"role": "system", "content": self.system}, *record.messages))

    def _supervised(self, record: Record) -> list[int]:
        """Indices of the assistant turns that are learned."""
        messages = record.messages
        if record.last_only or self.loss_on == "last":
            turns = [len(messages) - 1]
        else:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [i for i in turns if messages[i].get("weight", 1)]

    def _turns(self, record: Record) -> list[int]:
        """Indices of the assistant turns that are to be found in the text: the learned ones, and the last."""
        return sorted({*([] if self.loss_on == "all" else self._supervised(record)), len(record.messages) - 1})

    def _prefixes(self, record: Record) -> Prefixes:
        """What is rendered of it: for each turn the prompt before it, and the text up to its end."""
        return [prefix for turn in self._turns(record) for prefix in ((turn, True), (turn + 1, False))]

    def _find_turns(self, record: Record, texts: Sequence[str]) -> Rendered:
        """texts: of `_prefixes`. Raises Rewritten where a turn cannot be found in the whole text."""
        last, turns, whole = len(record.messages) - 1, self._turns(record), texts[-1]
        spans = {
            turn: self._turn(whole, before, until)
            for turn, before, until in zip(turns, texts[::2], texts[1::2], strict=True)
        }
        start, content_end, end = spans[last]
        text = whole[: end if self.end_token else content_end]
        learned = [] if self.loss_on == "all" else self._supervised(record)
        supervised: tuple[Span, ...] = ((0, len(text)),)
        if self.loss_on != "all":
            supervised = tuple((spans[turn][0], spans[turn][2 if self.end_token else 1]) for turn in learned)
        closed = content_end < end or not self.end_token or (self.loss_on != "all" and last not in learned)
        return Rendered(record, text, supervised, (start, content_end), closed)

    def _turn(self, whole: str, before: str, until: str) -> tuple[int, int, int]:
        """Where an assistant turn begins, where its words end, and where its end token does.

        What a template writes after the end token (Phi-3: EOS after the last turn) belongs to no turn.
        """
        start = len(before)
        end = max(start, len(until.rstrip()))
        if self.end and until.endswith(self.end, start, end):
            content_end = end - len(self.end)
        elif self.end and (at := until.find(self.end, self._tail(until, start))) >= 0:
            content_end, end = at, at + len(self.end)
        else:
            content_end = end - self._special_before(until, start, end)
        if not whole.startswith(before) or not whole.startswith(until[:end]) or end <= start:
            raise Rewritten
        return start, content_end, end

    @cached_property
    def end(self) -> str | None:
        """The end token of a turn as it is written, where the template has one."""
        token = self.tokenizer.eos_token_id if self.template else end_of_turn(self.tokenizer)
        return None if token is None else str(self.tokenizer.convert_ids_to_tokens(token))

    def _tail(self, text: str, start: int) -> int:
        """From where on there is nothing but special tokens and white space."""
        end = len(text)
        while end > start:
            length = 1 if text[end - 1].isspace() else self._special_before(text, start, end)
            if not length:
                break
            end -= length
        return end

    def _special_before(self, text: str, start: int, end: int) -> int:
        """The length of the special token that ends at `end`; 0 for none."""
        if not text.endswith(self.specials, start, end):
            return 0
        return max(len(special) for special in self.specials if text.endswith(special, start, end))

    def _apply(self, records: Sequence[Record], prefixes: Sequence[Prefixes]) -> list[list[str] | ValueError]:
        """What the template writes for the prefixes of each record, or why it refuses the record."""
        written: list[list[str] | ValueError] = []
        for rows in _batches(records, prefixes):
            conversations = [
                Conversation(records[row].messages, prefixes[row], list(records[row].tools) or None) for row in rows
            ]
            written += render_all(self.tokenizer, conversations, template=self.template, values={"date_string": DATE})
        return [_refusal(texts) if isinstance(texts, ValueError) else texts for texts in written]

    def question(self, record: Record) -> str:
        record = self._with_system(record if record.messages else self._question_record(record))
        texts = self._apply([record], [[(len(record.messages), True)]])[0]
        if isinstance(texts, ValueError):
            raise texts
        return texts[0]

    def _question_record(self, record: Record) -> Record:
        record = self._as_messages(record)
        return dataclasses.replace(record, messages=record.messages[:-1])

    def with_answer(self, record: Record, answer: str) -> Record:
        message = {**record.messages[-1], "content": fill_answer(self.form, answer)}
        return dataclasses.replace(record, answer=answer, messages=(*record.messages[:-1], message))

    def parts(self, record: Record) -> Mapping[str, str]:
        spoken = {str(i): one["content"] for i, one in enumerate(record.messages) if one["role"] != "assistant"}
        return {name: text for name, text in spoken.items() if text}

    def shorten(self, record: Record, part: str, text: str) -> Record:
        messages: list[Mapping[str, Any]] = list(record.messages)
        messages[int(part)] = {**messages[int(part)], "content": text}
        return dataclasses.replace(record, messages=tuple(messages))

    def drop_turns(self, record: Record, share: float) -> Record | None:
        head = 1 if record.messages[0]["role"] == "system" else 0
        body = record.messages[head:]
        cuts = [i for i, message in enumerate(body) if message["role"] == "user" and i > 0]
        if not cuts:
            return None
        before = [0, *accumulate(len(message["content"]) for message in body)]
        cut = max((i for i in cuts if before[i] <= share * before[-1]), default=cuts[0])
        return dataclasses.replace(record, messages=record.messages[:head] + body[cut:])


def _batches(records: Sequence[Record], prefixes: Sequence[Prefixes]) -> Iterator[range]:
    """The records in order, so many at a time that memory stays small."""
    start = characters = 0
    for row, record in enumerate(records):
        size = sum(len(message["content"]) for message in record.messages) * len(prefixes[row])
        if row > start and (characters + size > CHARACTERS or row - start == TOGETHER):
            yield range(start, row)
            start, characters = row, 0
        characters += size
    if records:
        yield range(start, len(records))


def _refusal(error: ValueError) -> ValueError:
    return ValueError(f"the chat template refuses this conversation ({error}); change the turns")

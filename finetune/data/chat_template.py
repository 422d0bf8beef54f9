"""Prompts rendered by a chat template, and the assistant's turns found in them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import Any

from finetune.data.assistant_turns import Rewritten, TurnFinder, with_thought
from finetune.data.calls import with_short_ids
from finetune.data.column_template import LossOn, Pieces, fill_answer
from finetune.data.conversation import Conversation, batches
from finetune.data.formats import OPTIONAL, QUESTION, REQUIRED, Format
from finetune.data.messages import THOUGHTS
from finetune.data.rows import Message, Record, Rendered, Span
from finetune.data.template_clock import clock_values, reads_clock
from finetune.data.template_sandbox import render_all
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

Prefixes = list[tuple[int, bool]]  # (how many messages, with the prompt for an answer after them)


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
        layout: Format = "chat",
        clock: datetime | None = None,
    ) -> None:
        """layout: of the rows. clock: the time that the template may write."""
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self.system = system
        self.form = form
        self.loss_on = loss_on
        self.end_token = end_token
        self.question_part = QUESTION.get(layout, "")
        parts = (*REQUIRED[layout], *OPTIONAL.get(layout, ()))
        self.reads: Collection[str] = frozenset((*parts, *REQUIRED["prompt"]) if layout == "chat" else parts)
        self.source = str(template or tokenizer.chat_template)
        self.clock = clock if reads_clock(self.source) else None
        named = (name for name in THOUGHTS if re.search(rf"[.'\"]{name}\b", self.source))
        self.thoughts = next(named, THOUGHTS[0])  # the name under which the template reads them

    def render(self, record: Record) -> list[Rendered]:
        texts = self.render_all([record])[0]
        if isinstance(texts, ValueError):
            raise texts
        return texts

    def render_all(self, records: Sequence[Record]) -> list[list[Rendered] | ValueError]:
        whole = [self._until_last_answer(self._with_system(self.as_messages(record))) for record in records]
        texts = self._apply(whole, [self._prefixes(record) for record in whole])
        self._rename_ids(whole, texts)
        return [self._rendered(*row) for row in zip(whole, texts, strict=True)]

    def _rename_ids(self, records: list[Record], texts: list[Sequence[str] | ValueError]) -> None:
        """Tries the refused ones again with other ids of their calls. Changes both lists where the template takes them.

        Some templates take only ids of nine letters or digits, and what an id says means nothing.
        """
        refused = [row for row, written in enumerate(texts) if isinstance(written, ValueError)]
        renamed = {row: with_short_ids(records[row].messages) for row in refused}
        again = {row: dataclasses.replace(records[row], messages=new) for row, new in renamed.items() if new}
        written = self._apply(list(again.values()), [self._prefixes(record) for record in again.values()])
        for (row, record), new in zip(again.items(), written, strict=True):
            if not isinstance(new, ValueError):
                records[row], texts[row] = record, new

    def _until_last_answer(self, record: Record) -> Record:
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        if last + 1 == len(record.messages):
            return record
        return dataclasses.replace(record, messages=record.messages[: last + 1])

    def _rendered(self, record: Record, texts: Sequence[str] | ValueError) -> list[Rendered] | ValueError:
        if isinstance(texts, ValueError):
            return texts
        try:
            return [self._find_turns(record, texts)]
        except Rewritten:
            return self._unrolled(record)

    def _unrolled(self, record: Record) -> list[Rendered] | ValueError:
        """A row for each answer, of a conversation whose earlier answers are written otherwise than its last."""
        turns = self._supervised(record) or [len(record.messages) - 1]
        parts = [dataclasses.replace(record, messages=record.messages[: turn + 1], last_only=True) for turn in turns]
        rows: list[Rendered] = []
        for part, texts in zip(parts, self._apply(parts, [self._prefixes(part) for part in parts]), strict=True):
            if isinstance(texts, ValueError):
                return texts
            try:
                rows.append(self._find_turns(part, texts))
            except Rewritten:
                return _UNKNOWN
        return rows

    def as_messages(self, record: Record) -> Record:
        if record.messages:
            return record
        values = record.values
        asked = values.get(self.question_part, "")
        if self.question_part == "instruction" and values.get("input"):
            asked = f"{asked}\n\n{values['input']}"
        system = [{"role": "system", "content": record.system}] if record.system else []
        earlier: list[Message] = []
        for question, answer in record.history:
            earlier += [{"role": "user", "content": question}]
            earlier += [{"role": "assistant", "content": fill_answer(self.form, answer), "weight": 0}]
        user = {"role": "user", "content": asked}
        answered = {"role": "assistant", "content": fill_answer(self.form, record.answer or "")}
        return dataclasses.replace(record, messages=(*system, *earlier, user, answered))

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
        if turns == [last]:
            whole = with_thought(texts[0], whole, record.messages[last])
        spans: dict[int, tuple[int, int, int]] = {}
        for number, turn in enumerate(turns):
            until = whole if turn == last else texts[2 * number + 1]
            spans[turn] = self.finder.find(whole, texts[2 * number], until)
        start, content_end, end = spans[last]
        text = whole[: end if self.end_token else content_end]
        learned = [] if self.loss_on == "all" else self._supervised(record)
        supervised: tuple[Span, ...] = ((0, len(text)),)
        if self.loss_on != "all":
            supervised = tuple((spans[turn][0], spans[turn][2 if self.end_token else 1]) for turn in learned)
        closed = content_end < end or not self.end_token or (self.loss_on != "all" and last not in learned)
        return Rendered(record, text, supervised, (start, content_end), closed)

    @cached_property
    def finder(self) -> TurnFinder:
        token = self.tokenizer.eos_token_id if self.template else end_of_turn(self.tokenizer)
        end = None if token is None else str(self.tokenizer.convert_ids_to_tokens(token))
        return TurnFinder(end, tuple(filter(None, special_texts(self.tokenizer))))

    def _apply(self, records: Sequence[Record], prefixes: Sequence[Prefixes]) -> list[Sequence[str] | ValueError]:
        """What the template writes for the prefixes of each record, or why it refuses the record."""
        written: list[Sequence[str] | ValueError] = []
        sizes = [
            sum(len(message["content"]) for message in record.messages) * len(prefixes[row])
            for row, record in enumerate(records)
        ]
        for rows in batches(sizes):
            conversations = [
                Conversation(self.as_rendered(records[row].messages), prefixes[row], list(records[row].tools) or None)
                for row in rows
            ]
            values = clock_values(self.clock)
            written += render_all(self.tokenizer, conversations, template=self.template, values=values)
        return [_refusal(texts) if isinstance(texts, ValueError) else texts for texts in written]

    def as_rendered(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with their thoughts under the name that the template reads."""
        if self.thoughts == THOUGHTS[0] or not any(THOUGHTS[0] in message for message in messages):
            return messages
        return [
            {self.thoughts if key == THOUGHTS[0] else key: value for key, value in message.items()}
            for message in messages
        ]

    def question(self, record: Record) -> str:
        record = self._with_system(record if record.messages else self._question_record(record))
        texts = self._apply([record], [[(len(record.messages), True)]])[0]
        if isinstance(texts, ValueError):
            raise texts
        return texts[0]

    def _question_record(self, record: Record) -> Record:
        record = self.as_messages(record)
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


_UNKNOWN = ValueError(
    "the chat template does not begin a finished conversation with the prompt it writes for the answer, "
    "so where the answer begins cannot be known; set prompt.template to plain"
)


def _refusal(error: ValueError) -> ValueError:
    return ValueError(f"the chat template refuses this conversation ({error}); change the turns")

"""The run's prompt as one chat template, and the parts that a template cannot carry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from finetune.data.chat_template import ChatRenderer
from finetune.data.column_template import Pieces, TemplateRenderer, fill
from finetune.data.conversation import Conversation, template_text
from finetune.data.prompt_parts import Always, asked_part
from finetune.data.rows import Message, Prepared, Record
from finetune.data.template_clock import clock_names, clock_values
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import Tokenizer, begin_tokens, encode, encode_prompt

_LONG = 120  # characters of the comment: Ollama takes a template for a known one where 100 edits make it that
_LAST_USER = (
    '{%- set told = namespace(last=-1) -%}{%- for message in messages -%}{%- if message["role"] == "user" -%}'
    "{%- set told.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
# Of a row: where it stands, the conversation that asks it, its tools, and the run's own prompt.
Asked = tuple[str, Sequence[Message], tuple[Any, ...], str]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run: as its own code writes them, and as one chat template."""

    prepared: Prepared
    always: Always  # what every training row had beside its question

    @cached_property
    def renderer(self) -> ChatRenderer | TemplateRenderer:
        assert isinstance(self.prepared.renderer, ChatRenderer | TemplateRenderer)
        return self.prepared.renderer

    def template(self, tokenizer: Tokenizer, run: str) -> tuple[str, list[str]]:
        """What writes the same for a conversation; and what it cannot carry, or carries in a way of its own."""
        words = f"The prompt of the fine-tuned model of {run}: written by finetune from those of its training."
        comment = "{# " + words.replace("#}", "").ljust(_LONG, ".") + " #}"
        body, notes = self._conversation(tokenizer) if isinstance(self.renderer, ChatRenderer) else self._columns()
        own = {"a system text": self.always.get("system", "") is None, "tools": "tools" in self.always}
        notes += [f"every training row had {name}: give the same with each question" for name in own if own[name]]
        trial = prompt_of(tokenizer, PROBES[0], template=comment + body)
        lacks_begin = next(encode(tokenizer, [trial])).tokens != encode_prompt(tokenizer, trial)
        lead = "{{ " + _text(tokenizer.decode(begin_tokens(tokenizer))) + " }}" if lacks_begin else ""
        return comment + lead + body, notes

    def asked(self, messages: Sequence[Message], tools: tuple[Any, ...] = ()) -> str:
        """The run's own prompt for a conversation that ends with the user. Raises ValueError where it refuses."""
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        if isinstance(self.renderer, ChatRenderer):
            return self.renderer.question(Record("question", messages=tuple(messages), tools=tools))
        values = {asked_part(self.renderer, self.prepared.format): messages[-1]["content"]}
        if not self._leads:
            return self.renderer.question(Record("question", values=values))
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = [message["content"] for message in messages[bool(system) : -1]]
        history = tuple(zip(turns[::2], turns[1::2], strict=True))
        return self.renderer.question(Record("question", values=values, system=system, history=history))

    def rows(self, records: Sequence[Record] | None = None) -> Iterator[Asked]:
        """Of these records, or else of the held-out ones."""
        for record in self.prepared.held_out.records if records is None else records:
            if isinstance(self.renderer, ChatRenderer):
                whole = self.renderer.as_messages(record).messages
                last = max(i for i, message in enumerate(whole) if message["role"] == "assistant")
                try:
                    text = self.asked(whole[:last], record.tools)
                except ValueError:  # the template refuses it: no such row was trained on
                    continue
                yield record.location, self.renderer.as_rendered(whole[:last]), record.tools, text
            elif self.prepared.format != "text":
                asked = replace(record, system=record.system or self._system or "")
                yield record.location, self._as_conversation(record), (), self.renderer.question(asked)

    def _conversation(self, tokenizer: Tokenizer) -> tuple[str, list[str]]:
        """The chat template of the run, with the date and the system text that the run gave it."""
        renderer, notes = self.renderer, list[str]()
        assert isinstance(renderer, ChatRenderer)
        source = template_text(tokenizer, renderer.template, False, "the chat template")
        if isinstance(tokenizer.chat_template, dict) and renderer.template is None:
            notes.append("the model has several chat templates, and the one called default is written")
        dated, _ = clock_names(clock_values(renderer.clock), source)
        sets = {name: json.dumps(value) for name, value in dated.items() if re.search(rf"\b{name}\b", source)}
        if clock := renderer.clock:
            call = r"\bstrftime_now\(\s*(['\"])(.*?)\1\s*\)"
            source = re.sub(call, lambda match: json.dumps(clock.strftime(match[2])), source)
            source = re.sub(r"\bstrftime_now\s+is\s+defined\b", "true", source)
        if re.search(r"\bstrftime_now\s*\(", source):
            notes.append("the chat template writes the date of the day on which it is used")
        head = self._led + "".join(f"{{%- set {name} = {value} -%}}" for name, value in sets.items())
        # A variable's tag comes last: after any other, white space at the template's beginning would be lost.
        return head + '{{ "" }}' + re.sub(r"^[ \t]+(?=\{[%#])", "", source), notes

    @property
    def _leads(self) -> bool:
        """Of a template over columns: whether a system text and earlier turns stand before the question."""
        return bool(getattr(self.renderer, "leads", False)) and self.prepared.format in ("prompt", "alpaca")

    @property
    def _system(self) -> str | None:
        """What stands where a conversation has no system text: that of all training rows, or of the recipe."""
        if isinstance(self.renderer, ChatRenderer):
            return self.always.get("system") or self.renderer.system
        return self.always.get("system") if self._leads else None

    @property
    def _led(self) -> str:
        """What gives it to a template."""
        if self._system is None:
            return ""
        led, first = _text({"role": "system", "content": self._system}), 'messages and messages[0]["role"] == "system"'
        return f"{{%- set messages = messages if {first} else [{led}] + messages -%}}"

    @cached_property
    def _parts(self) -> tuple[Pieces, str, str]:
        """The template over columns, with those that hold the same text in every training row written out; and what
        stands before the first column that is left, and after the last one.
        """
        assert isinstance(self.renderer, TemplateRenderer)
        asked, pieces, literal = asked_part(self.renderer, self.prepared.format), list[tuple[str, str | None]](), ""
        for text, name in self.renderer.pieces:
            constant = self.always.get(name) if name and name != asked else None
            literal += text + (constant or "")
            if name and constant is None:
                pieces.append((literal, name))
                literal = ""
        return (*pieces, (literal, None)), pieces[0][0], literal

    def _columns(self) -> tuple[str, list[str]]:
        """The last message of the user, between the texts that stand before and after it."""
        (pieces, before, after), notes, earlier = self._parts, list[str](), ""
        names = [name for _, name in pieces if name]
        if len(names) > 1:
            shown = fill(pieces, {name: f"{{{name}}}" for name in names})
            notes.append(f"a message holds all of the prompt's columns, written as {_text(self._inside(shown))}")
        if self._leads:
            asked = f'({_text(before)} + message["content"] + {_text(after)}).rstrip() + "\\n"'
            earlier = (
                f'{{%- elif message["role"] == "user" -%}}{{{{- {asked} -}}}}'
                '{%- else -%}{{- message["content"] + "\\n\\n" -}}'
            )  # fmt: skip
        else:
            notes.append("the prompts of this run are single questions: of a conversation the last one is written")
        loop = (
            f"{{%- for message in messages -%}}{{%- if loop.index0 == told.last -%}}{self._turn()}"
            f"{{%- elif loop.index0 > told.last -%}}{self._answer()}{earlier}{{%- endif -%}}{{%- endfor -%}}"
        )
        return self._led + _LAST_USER + loop, notes

    def _turn(self) -> str:
        """The question as `TemplateRenderer.question` writes it: spaces at its end go to the answer, lines stay."""
        _, before, after = self._parts
        bare, start = after.rstrip(), f'{_text(before)} + message["content"]'
        lines = after[len(bare) : after.rfind("\n") + 1]
        if bare:
            return f"{{{{- {start} + {_text(bare + lines)} -}}}}"
        if self.prepared.format == "classification":
            return f"{{{{- ({start}).rstrip() + {_text(lines)} -}}}}"
        return (
            f"{{%- set text = {start} + {_text(after)} -%}}{{%- set bare = text.rstrip() -%}}{{{{- bare -}}}}"
            '{%- for line in text[bare|length:].split("\\n")[:-1] -%}{{- line + "\\n" -}}{%- endfor -%}'
        )

    def _answer(self) -> str:
        assert isinstance(self.renderer, TemplateRenderer)
        after, ((before, _), *rest) = self._parts[2], self.renderer.form
        space, end = after[len(after.rstrip()) :], "" if self.renderer.closed else " + eos_token"
        lead = _text(space[space.rfind("\n") + 1 :] + before)
        return f'{{{{- {lead} + message["content"] + {_text("".join(text for text, _ in rest))}{end} -}}}}'

    def _inside(self, text: str) -> str:
        _, before, after = self._parts
        return text[len(before) : len(text) - len(after)]

    def _as_conversation(self, record: Record) -> list[Message]:
        assert isinstance(self.renderer, TemplateRenderer)
        short = self.renderer.short if not record.values.get("input") else None
        texts = [("system", record.system)] if record.system else []
        for question, answer in record.history:
            texts += [("user", question), ("assistant", answer)]
        texts.append(("user", self._inside(fill(short or self._parts[0], record.values))))
        return [{"role": role, "content": text} for role, text in texts]


def prompt_of(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] = (), template: str | None = None
) -> str:
    """What a chat template writes for an answer to them, or the tokenizer's own. Raises ValueError where it refuses."""
    return render(tokenizer, Conversation(messages, [(len(messages), True)], list(tools) or None), template=template)[0]


def _text(value: str | Mapping[str, str]) -> str:
    """As a template writes it."""
    return json.dumps(value, ensure_ascii=False)


PROBES: tuple[tuple[Message, ...], ...] = tuple(
    tuple({"role": role, "content": content} for role, content in turns)
    for turns in (
        (("user", "What is this?"),),
        (("user", "  spaces before, a line after\n"),),
        (("system", "Be brief."), ("user", "What is this?")),
        (("user", "One."), ("assistant", "Two."), ("user", "Three?")),
        (("system", "Be brief."), ("user", "One."), ("assistant", "Two."), ("user", "Three?")),
        (("user", "Quotes \" and ' and {braces} {{ twice }} {% so %}, é 漢字 🙂"),),
        (("user", "First line.\n\nSecond line.\tA tab."),),
    )
)

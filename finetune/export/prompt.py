"""The run's prompt as one chat template, for programs that know nothing of the run; and what it cannot carry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data.beside import asked_part
from finetune.data.chat_template import ChatRenderer
from finetune.data.clock import clock_names, clock_values
from finetune.data.column_template import Pieces, TemplateRenderer, fill
from finetune.data.conversation import Conversation, template_text
from finetune.data.formats import QUESTION
from finetune.data.rows import Message, Record, Renderer
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import Tokenizer, begin_tokens, encode, encode_prompt

_LONG = 120  # characters of the comment: Ollama takes a template for a known one where 100 edits make it that
_LAST_USER = (
    '{%- set told = namespace(last=-1) -%}{%- for message in messages -%}{%- if message["role"] == "user" -%}'
    "{%- set told.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)


def travelling_template(
    renderer: Renderer, layout: str, tokenizer: Tokenizer, always: Mapping[str, str | None], run: str
) -> tuple[str, list[str]]:
    """The template that writes for a conversation what the run's own prompts are; and what it cannot carry, or carries
    in a way of its own.

    always: what every training row had beside its question, and its text where that is the same in all of them.
    """
    words = f"The prompt of the fine-tuned model of {run}: written by finetune from the prompts that it was trained on."
    comment = "{# " + words.replace("#}", "").ljust(_LONG, ".") + " #}"
    if isinstance(renderer, ChatRenderer):
        body, notes = _conversation(renderer, tokenizer)
    elif isinstance(renderer, TemplateRenderer):
        body, notes = _columns(renderer, layout, tokenizer, always)
    else:
        raise TypeError(f"{type(renderer).__name__} has no template")
    begin = tokenizer.decode(begin_tokens(tokenizer))
    trial = prompt_of(tokenizer, PROBES[0], template=comment + body)
    lacks_begin = next(encode(tokenizer, [trial])).tokens != encode_prompt(tokenizer, trial)
    lead = "{{ " + json.dumps(begin, ensure_ascii=False) + " }}" if lacks_begin else ""
    return comment + lead + body, notes


def prompt_of(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] = (), template: str | None = None
) -> str:
    """What a chat template writes for an answer to these messages; the tokenizer's own where none is given.

    Raises ValueError where it refuses them.
    """
    return render(tokenizer, Conversation(messages, [(len(messages), True)], list(tools) or None), template=template)[0]


def _conversation(renderer: ChatRenderer, tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """The chat template of the run, with the date and the system text that the run gave it."""
    source = template_text(tokenizer, renderer.template, False, "the chat template")
    notes = []
    if isinstance(tokenizer.chat_template, dict) and renderer.template is None:
        notes.append("the model has several chat templates, and the one called default is written")
    dated, _ = clock_names(clock_values(renderer.clock), source)
    sets = {name: json.dumps(value) for name, value in dated.items() if re.search(rf"\b{name}\b", source)}
    if renderer.clock is not None:
        clock = renderer.clock
        source = re.sub(
            r"\bstrftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: json.dumps(clock.strftime(call[2])), source
        )
        source = re.sub(r"\bstrftime_now\s+is\s+defined\b", "true", source)
    if re.search(r"\bstrftime_now\s*\(", source):
        notes.append("the chat template writes the date of the day on which it is used")
    if renderer.system is not None:
        system = json.dumps({"role": "system", "content": renderer.system}, ensure_ascii=False)
        first = 'messages and messages[0]["role"] == "system"'
        sets["messages"] = f"messages if {first} else [{system}] + messages"
    head = "".join(f"{{%- set {name} = {value} -%}}" for name, value in sets.items())
    # A variable's tag comes last: after any other, white space at the template's beginning would be lost.
    return head + '{{ "" }}' + re.sub(r"^[ \t]+(?=\{[%#])", "", source), notes


def _columns(
    renderer: TemplateRenderer, layout: str, tokenizer: Tokenizer, always: Mapping[str, str | None]
) -> tuple[str, list[str]]:
    """A template over columns: the last message of the user, between the texts that stand before and after it."""
    pieces, before, after = _with_constants(renderer, layout, always)
    notes, earlier = [], ""
    names = [name for _, name in pieces if name]
    if len(names) > 1:
        shown = fill(pieces, {name: f"{{{name}}}" for name in names})
        notes.append(f"a message holds all of the prompt's columns, written as {_text(_inside(shown, before, after))}")
    if tells_earlier(renderer, layout):
        asked = f'({_text(before)} + message["content"] + {_text(after)}).rstrip() + "\\n"'
        earlier = (
            f'{{%- elif message["role"] == "user" -%}}{{{{- {asked} -}}}}'
            '{%- else -%}{{- message["content"] + "\\n\\n" -}}'
        )  # fmt: skip
    else:
        notes.append("the prompts of this run are single questions: of a conversation the last one is written")
    loop = (
        f"{{%- for message in messages -%}}{{%- if loop.index0 == told.last -%}}{_turn(before, after, layout)}"
        f"{{%- elif loop.index0 > told.last -%}}{_answer(renderer, after)}{earlier}{{%- endif -%}}{{%- endfor -%}}"
    )
    return _LAST_USER + loop, notes


def tells_earlier(renderer: TemplateRenderer, layout: str) -> bool:
    """Whether a system text and earlier turns stand before the question."""
    return renderer.leads and layout in ("prompt", "alpaca")


def _with_constants(
    renderer: TemplateRenderer, layout: str, always: Mapping[str, str | None]
) -> tuple[Pieces, str, str]:
    """The template's pieces, with the columns that hold the same text in every training row written out; and what
    stands before the first column that is left, and after the last one.
    """
    asked, pieces, literal = asked_part(renderer, layout), list[tuple[str, str | None]](), ""
    for text, name in renderer.pieces:
        constant = always.get(name) if name and name != asked else None
        literal += text + (constant or "")
        if name and constant is None:
            pieces.append((literal, name))
            literal = ""
    return (*pieces, (literal, None)), pieces[0][0], literal


def _inside(text: str, before: str, after: str) -> str:
    return text[len(before) : len(text) - len(after)]


def _turn(before: str, after: str, layout: str) -> str:
    """The question as `TemplateRenderer.question` writes it: spaces at its end go to the answer, lines stay."""
    bare = after.rstrip()
    lines = after[len(bare) : len(bare) + after[len(bare) :].rfind("\n") + 1]
    start = f'{_text(before)} + message["content"]'
    if bare:
        return f"{{{{- {start} + {_text(bare + lines)} -}}}}"
    if layout == "classification":
        return f"{{{{- ({start}).rstrip() + {_text(lines)} -}}}}"
    return (
        f"{{%- set text = {start} + {_text(after)} -%}}{{%- set bare = text.rstrip() -%}}{{{{- bare -}}}}"
        '{%- for line in text[bare|length:].split("\\n")[:-1] -%}{{- line + "\\n" -}}{%- endfor -%}'
    )


def _answer(renderer: TemplateRenderer, after: str) -> str:
    space = after[len(after.rstrip()) :]
    (before, _), *rest = renderer.form
    end = "" if renderer.closed else " + eos_token"
    lead = _text(space[space.rfind("\n") + 1 :] + before)
    return f'{{{{- {lead} + message["content"] + {_text("".join(text for text, _ in rest))}{end} -}}}}'


def _text(text: str) -> str:
    """As a string of a template."""
    return json.dumps(text, ensure_ascii=False)


def as_the_run_asks(renderer: Renderer, layout: str, messages: Sequence[Message], tools: tuple[Any, ...] = ()) -> str:
    """What the run's own code writes for a conversation that ends with the user. Raises ValueError where it refuses."""
    if isinstance(renderer, ChatRenderer):
        return renderer.question(Record("question", messages=tuple(messages), tools=tools))
    assert isinstance(renderer, TemplateRenderer)
    values = {asked_part(renderer, layout): messages[-1]["content"]}
    if not tells_earlier(renderer, layout):
        return renderer.question(Record("question", values=values))
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = [message["content"] for message in messages[bool(system) : -1]]
    history = tuple(zip(turns[::2], turns[1::2], strict=True))
    return renderer.question(Record("question", values=values, system=system, history=history))


def asked_rows(
    renderer: Renderer, layout: str, records: Sequence[Record], always: Mapping[str, str | None]
) -> Iterator[tuple[str, list[Message], tuple[Any, ...], str]]:
    """Of each row where it stands, the conversation that asks it, the tools, and the run's own prompt for it."""
    for record in records:
        if isinstance(renderer, ChatRenderer):
            whole = renderer.as_messages(record).messages
            last = max(i for i, message in enumerate(whole) if message["role"] == "assistant")
            try:
                text = as_the_run_asks(renderer, layout, whole[:last], record.tools)
            except ValueError:  # the template refuses it: no such row was trained on
                continue
            yield record.location, [dict(message) for message in renderer.told(whole[:last])], record.tools, text
        elif isinstance(renderer, TemplateRenderer) and QUESTION.get(layout) and layout != "text":
            yield record.location, _as_conversation(renderer, layout, record, always), (), renderer.question(record)


def _as_conversation(
    renderer: TemplateRenderer, layout: str, record: Record, always: Mapping[str, str | None]
) -> list[Message]:
    pieces, before, after = _with_constants(renderer, layout, always)
    if renderer.short and not record.values.get("input"):
        pieces = renderer.short
    texts = [("system", record.system)] if record.system else []
    for question, answer in record.history:
        texts += [("user", question), ("assistant", answer)]
    texts.append(("user", _inside(fill(pieces, record.values), before, after)))
    return [{"role": role, "content": text} for role, text in texts]


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

"""What Ollama needs beside a GGUF file: its Modelfile, and the run's prompt as Ollama's own templates are written (Go's
text/template), where that says the same as the chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from finetune.data.chat_template import ChatRenderer
from finetune.data.rows import Message
from finetune.data.tokenizer import begin_tokens
from finetune.export.measure import Making
from finetune.export.prompt import PROBES, prompt_of
from finetune.text import command_line

READS_JINJA = "0.30.0"  # from this version on Ollama renders the file's own chat template with llama.cpp
_CONTEXT = 4096  # positions, at least: Ollama's own default cuts long prompts
Write = Callable[[Sequence[Message]], str]  # what the chat template writes. Raises ValueError where it refuses


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
        text = "\n\n".join(told).join(self.system) if told and self.system else self.begin
        if self.answer is None:
            return str(text + messages[-1]["content"] + self.end)
        turns = [message for message in messages if message["role"] != "system"]
        for message in turns:
            after_question = self.end if message is turns[-1] else self.answer[0]
            text += message["content"] + (after_question if message["role"] == "user" else self.answer[1])
        return text

    @property
    def text(self) -> str:
        """For `TEMPLATE`. Never three quotes in a row: those within a text are escaped."""
        begin, end, last = _said(self.begin), _said(self.end), "eq (len (slice $.Messages $i)) 1"
        if self.system:
            told = "{{ .System }}".join(map(_said, self.system))
            begin = "{{ if .System }}" + told + "{{ else }}" + begin + "{{ end }}"
        if self.answer is None:
            turn = "{{ if and (" + last + ') (eq $m.Role "user") }}{{ $m.Content }}' + end
        else:
            after_question, after_answer = map(_said, self.answer)
            end = "{{ if " + last + " }}" + end + "{{ else }}" + after_question + "{{ end }}"
            turn = '{{ if eq $m.Role "user" }}{{ $m.Content }}' + end
            turn += '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}' + after_answer
        return begin + "{{ range $i, $m := .Messages }}" + turn + "{{ end }}{{ end }}"


def go_template(write: Write, begin: str, rows: Iterable[Sequence[Message]]) -> GoTemplate | None:
    """The same prompt for Ollama; None where no such template writes all rows and probes as `write` does.

    begin: what the tokenizer puts before a text by itself, and so the template must not. Probes may differ in the white
    space at the ends of a text, which Go's templates cannot take away.
    """
    user, answer = ("user", "Qfirstq"), ("assistant", "Qanswerq")
    alone, led = _around(write, user), _around(write, ("system", "Qsystemq"), user)
    several = _around(write, user, answer, ("user", "Qsecondq"))
    if alone is None:
        return None
    answered = (several[1], several[2]) if several else None
    derived = GoTemplate(alone[0], (led[0], led[1]) if led else None, answered, alone[1])
    for messages in (*PROBES, *rows):
        spaced = messages in PROBES and any(one["content"] != one["content"].strip() for one in messages)
        with suppress(ValueError):  # what the chat template refuses is not asked
            if write(messages) != derived.write(messages) and not spaced:
                return None
    before = derived.system and (derived.system[0].removeprefix(begin), derived.system[1])
    return replace(derived, begin=derived.begin.removeprefix(begin), system=before)


def _around(write: Write, *turns: tuple[str, str]) -> list[str] | None:
    """What is written before, between and after the texts of these turns; None where they are refused, or one is not
    written once, in its place.
    """
    texts = [text for _, text in turns]
    try:
        whole = write([{"role": role, "content": text} for role, text in turns])
    except ValueError:
        return None
    return re.split("|".join(texts), whole) if re.findall("|".join(texts), whole) == texts else None


def _said(text: str) -> str:
    """As a string of Go's. Of a Modelfile Ollama drops what is not printable, also within quotes."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "{{ " + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted) + " }}" if text else ""


def template_of(making: Making) -> GoTemplate | None:
    """The run's prompt for Ollama; None: it is left to the file's own chat template."""
    tokenizer, rows = making.job.tokenizer, list(making.prompts.rows())
    if any(tools for _, _, tools, _ in rows):
        return None
    begin = tokenizer.decode(begin_tokens(tokenizer))
    write = partial(prompt_of, tokenizer, template=making.template)
    return go_template(write, begin, (messages for _, messages, _, _ in rows))


def modelfile(making: Making, file: str, template: GoTemplate | None) -> str:
    """Its text: the file, how its prompt is written, and what answers need."""
    prepared = making.job.prepared
    longest = max((len(one) for split in prepared.splits for one in split.examples), default=0)
    context = max(_CONTEXT, longest + making.job.recipe.evaluate.max_tokens)
    known = making.job.folder.text_config.get("max_position_embeddings")
    lines = [
        f"FROM ./{file}",
        f'TEMPLATE """{template.text}"""' if template else f"REQUIRES {READS_JINJA}",
        f"PARAMETER num_ctx {min(context, known) if isinstance(known, int) else context}",
    ]
    if prepared.format not in ("chat", "sharegpt"):
        lines.append("PARAMETER temperature 0")
    renderer = prepared.renderer
    if isinstance(renderer, ChatRenderer) and renderer.template is not None:  # no special token ends the user's turn
        lines.append('PARAMETER stop "\nUser:"')  # a line break: within quotes Ollama knows no escapes
    return "\n".join(lines) + "\n"


def ollama_commands(path: Path) -> list[str]:
    """What makes and runs the model; its name is that of the run, as far as Ollama takes it."""
    named = path.resolve().parent.parent if path.parent.name == "exports" else path
    model = re.sub(r"[^a-z0-9_-]+", "-", named.name.lower())[-80:].strip("-") or "model"
    made = command_line("ollama", "create", model, "-f", str(path / "Modelfile"))
    return [made, command_line("ollama", "run", model)]

"""Prompts rendered from a row's columns: plain, Alpaca, or the recipe's own template."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Literal

from finetune.data.formats import ANSWER, OPTIONAL, QUESTION
from finetune.data.rows import Record, Rendered
from finetune.errors import RecipeError

LossOn = Literal["completion", "last", "all"]
Pieces = tuple[tuple[str, str | None], ...]  # (literal text, the placeholder after it)

PLAIN = {
    "classification": "{text}\nLabel:",
    "prompt": "{prompt}",
    "alpaca": "{instruction}\n{input}\n",
    "text": "{text}",
}
ALPACA = {
    "classification": "### Instruction:\n{text}\n\n### Response:\n",
    "prompt": "### Instruction:\n{prompt}\n\n### Response:\n",
    "alpaca": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
}
# The same without the block of an empty input.
NO_INPUT = {
    PLAIN["alpaca"]: "{instruction}\n",
    ALPACA["alpaca"]: "### Instruction:\n{instruction}\n\n### Response:\n",
}


def parse_template(template: str, known: Collection[str], where: str = "prompt.template") -> Pieces:
    """Raises RecipeError for a placeholder that is not in `known`, or braces that do not pair."""
    try:
        pieces = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}; write {{{{ and }}}} for braces that stand for themselves") from None
    for _, name, spec, conversion in pieces:
        if name is not None and (name not in known or spec or conversion):
            raise RecipeError(f"{where}: unknown placeholder {{{name}}}; there are {', '.join(sorted(known))}")
    return tuple((literal, name) for literal, name, _, _ in pieces)


_FORMATTER = string.Formatter()


def placeholders(template: str) -> set[str]:
    """Every name a question may use: the template's own, which training has checked, and the formats' standard ones."""
    known = [template, *PLAIN.values(), *ALPACA.values()]
    return {name for one in known for _, name, _, _ in _FORMATTER.parse(one) if name}


def fill(pieces: Pieces, values: Mapping[str, str]) -> str:
    return "".join(literal + (values.get(name, "") if name is not None else "") for literal, name in pieces)


def answer_form(form: str | None, default: str) -> Pieces:
    """How the answer is written. Raises RecipeError unless it holds the answer once."""
    pieces = parse_template(form if form is not None else default, ("completion", "label"), "prompt.completion")
    if sum(name is not None for _, name in pieces) != 1:
        raise RecipeError("prompt.completion: must hold {completion} or {label} once, where the answer stands")
    return pieces


def fill_answer(form: Pieces, answer: str) -> str:
    return fill(form, {"completion": answer, "label": answer})


class TemplateRenderer:
    """A template over the columns, and the answer after it.

    Spaces at the prompt's end move to the answer, so that the boundary is tokenised in the same way in training and
    when the model answers; whole lines stay, and are not learned. For labels only the template's own white space
    counts: an answer must look the same after every prompt.
    """

    def __init__(
        self,
        name: str,
        template: str,
        layout: str,
        columns: Collection[str],
        completion: str | None = None,
        loss_on: LossOn = "completion",
        end_token: bool = True,
    ) -> None:
        self.name = name
        self.layout = layout
        self.source = ""
        self.clock: datetime | None = None
        self.all = loss_on == "all" or layout == "text"
        self.closed = not end_token
        self.pieces = parse_template(template, columns)
        short = NO_INPUT.get(template)
        self.short = parse_template(short, columns) if short else None
        self._check(template)
        # The ready-made ones have room for them before the question; one's own template has where it names them.
        self.leads = template in (*PLAIN.values(), *ALPACA.values())
        before = {"system", "history"}.intersection(OPTIONAL.get(layout, ()) if self.leads else ())
        self.reads: Collection[str] = frozenset(
            (*(name for _, name in self.pieces if name), ANSWER.get(layout, "text"), *before)
        )
        spaced = layout == "prompt" or template.rstrip() != template
        self.form = answer_form(completion, "{completion}" if spaced else " {completion}")
        self.form_is_own = completion is not None

    def _check(self, template: str) -> None:
        used = {name for _, name in self.pieces if name}
        if not used:
            raise RecipeError(
                f"prompt.template: {template!r} is neither auto, chat, plain nor alpaca, and has no {{column}} in it"
            )
        if ANSWER.get(self.layout) in used:
            raise RecipeError(
                f"prompt.template: {{{ANSWER[self.layout]}}} is the answer and must not stand in the prompt; "
                "prompt.completion says how it is written"
            )

    def render(self, record: Record) -> list[Rendered]:
        if self.layout == "text":
            text = fill(self.pieces, record.values)
            return [Rendered(record, text, ((0, len(text)),), None, self.closed)]
        prompt, space = self._prompt(record)
        text = prompt + space + fill_answer(self.form, record.answer or "")
        span = (len(prompt), len(text))
        return [Rendered(record, text, ((0, len(text)),) if self.all else (span,), span, self.closed)]

    def render_all(self, records: Sequence[Record]) -> list[list[Rendered] | ValueError]:
        return [self.render(record) for record in records]

    def _prompt(self, record: Record) -> tuple[str, str]:
        pieces = self.short if self.short and not record.values.get("input") else self.pieces
        whole = self._lead(record) + fill(pieces, record.values)
        prompt = whole.rstrip()
        space = whole[len(prompt) :]
        if self.layout == "classification":
            literal, last = pieces[-1]
            space = literal[len(literal.rstrip()) :] if last is None else ""
        lines = space.rfind("\n") + 1
        return prompt + space[:lines], space[lines:]

    def _lead(self, record: Record) -> str:
        """The system text and the earlier turns, before the question."""
        if not self.leads or not (record.system or record.history):
            return ""
        pieces = self.short or self.pieces
        part = QUESTION[self.layout]
        earlier = [f"{fill(pieces, {part: asked}).rstrip()}\n{answer}" for asked, answer in record.history]
        return "".join(f"{text}\n\n" for text in (record.system, *earlier) if text)

    def question(self, record: Record) -> str:
        return self._prompt(record)[0]

    def with_answer(self, record: Record, answer: str) -> Record:
        return dataclasses.replace(record, answer=answer)

    def parts(self, record: Record) -> Mapping[str, str]:
        used = {name for _, name in self.pieces if name} if self.layout != "text" else set()
        return {name: record.values[name] for name in sorted(used) if record.values.get(name)}

    def shorten(self, record: Record, part: str, text: str) -> Record:
        return dataclasses.replace(record, values={**record.values, part: text})

    def drop_turns(self, record: Record, share: float) -> Record | None:
        """Each turn counts alike here."""
        if not self.leads or not record.history:
            return None
        return dataclasses.replace(record, history=record.history[max(int(share * len(record.history)), 1) :])

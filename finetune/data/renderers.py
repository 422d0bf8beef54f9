"""Which renderer a recipe asks for, and the prompt it writes for a new question."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune.data.chat_template import PLAIN_CHAT, ChatRenderer
from finetune.data.column_template import ALPACA, PLAIN, TemplateRenderer, answer_form, parse_template, placeholders
from finetune.data.formats import OPTIONAL, QUESTION, REQUIRED, Format
from finetune.data.prompt_parts import NOTHING, Beside, asked_part, refuse_unknown, with_both_names
from finetune.data.rows import Record, Renderer
from finetune.data.tokenizer import Tokenizer, encode_prompt, special_texts
from finetune.errors import RecipeError
from finetune.recipe.schema import Prompt, Recipe
from finetune.text import harmless

CONVERSATIONS = ("chat", "sharegpt")
_WORDS = "zyxwvut"  # in place of an answer, to see what a template writes after it


def make_renderer(
    prompt: Prompt, layout: Format, columns: Collection[str], tokenizer: Tokenizer, clock: datetime | None = None
) -> Renderer:
    """The renderer of a recipe. Raises RecipeError where template and rows do not go together.

    clock: the time of the run, for templates that write it.
    """
    if layout in CONVERSATIONS:
        return _conversation(prompt, layout, tokenizer, clock)
    if prompt.template == "chat":
        if layout == "text":
            raise RecipeError("prompt.template: chat needs a question and an answer, and the rows are plain text")
        _need_chat_template(tokenizer)
        form = answer_form(prompt.completion, "{completion}")
        settings = (prompt.system, form, prompt.loss_on, prompt.end_token, layout, clock)
        return ChatRenderer("chat", tokenizer, None, *settings)
    if prompt.system is not None:
        raise RecipeError("prompt.system: needs a conversation; set prompt.template: chat, or write it in the template")
    if prompt.template == "alpaca" and layout not in ALPACA:
        raise RecipeError(f"prompt.template: alpaca needs a question and an answer, and the rows are {layout}")
    if prompt.completion is not None and layout == "text":
        raise RecipeError("prompt.completion: the rows are plain text and have no answer; remove it")
    name = {"auto": "alpaca" if layout == "alpaca" else "plain"}.get(prompt.template, prompt.template)
    template = {"plain": PLAIN, "alpaca": ALPACA}[name][layout] if name in ("plain", "alpaca") else name
    known = {*columns, *REQUIRED[layout], *OPTIONAL.get(layout, ())}
    return TemplateRenderer(name, template, layout, known, prompt.completion, prompt.loss_on, prompt.end_token)


def _conversation(prompt: Prompt, layout: Format, tokenizer: Tokenizer, clock: datetime | None) -> Renderer:
    if prompt.template not in ("auto", "chat", "plain"):
        raise RecipeError(f"prompt.template: the rows are {layout}; use auto, chat (the model's own) or plain")
    if prompt.completion is not None:
        raise RecipeError(f"prompt.completion: the rows are {layout} and hold their answers whole; remove it")
    template = PLAIN_CHAT if prompt.template == "plain" else None
    if template is None:
        _need_chat_template(tokenizer)
    name = "plain" if template else "chat"
    return ChatRenderer(
        name,
        tokenizer,
        template,
        prompt.system,
        loss_on=prompt.loss_on,
        end_token=prompt.end_token,
        layout=layout,
        clock=clock,
    )


def _need_chat_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise RecipeError(
            "prompt.template: the model has no chat template; choose a model that has one (its -Instruct or -it "
            "version), or set prompt.template: plain"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = harmless(", ".join(sorted(tokenizer.chat_template)))
        raise RecipeError(
            f"prompt.template: the model has chat templates called {names}, and none called default; write the one "
            "that you mean into the file chat_template.jinja of the model's folder, or set prompt.template: plain"
        )


def question_tokens(
    recipe: Recipe,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    clock: datetime | None = None,
    beside: Beside = NOTHING,
) -> list[int]:
    """The tokens of a new question, as training writes its prompts.

    recipe: that of a run, which names its format. messages: a conversation that ends with the user; templates
    over columns take the last message alone. clock: the run's. beside: what goes with the question. Raises RecipeError
    where the run's prompts have no room for that.
    """
    layout = recipe.data.format
    if layout == "auto":
        raise ValueError("the recipe does not name its data's format; that of a run does")
    renderer = make_renderer(recipe.prompt, layout, placeholders(recipe.prompt.template), tokenizer, clock)
    refuse_unknown(beside, renderer, layout, recipe.data.columns)
    if layout in CONVERSATIONS:
        system = [{"role": "system", "content": beside.system}] if beside.system else []
        text = _as_said(renderer, (*system, *messages), beside.tools, special_texts(tokenizer))
    else:
        values = with_both_names(beside.columns, recipe.data.columns)
        values |= {asked_part(renderer, layout): messages[-1]["content"], "system": beside.system or ""}
        text = renderer.question(Record("question", values=values, system=beside.system or ""))
    return encode_prompt(tokenizer, text)


def _as_said(
    renderer: Renderer, messages: Sequence[Mapping[str, str]], tools: tuple[Any, ...], marks: Collection[str]
) -> str:
    """The prompt of a conversation in which the model's own answers stand as it wrote them.

    A template writes the marks of an answer around its words (a channel, a call) and refuses or doubles those that
    stand in them. So an answer that holds marks is put after the prompt that it answered.
    """
    marked = [i for i, m in enumerate(messages) if m["role"] == "assistant" and any(x in m["content"] for x in marks)]
    if marked:
        at = marked[-1]
        words = {**messages[at], "content": _WORDS}
        whole = renderer.question(
            Record("question", messages=(*messages[:at], words, *messages[at + 1 :]), tools=tools)
        )
        _, found, after = whole.rpartition(_WORDS)
        if found:
            return _as_said(renderer, messages[:at], tools, marks) + messages[at]["content"] + after
    return renderer.question(Record("question", messages=tuple(messages), tools=tools))


def needed(recipe: Recipe) -> dict[str, str | None]:
    """What a question needs beside its text where no run has recorded it: the columns of the recipe's own template."""
    template, layout = recipe.prompt.template, recipe.data.format
    if template in ("auto", "chat", "plain", "alpaca"):
        return {}
    names = [name for _, name in parse_template(template, placeholders(template)) if name]
    part = QUESTION.get(layout, "")
    asked = part if part in names else names[0]
    return dict.fromkeys(name for name in names if name != asked)

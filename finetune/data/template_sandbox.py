"""Renders untrusted chat templates in a sandboxed child process.

A template is a program that came with a model. It is rendered by transformers' own sandbox (no attribute that
leads out of the template), and that sandbox runs in a child process, because what a template may still do, such as
`'a' * 10**9`, `2 ** 10**9` or loops within loops, happens inside one call that nothing in the same process can stop:

- memory: the child's address space is limited (where the system has `setrlimit`), and its resident memory watched;
- time: a watching thread ends a child that spends more than `SECONDS` of its own processor time on one conversation,
  and what a long one needs beside (not of the clock: a busy or sleeping machine is no template's fault);
- output: `EXTRA` characters and `FACTOR` times the length of what it was given;
- the rest: the child has none of our environment variables, and once it has imported what it needs it can open no
  file or socket and start no process.

A conversation that is long may break these bounds with an honest template: it is refused alone where the template does
with two short messages. One child serves all rows of a run over a pipe, in JSON, about 50 microseconds a rendering, and
ends when idle.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.conversation import REMEDY, Conversation, Request, Texts, template_text
from finetune.data.template_process import LOCK, TOO_MANY, TemplateProcess
from finetune.errors import EnvironmentProblem


def render(
    tokenizer: Any, conversation: Conversation, *, template: str | None = None, values: Mapping[str, Any] | None = None
) -> list[str]:
    """The texts of one conversation. Raises ValueError with the template's own words where it refuses the messages or
    fails on them, and EnvironmentProblem where it goes beyond its bounds.
    """
    texts = render_all(tokenizer, [conversation], template=template, values=values)[0]
    if isinstance(texts, ValueError):
        raise texts
    return list(texts)


def render_all(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    template: str | None = None,
    values: Mapping[str, Any] | None = None,
) -> list[Texts | ValueError]:
    """What `tokenizer.apply_chat_template(tokenize=False)` writes for each conversation, or why it refuses it.

    template: instead of the tokenizer's own. values: what the template finds beside the messages. Raises
    EnvironmentProblem where the template goes beyond its bounds, and not one long conversation alone.
    """
    named = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    texts = {
        tools: template_text(tokenizer, template, tools, named) for tools in {bool(c.tools) for c in conversations}
    }
    fixed = {**tokenizer.special_tokens_map, **(values or {})}
    requests = [Request(texts[bool(one.tools)], fixed, one) for one in conversations]
    return [
        ValueError(reply["error"]) if "error" in reply else Texts(reply["texts"]) for reply in _ask(requests, named)
    ]


_TRIAL = Conversation(
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), ((1, True), (2, False))
)
_child: TemplateProcess | None = None


def start_ahead() -> None:
    """The child loads its libraries while its first conversation is still made ready."""
    global _child
    with LOCK:
        if _child is None or _child.ended:
            _child = TemplateProcess()


def _ask(requests: Sequence[Request], named: str) -> list[dict[str, Any]]:
    """The replies. Where a bound is broken by a long conversation alone, it is an error of that one."""
    global _child
    replies: list[dict[str, Any]] = []
    with LOCK:
        try:
            while len(replies) < len(requests):
                if _child is None or _child.ended:
                    _child = TemplateProcess()
                for reply in _child.ask(requests[len(replies) :]):
                    if "over" in reply:
                        _child.end()  # what follows in its pipe is not the answer to the next question
                        replies.append(_judged(requests[len(replies)], reply["over"], named))
                        break
                    replies.append(reply)
        except BaseException:  # an interrupt, say: answers that nobody waits for would be taken for later ones
            if _child is not None:
                _child.end()
            raise
    return replies


def _judged(request: Request, over: str, named: str) -> dict[str, Any]:
    """The error of a conversation that broke a bound. Raises EnvironmentProblem where the template alone breaks it."""
    global _child
    if not request.trivial:
        _child = TemplateProcess()
        if not any("over" in reply for reply in _child.ask([Request(request.template, request.values, _TRIAL)])):
            return {"error": f"it {over}: its {len(request.conversation.messages):,} messages are {TOO_MANY}"}
    raise EnvironmentProblem(f"{named} {over}; {REMEDY}")


@atexit.register
def _end() -> None:
    if _child is not None:
        _child.end()

"""Chat templates rendered where they can do no harm.

A template is a program that came with a model. It is rendered by transformers' own sandbox (no attribute that
leads out of the template), and that sandbox runs in a child process, because what a template may still do, such as
`'a' * 10**9`, `2 ** 10**9` or loops within loops, happens inside one call that nothing in the same process can stop:

- memory: the child's address space is limited (where the system has `setrlimit`), and its resident memory watched;
- time: a watching thread ends a child that spends more than `SECONDS` of its own processor time on one rendering
  (not of the clock: a busy or sleeping machine is no template's fault);
- output: `EXTRA` characters and `FACTOR` times the length of what it was given;
- the rest: the child has none of our environment variables, and once it has imported what it needs it can open no
  file or socket and start no process.

One child serves all rows of a run over a pipe, in JSON, about 50 microseconds a rendering, and ends when idle.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from finetune.data.template_child import most, receive, send
from finetune.errors import EnvironmentProblem

SECONDS = 0.5  # of processor time, for one conversation; honest ones take thousandths
MEMORY = 512 * 2**20  # bytes the child may hold, its libraries counted
IDLE = 20.0  # seconds after which an unused child is ended
TICK = 0.05  # seconds between two looks at a busy child
# Bytes of requests that are sent before the first of them is answered. They must fit in the pipe: if we waited for room
# in it while the child waits for room in the other, neither would go on. Windows has small pipes.
AHEAD = 8192 if os.name == "posix" else 0
TEMPLATE_LENGTH = 1_000_000  # characters; the longest in use have some ten thousand


class Conversation(NamedTuple):
    """What is rendered: of the messages the first n, for each (n, answering); answering: with the prompt for an answer
    after them.
    """

    messages: Sequence[Mapping[str, Any]]
    prefixes: Sequence[tuple[int, bool]]
    tools: Sequence[Any] | None = None


def render(
    tokenizer: Any, conversation: Conversation, *, template: str | None = None, values: Mapping[str, Any] | None = None
) -> list[str]:
    """The texts of one conversation. Raises ValueError with the template's own words where it refuses the messages or
    fails on them, and EnvironmentProblem where it goes beyond its bounds.
    """
    texts = render_all(tokenizer, [conversation], template=template, values=values)[0]
    if isinstance(texts, ValueError):
        raise texts
    return texts


def render_all(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    template: str | None = None,
    values: Mapping[str, Any] | None = None,
) -> list[list[str] | ValueError]:
    """What `tokenizer.apply_chat_template(tokenize=False)` writes for each conversation, or why it refuses it.

    template: instead of the tokenizer's own. values: what the template finds beside the messages. Raises
    EnvironmentProblem where the template goes beyond its bounds.
    """
    named = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    texts = {
        tools: _template_text(tokenizer, template, tools, named) for tools in {bool(c.tools) for c in conversations}
    }
    fixed = {**tokenizer.special_tokens_map, **(values or {})}
    requests = (
        _Request(
            texts[bool(one.tools)],
            fixed,
            {
                "messages": [{k: v for k, v in message.items() if v is not None} for message in one.messages],
                "prefixes": one.prefixes,
                "tools": one.tools,
            },
        )
        for one in conversations
    )
    replies = _ask(requests, named)
    return [ValueError(reply["error"]) if "error" in reply else reply["texts"] for reply in replies]


def _template_text(tokenizer: Any, template: str | None, tools: bool, named: str) -> str:
    """The template, which a tokenizer may choose by whether there are tools."""
    try:
        text = tokenizer.get_chat_template(template, [{}] if tools else None)
    except (TypeError, AttributeError, KeyError):  # of what a damaged tokenizer_config.json gives as templates
        text = None
    if not isinstance(text, str):
        raise EnvironmentProblem(f"{named} is not text; {_REMEDY}")
    if len(text) > TEMPLATE_LENGTH:
        raise EnvironmentProblem(f"{named} has {len(text):,} characters; {_REMEDY}")
    return text


class _Request(NamedTuple):
    template: str
    values: Mapping[str, Any]
    conversation: Mapping[str, Any]


_START = "from finetune.data.template_child import serve; serve()"
_REMEDY = "look at it, and give the model another one, or set prompt.template: plain"
_lock = threading.Lock()
_child: _Child | None = None


def _ask(requests: Iterable[_Request], named: str) -> list[dict[str, Any]]:
    global _child
    with _lock:
        if _child is None or _child.ended:
            _child = _Child()
        try:
            replies = []
            for reply in _child.ask(requests):
                if "over" in reply:
                    raise EnvironmentProblem(f"{named} {reply['over']}; {_REMEDY}")
                replies.append(reply)
        except BaseException:  # an interrupt, say: answers that nobody waits for would be taken for later ones
            _child.end()
            raise
    return replies


@atexit.register
def _end() -> None:
    if _child is not None:
        _child.end()


class _Child:
    """The process that renders, and the thread that watches it."""

    def __init__(self) -> None:
        import psutil

        keep = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "TEMP")
        path = [one for one in sys.path if one]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {path!r}; {_START}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in keep if name in os.environ}
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,  # an interrupt of the terminal is for us
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._template: str | None = None
        self._values: Mapping[str, Any] | None = None
        self._number, self._busy, self._since = 0, False, time.monotonic()
        self._reason = ""
        self._over = threading.Event()
        ready = receive(self._out, 10_000)
        if ready is None or "error" in ready:
            self.end()
            raise EnvironmentProblem(
                f"chat templates cannot be rendered here ({(ready or {}).get('error', 'no start')})"
            )
        self._seen = psutil.Process(self._process.pid)
        threading.Thread(target=self._watch, daemon=True, name="chat template").start()

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    def ask(self, requests: Iterable[_Request]) -> Iterator[dict[str, Any]]:
        """{"texts"}, {"error": why it refused} or {"over": which bound it broke}, for each request.

        The next requests are sent while the child still renders: it need not wait for us, nor we for each answer.
        """
        waiting: deque[tuple[int, int]] = deque()  # (bytes, the most that its answer may have) of what is not answered
        for request in requests:
            data = self._encoded(request)
            while waiting and sum(size for size, _ in waiting) + len(data) > AHEAD:
                yield self._answer(*waiting.popleft())
            self._number, self._busy = self._number + 1, True
            with suppress(OSError, ValueError):  # a dead child: there will be no answer
                send(self._in, data)
            prefixes = request.conversation["prefixes"]
            waiting.append((len(data), 6 * most(prefixes, len(data)) + 1000))  # 6 bytes: "\\u0000"
        while waiting:
            yield self._answer(*waiting.popleft())
        self._busy, self._since = False, time.monotonic()

    def _encoded(self, request: _Request) -> bytes:
        """What the child has of the last request is not sent again."""
        new: dict[str, Any] = {"template": None if request.template == self._template else request.template}
        new["values"] = None if request.values == self._values else dict(request.values)
        self._template, self._values = request.template, request.values
        return json.dumps(new | dict(request.conversation), default=_plain).encode()

    def _answer(self, size: int, limit: int) -> dict[str, Any]:
        try:
            reply = receive(self._out, limit)
        except (OSError, ValueError):
            reply = None
        self._number += 1  # the watching thread counts the time of the next one
        if reply is None:  # what it does now, and what stands in its pipe, is unknown
            self.end()
            return {"over": self._reason or "ended the process that renders it"}
        return reply

    def end(self) -> None:
        self._over.set()
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._in.close()
        self._out.close()

    def _watch(self) -> None:
        import psutil

        number, began = 0, 0.0
        while not self._over.wait(TICK):
            if not self._busy:
                if time.monotonic() - self._since > IDLE and _lock.acquire(blocking=False):
                    try:
                        self.end()
                    finally:
                        _lock.release()
                continue
            try:
                times, held = self._seen.cpu_times(), self._seen.memory_info().rss
            except psutil.Error:
                continue
            used = times.user + times.system
            if self._number != number:
                number, began = self._number, used
            if used - began > SECONDS:
                self._reason = f"ran for more than {SECONDS:g} s on one conversation"
            elif held > MEMORY:
                self._reason = f"took more than {MEMORY // 2**20} MB"
            else:
                continue
            self._process.kill()  # the waiting `ask` meets the end of the pipe


def _plain(value: object) -> str:
    return f"<{type(value).__name__}>"  # as transformers shows a template what is no JSON

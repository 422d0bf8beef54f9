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
import json
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from finetune.data.child_process import bare_python
from finetune.data.conversation import FOR_MESSAGE, LONGEST, REMEDY, Conversation, Request, Texts, template_text
from finetune.data.template_child import most, receive, send
from finetune.errors import EnvironmentProblem

MEMORY = 512 * 2**20  # bytes the child may hold, its libraries counted
IDLE = 20.0  # seconds after which an unused child is ended
TICK = 0.05  # seconds between two looks at a busy child
# Bytes of requests that are sent before the first of them is answered. They must fit in the pipe: if we waited for room
# in it while the child waits for room in the other, neither would go on. Windows has small pipes.
AHEAD = 8192 if os.name == "posix" else 0


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


_START = "from finetune.data.template_child import serve; serve(parent, killed_with_it)"
_TOO_MANY = "too many to be written one after the other; split them into several rows"
_TRIAL = Conversation(
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), ((1, True), (2, False))
)
_lock = threading.Lock()
_child: _Child | None = None


def _ask(requests: Sequence[Request], named: str) -> list[dict[str, Any]]:
    """The replies. Where a bound is broken by a long conversation alone, it is an error of that one."""
    global _child
    replies: list[dict[str, Any]] = []
    with _lock:
        try:
            while len(replies) < len(requests):
                if _child is None or _child.ended:
                    _child = _Child()
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
        _child = _Child()
        if not any("over" in reply for reply in _child.ask([Request(request.template, request.values, _TRIAL)])):
            return {"error": f"it {over}: its {len(request.conversation.messages):,} messages are {_TOO_MANY}"}
    raise EnvironmentProblem(f"{named} {over}; {REMEDY}")


@atexit.register
def _end() -> None:
    if _child is not None:
        _child.end()


class _Waiting(NamedTuple):
    """A request that is not answered yet."""

    size: int  # bytes
    most_bytes: int  # of its answer
    seconds: float  # of processor time


class _Child:
    """The process that renders, and the thread that watches it."""

    def __init__(self) -> None:
        import psutil

        main = threading.current_thread() is threading.main_thread()  # any other thread may end long before us
        command, environment = bare_python(f"parent, killed_with_it = {os.getpid()}, {main}; {_START}")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # an interrupt of the terminal is for us
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._template: str | None = None
        self._values: Mapping[str, Any] | None = None
        self._number, self._busy, self._since = 0, False, time.monotonic()
        self._allowed = 0.0  # seconds of processor time
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

    def ask(self, requests: Iterable[Request]) -> Iterator[dict[str, Any]]:
        """{"texts"}, {"error": why it refused} or {"over": which bound it broke}, for each request.

        The next requests are sent while the child still renders: it need not wait for us, nor we for each answer.
        """
        waiting: deque[_Waiting] = deque()
        for request in requests:
            if FOR_MESSAGE * request.renderings > LONGEST:
                while waiting:
                    yield self._answer(waiting)
                yield {"error": f"its {len(request.conversation.messages):,} messages are {_TOO_MANY}"}
                continue
            data = self._encoded(request)
            while waiting and sum(one.size for one in waiting) + len(data) > AHEAD:
                yield self._answer(waiting)
            most_bytes = 6 * most(request.conversation.prefixes, len(data)) + 1000  # 6 bytes: "\\u0000"
            waiting.append(_Waiting(len(data), most_bytes, request.seconds(len(data))))
            self._number, self._busy, self._allowed = self._number + 1, True, waiting[0].seconds
            with suppress(OSError, ValueError):  # a dead child: there will be no answer
                send(self._in, data)
        while waiting:
            yield self._answer(waiting)
        self._busy, self._since = False, time.monotonic()

    def _encoded(self, request: Request) -> bytes:
        """What the child has of the last request is not sent again."""
        new: dict[str, Any] = {"template": None if request.template == self._template else request.template}
        new["values"] = None if request.values == self._values else dict(request.values)
        self._template, self._values = request.template, request.values
        messages, prefixes, tools = request.conversation
        filled = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return json.dumps(new | {"messages": filled, "prefixes": prefixes, "tools": tools}, default=_plain).encode()

    def _answer(self, waiting: deque[_Waiting]) -> dict[str, Any]:
        try:
            reply = receive(self._out, waiting.popleft().most_bytes)
        except (OSError, ValueError):
            reply = None
        self._number += 1  # the watching thread counts the time of the next one
        self._allowed = waiting[0].seconds if waiting else 0.0
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
            if used - began > self._allowed:
                self._reason = f"ran for more than {self._allowed:.2g} s on one conversation"
            elif held > MEMORY:
                self._reason = f"took more than {MEMORY // 2**20} MB"
            else:
                continue
            self._process.kill()  # the waiting `ask` meets the end of the pipe


def _plain(value: object) -> str:
    return f"<{type(value).__name__}>"  # as transformers shows a template what is no JSON

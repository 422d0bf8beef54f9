"""The process that renders chat templates for `finetune.data.template_sandbox`, and the thread that watches it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from backends.transformers_names import kept_in
from finetune.data.child_process import bare_python
from finetune.data.conversation import FOR_MESSAGE, LONGEST, Request
from finetune.data.template_child import most, receive, send
from finetune.errors import EnvironmentProblem

MEMORY = 512 * 2**20  # bytes the child may hold, its libraries counted
IDLE = 20.0  # seconds after which an unused child is ended
TICK = 0.05  # seconds between two looks at a busy child
# Bytes of requests that are sent before the first of them is answered. They must fit in the pipe: if we waited for room
# in it while the child waits for room in the other, neither would go on. Windows has small pipes.
AHEAD = 8192 if os.name == "posix" else 0
LOCK = threading.Lock()  # held while a conversation is rendered
_START = "from finetune.data.template_child import serve; serve(parent, killed_with_it, names)"
TOO_MANY = "too many to be written one after the other; split them into several rows"


class _Waiting(NamedTuple):
    """A request that is not answered yet."""

    size: int  # bytes
    most_bytes: int  # of its answer
    seconds: float  # of processor time


class TemplateProcess:
    """Takes requests and answers them one after the other."""

    def __init__(self) -> None:
        """Does not wait until it has started."""
        main = threading.current_thread() is threading.main_thread()  # any other thread may end long before us
        names = kept_in()
        given = f"parent, killed_with_it, names = {os.getpid()}, {main}, {names and str(names)!r}"
        command, environment = bare_python(f"{given}; {_START}")
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
        self._reason, self._ready = "", False
        self._over = threading.Event()

    @property
    def ended(self) -> bool:
        return self._over.is_set()

    def _wait(self) -> None:
        """Until it has its libraries. Raises EnvironmentProblem where it has not."""
        import psutil

        ready = receive(self._out, 10_000)
        if ready is None or "error" in ready:
            self.end()
            raise EnvironmentProblem(
                f"chat templates cannot be rendered here ({(ready or {}).get('error', 'no start')})"
            )
        self._ready, self._since = True, time.monotonic()
        self._seen = psutil.Process(self._process.pid)
        threading.Thread(target=self._watch, daemon=True, name="chat template").start()

    def ask(self, requests: Iterable[Request]) -> Iterator[dict[str, Any]]:
        """{"texts"}, {"error": why it refused} or {"over": which bound it broke}, for each request.

        The next requests are sent while the child still renders: it need not wait for us, nor we for each answer.
        """
        if not self._ready:
            self._wait()
        waiting: deque[_Waiting] = deque()
        for request in requests:
            if FOR_MESSAGE * request.renderings > LONGEST:
                while waiting:
                    yield self._answer(waiting)
                yield {"error": f"its {len(request.conversation.messages):,} messages are {TOO_MANY}"}
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
                if time.monotonic() - self._since > IDLE and LOCK.acquire(blocking=False):
                    try:
                        self.end()
                    finally:
                        LOCK.release()
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

"""Child process of `finetune.data.template_process`: renders what it is sent, and can do nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from backends.transformers_names import keep
from finetune.data.template_clock import clock_names

GROWTH = 384 * 2**20  # bytes of address space it may add to what its libraries took
EXTRA, FACTOR = 20_000, 20  # characters of output: so many, and so many for each byte of input
_PDEATHSIG = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
# What these need is imported when it is first used, and later that cannot be.
_WARM_UP = (
    "{{ 'a\\n' | wordwrap(9) | pprint }}{{ lipsum(1) }}{{ strftime_now('%d %b') }}{{ [1] | random | tojson }}",
    "{{ raise_exception('') }}",
    "{% if",
    "{{ none.a.b }}",
)


def serve(parent: int, killed_with_it: bool, library_names: str | None) -> None:
    """The child: answers requests on its standard input until that ends.

    parent: its process id. killed_with_it: whether the system may end the child with the thread that started it.
    library_names: the file of `backends.transformers_names`.
    """
    if library_names is not None:
        keep(Path(library_names))
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
    _end_with(parent, killed_with_it)
    try:
        from transformers.utils import chat_template_utils as library

        for template in _WARM_UP:
            with suppress(Exception):
                library.render_jinja_template([[]], chat_template=template)
        _restrict()
    except Exception as error:
        send(pipe_out, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return
    send(pipe_out, b"{}")
    template, clock = "", library.datetime
    values: dict[str, Any] = {}
    while (size := pipe_in.read(8)) and (data := pipe_in.read(int.from_bytes(size, "little"))):
        request = json.loads(data)
        template = request["template"] or template
        values = request["values"] or values
        names, fixed = clock_names(values, template)
        library.datetime = fixed or clock  # strftime_now asks it for the time
        try:
            texts, written = _texts(library.render_jinja_template, template, request, names)
            allowed = most(request["prefixes"], len(data))
            over = f"wrote {written:,} characters where {allowed:,} are the most for these messages"
            reply = json.dumps({"texts": texts} if written <= allowed else {"over": over})
        except MemoryError:
            reply = json.dumps({"over": "asked for more memory than a template may have"})
        except Exception as error:  # a template is a program: it may fail in any way
            reply = json.dumps({"error": str(error)[:500] or type(error).__name__})
        send(pipe_out, reply.encode())


def _texts(
    renderer: Any, template: str, request: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[list[tuple[int, str]], int]:
    """The text of each prefix, and how many characters all have.

    A text is told by how much of the last one it begins with, and what follows: the texts of a long conversation are
    the same but for their ends, and all of them in full would not fit in memory.
    """
    messages, named = request["messages"], {**values, "chat_template": template, "tools": request["tools"]}
    whole, texts, characters = None, [], 0
    for count, answering in reversed(request["prefixes"]):
        text = renderer([messages[:count]], add_generation_prompt=answering, **named)[0][0]
        whole = text if whole is None else whole
        characters += len(text)
        shared = _shared(whole, text)
        texts.append((shared, text[shared:]))
    return [*reversed(texts[1:]), (0, whole)], characters


def _shared(whole: str, text: str) -> int:
    """How many characters both begin with."""
    if whole.startswith(text):
        return len(text)
    low, high = 0, min(len(whole), len(text))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if whole.startswith(text[low:middle], low) else (low, middle - 1)
    return low


def _end_with(parent: int, killed_with_it: bool) -> None:
    """This process ends when its parent does, even in the midst of a template.

    Linux kills it. Elsewhere a thread waits for the end of the pipe, which a template in one long call of C can delay.
    """
    if os.name != "posix":
        return
    if killed_with_it and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
    threading.Thread(target=_end_with_pipe, daemon=True).start()


def _end_with_pipe() -> None:
    import select

    pipe = select.poll()
    pipe.register(0, 0)  # asked for nothing, it tells only of the other end's closing
    pipe.poll()
    os._exit(1)


def _restrict() -> None:
    """Bounds of this process: memory, no new file or socket, nothing written to disk, no new process."""
    try:
        import resource
    except ImportError:  # Windows: the watching thread alone
        return
    import psutil

    memory = psutil.Process().memory_info().vms + GROWTH
    for name, bound in (("AS", memory), ("NOFILE", 3), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        with suppress(ValueError, OSError, AttributeError):  # macOS knows no bound of the address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))


def most(texts: Sequence[Any], given: int) -> int:
    """Characters that so many texts may have together, for a request of `given` bytes."""
    return len(texts) * (EXTRA + FACTOR * given)


def send(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def receive(pipe: IO[bytes], limit: int) -> dict[str, Any] | None:
    """The next message; None at the end of the pipe, or for one that is longer than `limit` bytes."""
    size = int.from_bytes(head, "little") if len(head := pipe.read(8)) == 8 else -1
    if not 0 <= size <= limit:
        return None
    message: dict[str, Any] = json.loads(pipe.read(size))
    return message

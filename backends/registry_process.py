"""The backend registry in a child process, so that the parent answers questions without importing a framework.

To load torch takes seconds, and transformers takes as long again where it finds torch. A command that only asks what
a machine can do goes on meanwhile, and has transformers' tokenizers without it.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from backends.interface import BackendError, OutOfMemory, Wanted
from backends.machine_cache import Remembered
from backends.table import BACKENDS

P = ParamSpec("P")
T = TypeVar("T")

_CODE = (
    "import sys; sys.path[:] = {path!r}; from backends import registry, registry_process as own; own.serve(registry)"
)

_CARRIED = (BackendError, OutOfMemory, MemoryError)  # raised here as they are there; others are bugs, and end it


class Apart:
    """The other process. Each question is asked once, and its answer kept; answers come in the order of questions."""

    def __init__(self, remembered: Remembered | None = None) -> None:
        """remembered: answers of earlier processes; one that is not in it starts the other process."""
        self._remembered = remembered
        self._child: subprocess.Popen[bytes] | None = None
        self._waiting: list[tuple[bytes, str, tuple[Any, ...]]] = []
        self._answers: dict[bytes, tuple[bool, Any]] = {}

    def ask(self, name: str, *arguments: Any) -> bytes:
        """Does not wait. name: of a function of the registry. Returns what `answer` takes."""
        question = pickle.dumps((name, arguments))
        if question in self._answers or question in (asked for asked, *_ in self._waiting):
            return question
        known, answer = self._remembered.get(name, arguments) if self._remembered else (False, None)
        if known:
            self._answers[question] = True, answer
            return question
        self._child = self._child or _started()
        self._waiting.append((question, name, arguments))
        try:
            pickle.dump(question, self._child.stdin)  # type: ignore[arg-type]  # a pipe
            self._child.stdin.flush()  # type: ignore[union-attr]
        except OSError:
            raise self._ended(self._child) from None
        return question

    def answer(self, question: bytes) -> Any:
        """Raises BackendError, OutOfMemory and MemoryError where the function does; the first two also where the
        process has ended.
        """
        while question not in self._answers:
            self._take()
        good, value = self._answers[question]
        if not good:
            kind, reason = value
            raise kind(reason)
        return value

    def _take(self) -> None:
        child = self._child
        assert child is not None  # what is not known was asked
        try:
            good, value = pickle.load(child.stdout)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError):
            raise self._ended(child) from None
        question, name, arguments = self._waiting.pop(0)
        self._answers[question] = good, value
        if good and self._remembered:
            self._remembered.put(name, arguments, value)

    def end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ended(self, child: subprocess.Popen[bytes]) -> BackendError | OutOfMemory:
        if (code := child.wait()) == -9:  # SIGKILL: of nobody here
            return OutOfMemory("the process that loads the frameworks was killed, as Linux does where memory runs out")
        return BackendError(f"loading the frameworks ended their process (exit code {code})")


def _started() -> subprocess.Popen[bytes]:
    code = _CODE.format(path=[one for one in sys.path if one] or [str(Path.cwd())])
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)


_other: list[Apart] = []  # at most one


def ask_apart(requested: str, device: Wanted, remembered: Path | None = None) -> None:
    """From now on another process loads frameworks and answers for this one, which can load none any more.

    transformers finds no torch here then, and its tokenizers do not miss it. remembered: the file with what was
    answered before, and need not be asked.
    """
    other = Apart(Remembered(remembered) if remembered else None)
    atexit.register(other.end)
    _other.append(other)
    ahead("describe_chosen", requested, device)
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


def asks_apart() -> bool:
    """Whether another process answers for this one."""
    return bool(_other)


def ahead(name: str, *arguments: Any) -> None:
    """Asks the other process, where there is one, what this one will want to know later."""
    for other in _other:
        other.ask(name, *arguments)


def answered_apart(function: Callable[P, T]) -> Callable[P, T]:
    """Of a function of the registry that loads a framework: where another process does that, that one answers."""

    @wraps(function)
    def answered(*arguments: P.args, **named: P.kwargs) -> T:
        if not _other:
            return function(*arguments, **named)
        return cast(T, _other[0].answer(_other[0].ask(function.__name__, *arguments, **named)))

    return answered


def serve(registry: Any) -> None:
    """In the other process: answers until nobody is left to ask. What libraries print goes to standard error.

    registry: the module, which imports this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    whole = dict(BACKENDS)
    BACKENDS.update({name: replace(row, session=row.machine or row.session) for name, row in whole.items()})
    while True:
        try:
            name, arguments = pickle.loads(pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        if name in ("check_chosen", "check_config", "logprobs"):  # they need a library's models too
            BACKENDS.update(whole)
        try:
            answer = True, getattr(registry, name)(*arguments)
        except _CARRIED as error:
            answer = False, (next(kind for kind in _CARRIED if isinstance(error, kind)), str(error))
        pickle.dump(answer, answers)
        answers.flush()

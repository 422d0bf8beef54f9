"""A first use of a tokenizer in a process of its own, whose time and memory are bounded.

What the tokenizers library cannot do ends its process, and no `except` can catch that. Here it ends the trial's.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from finetune.data.child_process import bare_python
from finetune.errors import EnvironmentProblem

MEMORY, TIMES = 2**30, 20  # bytes of address space: so many, and so many for each byte of the file
SECONDS, PER_BYTE = 10, 5e-7  # of processor time: so many, and so many for each byte
PATIENCE = 300  # seconds by the clock, where the system knows no bounds
_TEXTS = ("a trial", "Aa1 \t\n\u00e9\ufdfa\u4e2d\U0001f98a" * 20, "a" * 1000)
_ENDED, _FAILED = 3, 4  # exit codes of a trial that ran out of memory, and of one that failed in native code


def try_tokenizer(file: Path) -> None:
    """Raises EnvironmentProblem where the library does not survive `file`, or fails in native code. Its exceptions are
    no matter here: they come again where the tokenizer is loaded, and are told there.
    """
    size = file.stat().st_size
    seconds, memory = int(SECONDS + size * PER_BYTE), MEMORY + TIMES * size
    code = f"from finetune.data.tokenizer_trial import use; use({str(file)!r}, {memory}, {seconds})"
    command, environment = bare_python(code)
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=PATIENCE, check=False, start_new_session=True,
        )  # fmt: skip
        ended = done.returncode
    except subprocess.TimeoutExpired:
        ended = _ENDED
    if ended:
        raise EnvironmentProblem(
            f"{file}: the tokenizer does not survive a trial of {seconds} s and {memory // 2**20:,} MB "
            f"({_how(ended)}); download the model again, or use another"
        )


def use(file: str, memory: int, seconds: int) -> None:
    """In the child: the tokenizer is read, used and written."""
    from tokenizers import Tokenizer

    _restrict(memory, seconds)
    try:
        tokenizer = Tokenizer.from_file(file)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for text in _TEXTS:
            tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        tokenizer.to_str()
    except MemoryError:
        os._exit(_ENDED)
    except BaseException as error:  # a PanicException is no Exception
        os._exit(0 if isinstance(error, Exception) else _FAILED)


def _restrict(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the clock alone
        return
    import psutil

    held, used = psutil.Process().memory_info().vms, int(sum(os.times()[:2]))
    for name, bound in (("AS", held + memory), ("CPU", used + 1 + seconds), ("CORE", 0)):
        with suppress(ValueError, OSError, AttributeError):  # macOS knows no bound of the address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))


def _how(code: int) -> str:
    import signal

    if -code in set(signal.Signals):
        return f"{signal.Signals(-code).name}, {signal.strsignal(-code)}"
    reasons = {_ENDED: "out of memory, or of time", _FAILED: "the tokenizers library fails on it"}
    return reasons.get(code, f"exit code {code}")

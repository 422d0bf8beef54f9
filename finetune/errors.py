"""Errors that the user can act on, and the one table of exit codes."""

from __future__ import annotations

import signal
from enum import IntEnum

from finetune.text import one_line


class ExitCode(IntEnum):
    """How a command ends: a name, the number that the shell sees, and what it means.

    `for code in ExitCode: code.value, code.name, code.meaning` is the whole table.
    """

    meaning: str

    DONE = 0, "done"
    BUG = 1, "a crash, or a bug in finetune"
    RECIPE = 2, "a mistake in the recipe or on the command line"
    DATA = 3, "a problem in the data"
    DIVERGED = 4, "training diverged: a loss or a number is not finite"
    MEMORY = 5, "out of memory"
    DISK = 6, "the disk is full, or a file cannot be written"
    BACKEND = 7, "the backend does not work here, or cannot do what the recipe asks"
    INCOMPATIBLE = 8, "files that do not belong together, or a broken file"
    EXPORT = 9, "an export that does not do what the run's model does"
    CASES = 10, "fewer cases of a suite pass than --at-least asks for"
    INTERRUPTED = 130, "stopped by Ctrl-C (SIGINT)"
    TERMINATED = 143, "stopped by SIGTERM, or by SIGHUP when its terminal closed"

    def __new__(cls, code: int, meaning: str = "") -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


def stopped_by(number: int) -> ExitCode:
    """The exit code after a signal asked a run to stop: SIGHUP is treated as SIGTERM."""
    return ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED


class FinetuneError(Exception):
    """Something that the user can fix; the message says where it is and what to do."""

    exit_code = ExitCode.BUG

    def __init__(self, *lines: str) -> None:
        """The message, a line each: a line break within one came with a value, and is written out."""
        super().__init__("\n".join(map(one_line, lines)))


class RecipeError(FinetuneError):
    """A mistake in the recipe or on the command line."""

    exit_code = ExitCode.RECIPE


class DataError(FinetuneError):
    """Rows or files that cannot be trained on."""

    exit_code = ExitCode.DATA


class Diverged(FinetuneError):
    """A loss, a gradient or a weight is not a finite number."""

    exit_code = ExitCode.DIVERGED


class MemoryExhausted(FinetuneError):
    """Even the smallest part of the work does not fit in memory."""

    exit_code = ExitCode.MEMORY


class DiskError(FinetuneError):
    """A file cannot be written or read."""

    exit_code = ExitCode.DISK


class EnvironmentProblem(FinetuneError):
    """The backend cannot be used, or cannot do what the recipe asks."""

    exit_code = ExitCode.BACKEND


class Incompatible(FinetuneError):
    """Files that do not belong together: another base, another rank, a broken checkpoint."""

    exit_code = ExitCode.INCOMPATIBLE


class ExportFailed(FinetuneError):
    """An export was written and read back, and does not do what the run's model does."""

    exit_code = ExitCode.EXPORT


class CasesFailed(FinetuneError):
    """The tuned model passes fewer cases of a suite than it was asked to."""

    exit_code = ExitCode.CASES


class Interrupted(Exception):
    """The run stopped because it was asked to; what it has done so far is on the disk."""


def explain(error: BaseException) -> tuple[str, ExitCode] | None:
    """What a command says of an error, and its exit code; None: SystemExit, or a bug in finetune, shown with its
    traceback.
    """
    if isinstance(error, FinetuneError):
        return str(error), error.exit_code
    if isinstance(error, SystemExit):
        return None
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ExitCode.INTERRUPTED
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, quantize: 4bit, or a lower train.max_length", ExitCode.MEMORY
    if isinstance(error, OSError):
        named = one_line(str(error.filename or "output"))
        return None if error.errno is None else (f"{named}: {error.strerror}", ExitCode.DISK)
    if type(error).__name__ == "PanicException":  # of a library in Rust, and no Exception
        return one_line(f"the tokenizer fails ({error!s:.200}); look at the model's tokenizer.json"), ExitCode.BACKEND
    from backends.interface import BackendError, IncompatibleState, Lost, OutOfMemory

    codes = {
        BackendError: ExitCode.BACKEND, IncompatibleState: ExitCode.INCOMPATIBLE, OutOfMemory: ExitCode.MEMORY,
        Lost: ExitCode.BUG,
    }  # fmt: skip
    return next(((one_line(str(error)), code) for kind, code in codes.items() if isinstance(error, kind)), None)

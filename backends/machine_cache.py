"""What frameworks report about this machine, cached for a day, so that none is imported only to ask again.

It holds for the machine as it was: with another boot, card, driver, processor set, environment or version of a library
everything is asked anew. Refusals are not kept, nor what changes by itself, as free memory does.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

DAY = 24 * 3600  # seconds
KEPT = {"choose", "probe", "describe", "describe_chosen", "unused_accelerator", "relative_rate", "check_chosen"}
_SETTINGS = ("CUDA_", "HIP_", "ROCR_", "NVIDIA_", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "PYTORCH_", "LD_", "DYLD_")
_DEVICES = ("nvidia*", "kfd", "dri/*", "dxg")  # in /dev: of NVIDIA, AMD, any screen, WSL2
_FILES = ("/proc/sys/kernel/random/boot_id", "/proc/driver/nvidia/version", "/sys/fs/cgroup/cpu.max")


class Remembered:
    """Answers by question, in a file of JSON. One that cannot be read or written is as none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp = stamp()
        self._answers: dict[str, list[Any]] = {}  # question -> [answer, when it was given]
        found = read_json(file)
        if self._stamp and found.get("machine") == self._stamp:
            answers = found.get("answers")
            self._answers = answers if isinstance(answers, dict) else {}

    def get(self, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """Whether it is known, and the answer."""
        entry = self._answers.get(_key(name, arguments)) if name in KEPT else None
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], int | float)):
            return False, None
        return 0 <= time.time() - entry[1] < DAY, entry[0]

    def put(self, name: str, arguments: tuple[Any, ...], answer: Any) -> None:
        if not self._stamp or name not in KEPT or (name == "probe" and answer is not None):
            return
        self._answers[_key(name, arguments)] = [answer, time.time()]
        write_json(self._file, {"machine": self._stamp, "answers": self._answers})


def read_json(file: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where it cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; not where the disk refuses it, as all of it can be asked again."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def digest(content: object) -> str:
    """Of what `content` is written as."""
    return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()


def stamp() -> str:
    """A digest of all that the answers depend on; empty where a driver may change unseen (Windows)."""
    if os.name != "posix":
        return ""
    parts: list[object] = [sys.executable, sys.prefix, _installed(), _own_files()]
    parts += [sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))]
    parts += [sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    parts += [sorted(str(device) for one in _DEVICES for device in Path("/dev").glob(one)), *map(_text, _FILES)]
    if not Path(_FILES[0]).exists():
        import psutil

        parts.append(round(psutil.boot_time()))
    return digest(parts)


def _key(name: str, arguments: tuple[Any, ...]) -> str:
    return json.dumps([name, *arguments], default=repr)


def folder_stamp(folder: Path) -> str:
    """A digest of what the file system says of a folder's files."""
    said: list[object] = []
    for file in sorted(folder.iterdir()):
        with suppress(OSError):  # a link to nowhere
            status = file.stat()
            said.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return digest(said)


def _installed() -> list[tuple[str, int]]:
    """Every package that is installed, with its version in its name, and when it was."""
    folders = [Path(entry) for entry in sys.path if entry and Path(entry).is_dir()]
    return sorted((file.name, file.stat().st_ctime_ns) for folder in folders for file in folder.glob("*.dist-info"))


def _own_files() -> int:
    return max(file.stat().st_mtime_ns for file in Path(__file__).parent.rglob("*.py"))


def _text(file: str) -> str:
    with suppress(OSError):
        return Path(file).read_text(encoding="utf-8", errors="replace")
    return ""

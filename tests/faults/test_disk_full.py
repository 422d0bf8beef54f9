"""A disk that is full after so many bytes, or read-only: exit 6, what was there verifies, and with room it goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from finetune.disk.checkpoint import load_newest, save
from finetune.disk.metrics import MetricsFile, read
from finetune.errors import DiskError
from finetune.events import RunStarted
from tests.faults.cases import amounts, cases
from tests.faults.toy import assert_same_end, run_to_the_end, start_or_resume
from tests.unit.test_checkpoint import assert_same, checkpoint, names
from tests.unit.toy_run import session


class Budget:
    """Bytes that may still be written; the write that does not fit is done in part and fails."""

    def __init__(self, left: int, patch: pytest.MonkeyPatch) -> None:
        self.left = left
        self._write, self._write_bytes = os.write, Path.write_bytes
        patch.setattr(os, "write", self.write)
        patch.setattr(Path, "write_bytes", lambda path, data: self.write_bytes(path, data))

    def _take(self, size: int) -> int:
        fits = min(size, self.left)
        self.left -= fits
        return fits

    def write(self, handle: int, data: Any) -> int:
        if (fits := self._take(len(data))) == 0 and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(handle, data[:fits])

    def write_bytes(self, path: Path, data: bytes) -> int:
        fits = self._take(len(data))
        self._write_bytes(path, data[:fits])
        if fits < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return fits


@pytest.mark.parametrize("count", amounts(40, 4000))
def test_full_after_any_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """`count` budgets from nothing to a whole checkpoint, and one byte short of it."""
    old, new = checkpoint(1), checkpoint(2)
    whole = sum(file.stat().st_size for file in save(tmp_path / "whole", new).iterdir())
    for left in sorted({*range(0, whole, max(1, whole // count)), whole - 1}):
        folder = tmp_path / str(left)
        save(folder, old)
        with monkeypatch.context() as patch, pytest.raises(DiskError, match="No space left") as caught:
            Budget(left, patch)
            save(folder, new)
        assert caught.value.exit_code == 6
        assert names(folder) == ["step-00000001"], f"{left} bytes: something half written stays"
        assert_same(_whole(folder), old)
        save(folder, new)
        assert_same(_whole(folder), new)
    with monkeypatch.context() as patch:
        Budget(whole, patch)
        save(tmp_path / "enough", new)


def _whole(folder: Path) -> Any:
    found, messages = load_newest(folder)
    assert messages == []
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.name != "posix" or os.geteuid():
        pytest.skip("only root may mount a file system")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


def ends_with_6(run: Path, live: Any) -> None:
    with pytest.raises(DiskError) as caught:
        run_to_the_end(run, live)
    assert caught.value.exit_code == 6
    assert load_newest(run / "checkpoints")[1] == [], "what was there verifies"


@pytest.mark.parametrize("case", cases(3, 30))
def test_a_small_file_system(tmp_path: Path, small_disk: Path, case: int) -> None:
    """From 6 to 35 pages: full before the first checkpoint, in the midst of one, while an old one is still there."""
    pages = 6 + (case * 11) % 30
    remount(small_disk, f"size={pages * 4}k")
    live = session(tmp_path / "model")
    start = live.get_state()
    try:
        ends_with_6(small_disk / "run", live)
    except pytest.fail.Exception:
        assert pages > 14, "so small a disk cannot have been enough"
    remount(small_disk, "size=1m")
    live.set_state(start)
    whole = run_to_the_end(tmp_path / "whole", session(tmp_path / "model"))
    assert_same_end(run_to_the_end(small_disk / "run", live), whole)


def test_a_disk_that_became_read_only(tmp_path: Path, small_disk: Path) -> None:
    list(islice(start_or_resume(small_disk / "run", session(tmp_path / "model")), 9))  # to a checkpoint and beyond
    before = {file: file.read_bytes() for file in small_disk.rglob("*") if file.is_file()}
    remount(small_disk, "ro")
    with pytest.raises(DiskError, match="read-only") as caught:
        run_to_the_end(small_disk / "run", session(tmp_path / "model"))
    assert caught.value.exit_code == 6
    assert {file: file.read_bytes() for file in small_disk.rglob("*") if file.is_file()} == before
    remount(small_disk, "rw")
    whole = run_to_the_end(tmp_path / "whole")
    assert_same_end(run_to_the_end(small_disk / "run", session(tmp_path / "model")), whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    """The line that does not fit, and again when the file is closed."""
    with pytest.raises(DiskError, match="No space left") as caught, MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.record(RunStarted(0, 1, 1, resumed=False))
        metrics.close()
        metrics._file = Path("/dev/full").open("a")  # noqa: SIM115
        metrics.record(RunStarted(0, 1, 1, resumed=False))
    assert caught.value.exit_code == 6
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    if os.name != "posix" or not os.geteuid():
        pytest.skip("root may write to any folder")
    run_to_the_end(tmp_path / "run", train={"epochs": 1})
    folder = tmp_path / "run" / "checkpoints"
    before = names(folder)
    folder.chmod(0o500)
    try:
        with pytest.raises(DiskError, match="permission") as caught:
            save(folder, checkpoint(99))
    finally:
        folder.chmod(0o700)
    assert caught.value.exit_code == 6
    assert names(folder) == before
    save(folder, checkpoint(99))


def test_no_inodes_left(tmp_path: Path, small_disk: Path) -> None:
    """With every number of free inodes, from none to just enough, and then with room."""
    live = session(tmp_path / "model")
    start = live.get_state()
    whole = run_to_the_end(tmp_path / "whole", session(tmp_path / "model"))
    for free in (0, 1, 2, 4, 7):
        run = small_disk / f"run{free}"
        used = sum(1 for _ in small_disk.rglob("*")) + 1
        remount(small_disk, f"nr_inodes={used + free + 1}")
        live.set_state(start)
        ends_with_6(run, live)
        remount(small_disk, "nr_inodes=1000")
        live.set_state(start)
        assert_same_end(run_to_the_end(run, live), whole)


@pytest.mark.parametrize("limit", [30, 100, 1_000, 3_000])
def test_a_limit_of_what_a_file_may_hold(tmp_path: Path, limit: int) -> None:
    """`ulimit -f`, in a process of its own: exit 6 says the message, and not a traceback."""
    resource = pytest.importorskip("resource")
    run_to_the_end(tmp_path / "run", train={"epochs": 1})
    code = (
        "import sys; from pathlib import Path; from tests.faults.toy import run_to_the_end\n"
        "from finetune.errors import DiskError\n"
        "try: run_to_the_end(Path(sys.argv[1]))\n"
        "except DiskError as error: sys.exit(int(error.exit_code))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")],
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (6, "")

"""Kept hidden states: what went in comes out, for the very tokens it was put in for, while there is room."""

import contextlib
import os
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest

from backends import kept_states
from backends.kept_states import Activations


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_what_went_in_comes_out(dtype: str) -> None:
    kept, random = Activations(3, dtype), np.random.default_rng(0)
    rows = {
        n: (random.integers(0, 9, n).astype(np.int32), random.integers(0, 99, (n, 3)).astype(dtype)) for n in (4, 1, 7)
    }
    for row, states in rows.values():
        kept.put(row, states)
    batch = np.zeros((3, 8, 3), dtype)  # read straight into a padded batch
    for place, (n, (row, states)) in enumerate(rows.items()):
        assert kept.get(row, batch[place, :n])
        np.testing.assert_array_equal(batch[place, :n], states)
        assert not batch[place, n:].any()
    assert kept.bytes == 12 * 3 * np.dtype(dtype).itemsize


def test_other_tokens_are_not_kept() -> None:
    kept = Activations(2, np.float32)
    kept.put(tokens(1, 2, 3), np.ones((3, 2), np.float32))
    out = np.zeros((4, 2), np.float32)
    for other in (tokens(1, 2), tokens(1, 2, 4), tokens(1, 2, 3, 0)):
        assert not kept.get(other, out[: len(other)])
    assert not out.any()


def test_the_room_is_kept_to() -> None:
    kept = Activations(2, np.float32, limit=5 * 8)
    for row in (tokens(1, 2, 3), tokens(4, 5, 6), tokens(7, 8), tokens(1, 2, 3)):
        kept.put(row, np.full((len(row), 2), row[0], np.float32))
    assert kept.bytes == 5 * 8
    out = np.zeros((3, 2), np.float32)
    assert [kept.get(row, out[: len(row)]) for row in (tokens(1, 2, 3), tokens(4, 5, 6), tokens(7, 8))] == [1, 0, 1]


def test_a_full_disk_ends_the_keeping_and_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Activations(2, np.float32)
    kept.put(tokens(1), np.ones((1, 2), np.float32))

    class Full:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "_file", Full(kept._file))
    for _ in range(2):
        kept.put(tokens(2), np.ones((1, 2), np.float32))
    out = np.zeros((1, 2), np.float32)
    assert not kept.get(tokens(2), out) and kept.get(tokens(1), out) and out.all()
    assert kept.bytes == 8


def test_rows_that_pass_through_blocks_are_kept_at_the_end() -> None:
    kept, rows = Activations(2, np.float32, limit=0), [tokens(1, 2), tokens(3), tokens(1, 2)]
    assert [row.tolist() for row in kept.lacking(rows)] == [[1, 2], [3]]
    with kept.passing(rows[:2]) as passing:
        for value in (1.0, 5.0):
            for number, row in enumerate(rows[:2]):
                passing.put(number, np.full((len(row), 2), value + number, np.float32))
        assert passing.get(0).tolist() == [[5.0, 5.0], [5.0, 5.0]]
        assert not kept.get(rows[0], np.zeros((2, 2), np.float32))
    out = np.zeros((1, 2), np.float32)
    assert kept.lacking(rows) == [] and kept.get(tokens(3), out) and out.tolist() == [[6.0, 6.0]]
    assert kept.bytes == 3 * 2 * 4


def test_rows_that_do_not_come_to_the_end_are_not_kept_and_take_no_room() -> None:
    kept = Activations(2, np.float32)
    kept.put(tokens(9), np.ones((1, 2), np.float32))
    with pytest.raises(KeyboardInterrupt), kept.passing([tokens(1, 2)]) as passing:
        passing.put(0, np.ones((2, 2), np.float32))
        raise KeyboardInterrupt
    assert len(kept.lacking([tokens(1, 2), tokens(9)])) == 1 and kept.bytes == 8


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is reserved by POSIX's own call")
def test_a_disk_without_room_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Activations(2, np.float32)
    monkeypatch.setattr(kept_states.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match=r"full; .*TMPDIR") as error, kept.passing([tokens(1, 2)]):
        raise AssertionError("nothing is to be computed")
    assert error.value.errno == 28 and error.value.filename == kept_states.folder_on_disk() and kept.bytes == 0


@pytest.mark.parametrize(("free", "enough"), [(16, True), (15, False)])
def test_where_no_room_can_be_reserved_the_free_room_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, free: int, enough: bool
) -> None:
    kept = Activations(2, np.float32)
    monkeypatch.delattr(kept_states.os, "posix_fallocate", raising=False)
    monkeypatch.setattr(kept_states.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with contextlib.nullcontext() if enough else pytest.raises(OSError, match="TMPDIR"), kept.passing([tokens(1, 2)]):
        pass
    assert kept.bytes == (16 if enough else 0)


@pytest.mark.parametrize(
    ("mounts", "tmpdir", "folder"),
    [
        ({"/": "ext4", "/tmp": "tmpfs"}, None, "/var/tmp"),  # as Fedora, Arch and Debian 13 have it
        ({"/": "ext4"}, None, "/tmp"),
        ({"/": "tmpfs", "/tmp": "btrfs"}, None, "/tmp"),
        ({"/": "ext4", "/tmp": "tmpfs"}, "/tmp", "/tmp"),  # the user's own choice
        ({"/": "ext4", "/tm": "tmpfs"}, None, "/tmp"),
    ],
)
def test_kept_states_are_on_a_disk_and_not_in_memory(
    mounts: dict[str, str], tmpdir: str | None, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts.items()]
    monkeypatch.setattr(kept_states.psutil, "disk_partitions", lambda all: parts)
    monkeypatch.setattr(kept_states.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(kept_states.os, "access", lambda path, mode: True)
    monkeypatch.setattr(kept_states, "Path", PurePosixPath)
    monkeypatch.delenv("TMPDIR", raising=False)
    if tmpdir:
        monkeypatch.setenv("TMPDIR", tmpdir)
    assert kept_states.folder_on_disk() == folder

import errno
import json
import os
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save as serialise

from backends import registry
from backends.interface import FloatArray, TrainState
from finetune.disk.atomic import new_folder, recover, write_file
from finetune.disk.checkpoint import Checkpoint, check_tensors, load_newest, save
from finetune.disk.identity import check_identity
from finetune.disk.manifest import newest_good
from finetune.disk.safetensors_file import tensor_pieces
from finetune.errors import DiskError, Diverged, Incompatible

FILES = ("state.safetensors", "best.safetensors", "loop.json", "identity.json", "manifest.json")


def checkpoint(step: int, seed: int | None = None, best: bool = True, width: int = 5) -> Checkpoint:
    random = np.random.default_rng(step if seed is None else seed)
    adapter = {
        "model.layers.0.self_attn.q_proj.lora_A": random.standard_normal((2, width), dtype=np.float32),
        "model.layers.0.self_attn.q_proj.lora_B": random.standard_normal((3, 2), dtype=np.float32),
    }
    kinds = ("exp_avg", "exp_avg_sq")
    moments = {f"{name}.{kind}": tensor * tensor for name, tensor in adapter.items() for kind in kinds}
    loop = {"best_loss": 0.1 + 0.2, "best_step": None, "history": [[step, 1 / 3]], "micro_tokens": 512}
    return Checkpoint(TrainState(step, adapter, moments), loop, dict(adapter) if best else None, {"rank": 2})


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert left.state.step == right.state.step
    assert (left.loop, left.identity) == (right.loop, right.identity)
    assert (left.best is None) == (right.best is None)
    assert exact(left.best or {}) == exact(right.best or {})
    assert exact(left.state.adapter) == exact(right.state.adapter)
    assert exact(left.state.moments) == exact(right.state.moments)


def exact(tensors: Mapping[str, FloatArray]) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.dtype, tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


def loaded(folder: Path) -> Checkpoint:
    found, _ = load_newest(folder)
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("best", [True, False])
def test_round_trip_keeps_every_bit(tmp_path, best):
    saved = checkpoint(7, best=best)
    path = save(tmp_path / "checkpoints", saved)
    assert path.name == "step-00000007"
    found, messages = load_newest(tmp_path / "checkpoints")
    assert messages == []
    assert_same(found, saved)
    found.state.adapter["model.layers.0.self_attn.q_proj.lora_A"][0, 0] = 1.0  # may be written to


def test_same_state_same_bytes_whatever_the_order(tmp_path):
    one = checkpoint(3)
    state = TrainState(3, dict(reversed(one.state.adapter.items())), dict(reversed(one.state.moments.items())))
    two = Checkpoint(state, one.loop, dict(reversed(one.best.items())), one.identity)
    first, second = save(tmp_path / "a", one), save(tmp_path / "b", two)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.dictionaries(st.text("ab._", min_size=1, max_size=6), shapes, max_size=4)


@given(tensors, tensors, st.integers(0, 10**9), st.booleans())
def test_any_tensors_round_trip(tmp_path_factory, adapter_shapes, moment_shapes, step, transposed):
    def fill(all_shapes):
        random = np.random.default_rng(1)
        arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in all_shapes.items()}
        return {name: array.T if transposed else array for name, array in arrays.items()}

    folder = tmp_path_factory.mktemp("any")
    saved = Checkpoint(TrainState(step, fill(adapter_shapes), fill(moment_shapes)), {}, None, {})
    save(folder, saved)
    assert_same(loaded(folder), saved)


@given(tensors, st.text(max_size=3), st.booleans())
def test_the_file_is_the_one_that_safetensors_writes(named_shapes, name, transposed):
    random = np.random.default_rng(0)
    arrays = {
        name + more: np.asarray(random.standard_normal(shape, np.float32)) for more, shape in named_shapes.items()
    }
    given = {name: array.T if transposed else array for name, array in arrays.items()}
    whole = serialise({name: np.asarray(array, order="C") for name, array in given.items()})
    assert b"".join(tensor_pieces(given)) == whole


def peak_of(action: Callable[[], object]) -> int:
    """Bytes allocated on the way, beyond those in use before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_writing_nor_verifying_holds_what_it_writes(tmp_path):
    """So that a checkpoint takes the copy that a session gives, 12 bytes a number, and less than the update does."""
    random = np.random.default_rng(0)
    adapter = {f"layers.{i}.lora_A": random.standard_normal((8, 16_384), np.float32) for i in range(16)}
    moments = {f"{name}.{kind}": tensor for name, tensor in adapter.items() for kind in ("exp_avg", "exp_avg_sq")}
    numbers = sum(tensor.size for tensor in adapter.values())
    whole = Checkpoint(TrainState(2, adapter, moments), {}, adapter, {})
    for _ in range(2):  # the second over the first, which is verified on the way
        assert peak_of(lambda: save(tmp_path, whole)) < 0.5 * numbers
    assert peak_of(lambda: newest_good(tmp_path)) < 1e6
    assert all(registry.costs(name, "cpu").update > 12 + 0.5 for name in registry.NAMES)


def test_nothing_there(tmp_path):
    assert load_newest(tmp_path / "absent") == (None, [])
    assert load_newest(tmp_path) == (None, [])


def test_keeps_the_newest_that_verify(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, checkpoint(step))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "loop.json").unlink()
    save(tmp_path, checkpoint(4))  # 3 does not count: 2 is still needed
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_saving_behind_newer_ones_removes_none_of_them(tmp_path):
    for step in (8, 9, 5):
        save(tmp_path, checkpoint(step), keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000009"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, checkpoint(1))
    save(tmp_path, checkpoint(2))
    again = checkpoint(2, seed=99)
    save(tmp_path, again)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert_same(loaded(tmp_path), again)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


FAULTS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "emptied": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "lengthened": lambda data: data + b" ",
    "flipped": flip,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_falls_back_to_the_one_before(tmp_path, name, fault):
    before = checkpoint(1)
    save(tmp_path, before)
    target = save(tmp_path, checkpoint(2)) / name
    damaged = FAULTS[fault](target.read_bytes())
    if damaged is None:
        target.unlink()
    else:
        target.write_bytes(damaged)
    found, messages = load_newest(tmp_path)
    assert_same(found, before)
    assert len(messages) == 1
    assert name in messages[0]
    assert "step-00000002.broken" in messages[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002.broken"]
    assert load_newest(tmp_path)[1] == []


@pytest.mark.parametrize("name", FILES)
def test_every_single_byte_counts(tmp_path, name):
    target = save(tmp_path, checkpoint(2)) / name
    data = target.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 60)):
        target.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        assert load_newest(tmp_path)[0] is None, f"byte {place} of {name}"
        (tmp_path / "step-00000002.broken").rename(target.parent)
    target.write_bytes(data)
    assert load_newest(tmp_path)[0] is not None


def test_broken_ones_are_numbered(tmp_path):
    for _ in range(3):
        (save(tmp_path, checkpoint(2)) / "manifest.json").unlink()
        assert load_newest(tmp_path)[0] is None
    assert names(tmp_path) == [f"step-00000002.broken{end}" for end in ("", "-2", "-3")]


def test_extra_and_misplaced_files(tmp_path):
    path = save(tmp_path, checkpoint(2))
    (path / ".DS_Store").write_bytes(b"finder was here")
    assert load_newest(tmp_path)[1] == []
    (path / "more.json").write_text("{}")
    found, messages = load_newest(tmp_path)
    assert found is None
    assert "more.json does not belong there" in messages[0]


def test_a_renamed_checkpoint_is_not_another_step(tmp_path):
    save(tmp_path, checkpoint(2)).rename(tmp_path / "step-00000009")
    found, messages = load_newest(tmp_path)
    assert found is None
    assert "it is of step 2, not 9" in messages[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["adapter", "moments", "best", "loop"])
def test_nothing_that_is_not_finite_is_written(tmp_path, part, value):
    save(tmp_path, checkpoint(1))
    bad = checkpoint(2)
    if part == "loop":
        bad.loop["best_loss"] = float(value)
    else:
        held: Any = bad.best if part == "best" else getattr(bad.state, part)
        name = next(iter(held))
        held[name] = np.full_like(held[name], value)
    with pytest.raises(Diverged, match="step 2"):
        save(tmp_path, bad)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("part", ["best", "average"])
@pytest.mark.parametrize("kept", [0, 1])
def test_an_adapter_beside_the_state_has_all_its_tensors(part, kept):
    whole = checkpoint(1)
    check_tensors(replace(whole, **{part: whole.state.adapter}), Path("step-1"), "remove it")
    fewer = dict([*whole.state.adapter.items()][:kept])
    with pytest.raises(Incompatible, match=f"{part}.safetensors: other tensors than the adapter's; remove it"):
        check_tensors(replace(whole, **{part: fewer}), Path("step-1"), "remove it")


def test_identity_lists_every_difference():
    check_identity({"targets": ["q"], "rank": 2}, {"targets": ("q",), "rank": 2})
    with pytest.raises(Incompatible) as caught:
        check_identity({"rank": 2, "data_digest": "a", "seed": 0}, {"rank": 4, "data_digest": "a", "base": "b" * 90})
    text = str(caught.value)
    assert "rank: the checkpoint has 2, this run has 4" in text
    assert "seed: the checkpoint has 0, this run has no such key" in text
    assert "base: the checkpoint has no such key, this run has" in text
    assert "data digest" not in text


class Killed(BaseException):
    """The process is gone: from here on it can do nothing more, not even clean up."""


def hook_writes(monkeypatch, before: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Calls `before` ahead of every operation that changes the disk."""
    places = {
        os: ("write", "fsync", "unlink", "rmdir", "mkdir"),
        Path: ("write_bytes", "replace", "rename", "unlink", "mkdir"),
    }
    for owner, functions in places.items():
        for function in functions:
            real = getattr(owner, function)

            def hooked(*args, _real=real, _function=function, **kwargs):
                before(_function, args)
                return _real(*args, **kwargs)

            monkeypatch.setattr(owner, function, hooked)


def kill_at(monkeypatch, moment: int, half: bool, action: Callable[[], object]) -> bool:
    """Runs `action`, killed at its `moment`-th disk operation (a write by half done). True: it got to the end."""
    count = 0

    def before(function: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        if count == moment and half and function == "write":
            real_write(args[0], args[1][: len(args[1]) // 2])
        if count >= moment:
            raise Killed

    real_write = os.write
    with monkeypatch.context() as patch:
        hook_writes(patch, before)
        try:
            action()
        except Killed:
            return False
    return count < moment


SLOW_WIDTHS = [pytest.param(width, marks=pytest.mark.slow) for width in (2_000, 300_000)]


@pytest.mark.parametrize("width", [5, *SLOW_WIDTHS])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("step", [3, 2], ids=["next", "same"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step, half, width):
    old, new = checkpoint(2, width=width), checkpoint(step, seed=99, width=width)
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        save(folder, checkpoint(1))
        save(folder, old)
        done = kill_at(monkeypatch, moment, half, lambda folder=folder: save(folder, new))
        found, messages = load_newest(folder)
        assert messages == [], f"killed at operation {moment}"
        fresh = found.state.step == 3 or exact(found.state.adapter) == exact(new.state.adapter)
        assert_same(found, new if fresh else old)
        assert all(name.startswith("step-") for name in names(folder)), "leftovers"
        save(folder, new)
        assert_same(loaded(folder), new)
        if done:
            break
    assert done
    assert moment > 15  # or the hooks no longer see the writer's operations


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_full_or_closed_disk(tmp_path, monkeypatch, code):
    old = checkpoint(1)
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        save(folder, old)
        count = 0

        def before(function: str, args: tuple[Any, ...], moment: int = moment) -> None:
            nonlocal count
            count += 1
            if count == moment:
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            hook_writes(patch, before)
            try:
                save(folder, checkpoint(2), keep=1)
            except DiskError as error:
                assert str(folder) in str(error)
                assert "bytes free" in str(error)
                assert error.exit_code == 6
        assert not any(name.startswith(".") for name in names(folder)), "the temporary folder stays"
        found, messages = load_newest(folder)
        assert messages == [] or found.state.step == 2  # an old one half removed, with the new one in place
        assert_same(found, checkpoint(2) if found.state.step == 2 else old)
        if count < moment:
            break
    assert 10 < moment < 199


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_write_file_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a [1].json"
    write_file(path, "één")
    assert path.read_bytes() == "één".encode()
    for moment in range(1, 20):
        done = kill_at(monkeypatch, moment, False, lambda: write_file(path, b"two"))
        recover(path.parent)
        assert names(path.parent) == [path.name]
        assert path.read_bytes() in ("één".encode(), b"two")
        if done:
            break
    assert done
    assert path.read_bytes() == b"two"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_file_survives_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    write_file(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_path_through_a_file(tmp_path):
    write_file(tmp_path / "a", "")
    with pytest.raises(DiskError, match="choose another"):
        write_file(tmp_path / "a" / "b", "")
    with pytest.raises(DiskError, match="choose another"), new_folder(tmp_path / "a" / "b"):
        pass


def test_new_folder_nests_and_leaves_its_neighbours(tmp_path):
    (tmp_path / ".other.00000000.new").mkdir()
    (tmp_path / ".run.00000000.new").mkdir()
    with new_folder(tmp_path / "run") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(json.dumps(1))
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == [".other.00000000.new", "run"]
    assert (tmp_path / "run" / "sub" / "file").read_text() == "1"

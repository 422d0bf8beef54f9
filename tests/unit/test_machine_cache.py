"""What was said of a machine is not asked again, unless the machine, the libraries or the day are others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from backends import machine_cache, registry
from backends import registry_process as apart_module
from backends.interface import BackendError, LoraSpec, ModelSpec
from backends.machine_cache import DAY, Remembered, folder_stamp, stamp
from backends.registry_process import Apart


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "machine.json"


def test_a_second_command_starts_no_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Apart(Remembered(file))
    told = {name: first.answer(first.ask(name, "reference", "cpu")) for name in ("describe", "unused_accelerator")}
    assert first.answer(first.ask("choose", "reference")) == "reference"
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        first.answer(first.ask("choose", "cuda"))
    first.end()

    monkeypatch.setattr(apart_module, "_started", lambda: pytest.fail("a process is started"))
    second = Apart(Remembered(file))
    monkeypatch.setattr(apart_module, "_other", [second])
    monkeypatch.setattr(registry, "load", lambda name: pytest.fail("this process loads a backend"))
    assert {name: second.answer(second.ask(name, "reference", "cpu")) for name in told} == told
    assert registry.choose("reference") == "reference"
    assert abs((registry.free_bytes("reference", "cpu") or 0) / registry.available_bytes() - 1) < 0.2
    with pytest.raises(pytest.fail.Exception):
        second.ask("choose", "cuda")


@pytest.mark.parametrize("name", ["device_bytes", "logprobs", "timed_rate"])
def test_what_changes_by_itself_or_with_the_model_is_not_kept(file: Path, name: str) -> None:
    kept = Remembered(file)
    kept.put(name, ("reference",), 7)
    assert kept.get(name, ("reference",)) == (False, None) and not file.exists()


def test_a_reason_why_a_backend_does_not_work_is_not_kept(file: Path) -> None:
    kept = Remembered(file)
    kept.put("probe", ("torch",), "not installed")
    kept.put("probe", ("mlx",), None)
    assert Remembered(file).get("probe", ("torch",)) == (False, None)
    assert Remembered(file).get("probe", ("mlx",)) == (True, None)


def test_an_answer_holds_for_a_day(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e9]
    monkeypatch.setattr(machine_cache.time, "time", lambda: now[0])
    Remembered(file).put("choose", ("auto",), "torch")
    for later, known in ((0, True), (DAY - 1, True), (DAY, False), (-1, False)):  # a clock may be set back
        now[0] = 1e9 + later
        assert Remembered(file).get("choose", ("auto",))[0] is known


@pytest.mark.parametrize(
    "changed",
    [
        lambda patch: patch.setenv("CUDA_VISIBLE_DEVICES", "7"),
        lambda patch: patch.setenv("OMP_NUM_THREADS", "77"),
        lambda patch: patch.setattr(machine_cache, "_installed", lambda: [("torch-9.9.dist-info", 1)]),
        lambda patch: patch.setattr(machine_cache, "_text", lambda file: "another boot, another driver"),
        lambda patch: patch.setattr(machine_cache, "_DEVICES", ("null",)),
        lambda patch: patch.setattr(machine_cache.os, "sched_getaffinity", lambda process: {77}, raising=False),
        lambda patch: patch.setattr(machine_cache.sys, "prefix", "elsewhere"),
    ],
    ids=["visible cards", "threads", "versions", "boot and driver", "devices", "processors", "environment"],
)
def test_another_machine_is_asked_anew(file: Path, monkeypatch: pytest.MonkeyPatch, changed: object) -> None:
    Remembered(file).put("choose", ("auto",), "torch")
    assert Remembered(file).get("choose", ("auto",)) == (True, "torch")
    changed(monkeypatch)
    assert Remembered(file).get("choose", ("auto",)) == (False, None)


def test_a_package_that_is_installed_or_put_in_its_own_place_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    stamps = [stamp()]
    for change in (
        lambda: (tmp_path / "torch-2.13.0.dist-info").mkdir(),
        lambda: (tmp_path / "torch-2.13.0.dist-info").rename(tmp_path / "torch-2.14.0.dist-info"),
        lambda: (tmp_path / "torch-2.14.0.dist-info" / "RECORD").write_text("of a new build"),
        lambda: (tmp_path / "mlx-0.32.4.dist-info").mkdir(),
    ):
        change()
        stamps.append(stamp())
    assert len(set(stamps)) == 5


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"machine": 3}', "[" * 100_000, '"\\ud800"'])
def test_a_file_of_nonsense_is_as_none(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    kept = Remembered(file)
    assert kept.get("choose", ("auto",)) == (False, None)
    kept.put("choose", ("auto",), "mlx")
    assert Remembered(file).get("choose", ("auto",)) == (True, "mlx")


@pytest.mark.parametrize("entry", [None, 3, ["torch"], ["torch", "late"], {"torch": 1}])
def test_an_entry_of_nonsense_is_as_none(file: Path, entry: object) -> None:
    Remembered(file).put("choose", ("auto",), "torch")
    whole = json.loads(file.read_text())
    whole["answers"] = dict.fromkeys(whole["answers"], entry)
    file.write_text(json.dumps(whole))
    assert Remembered(file).get("choose", ("auto",)) == (False, None)


def test_a_model_that_a_library_knows_is_asked_of_again_when_a_file_of_it_changes(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def question(rank: int = 4) -> tuple[object, ...]:
        return "auto", ModelSpec(folder), LoraSpec(rank, 8.0), folder_stamp(folder)

    Remembered(file).put("check_chosen", question(), None)
    assert Remembered(file).get("check_chosen", question()) == (True, None)
    assert Remembered(file).get("check_chosen", question(rank=5)) == (False, None)
    changes = (
        lambda: (folder / "config.json").write_text("[]"),
        lambda: (folder / "model.safetensors").write_text(""),
        lambda: (folder / "config.json").rename(folder / "config.old"),
        lambda: os.utime(folder / "config.old", (1, 1)),
    )
    for change in changes:
        Remembered(file).put("check_chosen", question(), None)
        change()
        assert Remembered(file).get("check_chosen", question()) == (False, None)


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Remembered(tmp_path / "file" / "machine.json").put("choose", ("auto",), "torch")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_the_rate_of_a_processor_is_timed_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "asks_apart", lambda: True)
    monkeypatch.setattr(registry, "describe", lambda name, device: {"device": "cpu"})
    monkeypatch.setattr(registry, "relative_rate", lambda name, number_type: 1.5)
    monkeypatch.setattr(registry, "_numpy_rate", lambda: 2e9)
    assert registry.measured_rate("torch", "float32") == 3e9
    monkeypatch.setattr(registry, "describe", lambda name, device: {"device": "cuda: a card"})
    monkeypatch.setattr(registry, "timed_rate", lambda name, number_type, device: 5e13)
    assert registry.measured_rate("torch", "bfloat16") == 5e13

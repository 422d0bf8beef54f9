"""The registry: it loads nothing unasked, never raises from a probe, and chooses the machine's own backend."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from backends import registry, table
from backends.interface import BackendError, LoraSpec, ModelSpec, OptimSpec

ROOT = Path(__file__).parents[2]


PREDICTS_ALL = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {"torch", "mlx", "mlx_lm", "transformers", "peft", "bitsandbytes"}:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
from backends import registry
assert len(registry.machines()) >= 5
for name in registry.NAMES:
    assert registry.costs(name, "cpu").device == "cpu"
    registry.shortcuts(name), registry.four_bit(name)
assert all(registry.costs(name, "gpu").four_bit for name, _ in registry.machines())
assert registry.probe("torch") and registry.probe("mlx")
"""


def test_importing_it_and_predicting_need_no_framework() -> None:
    """A MacBook is predicted on a machine without MLX, and a GPU of NVIDIA on one without torch."""
    done = subprocess.run([sys.executable, "-c", PREDICTS_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_predicted_belongs_to_a_device() -> None:
    for name in registry.NAMES:
        for device in ("cpu", "gpu"):
            if name == "reference" and device == "gpu":
                with pytest.raises(BackendError, match="does not compute on a gpu"):
                    registry.costs(name, device)
            else:
                assert registry.costs(name, device).device == device


def test_probe_gives_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.BACKENDS, "mlx", table.Row("backends.not_there", "backends.not_there"))
    reason = registry.probe("mlx")
    assert reason is not None and 'pip install "recipe-finetune[mlx]"' in reason
    assert "no backend 'cuda'" in (registry.probe("cuda") or "")
    assert registry.probe("reference") is None


@pytest.mark.parametrize("error", [OSError("libcudart.so.12: cannot open"), RuntimeError("wrong driver"), KeyError(1)])
def test_probe_survives_a_broken_library(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr(registry, "load", broken)
    assert str(error) in (registry.probe("torch") or "")


@pytest.mark.parametrize(
    ("machine", "broken", "expected"),
    [
        (("Darwin", "arm64"), (), "mlx"),
        (("Darwin", "arm64"), ("mlx",), "torch"),
        (("Darwin", "x86_64"), (), "torch"),
        (("Linux", "x86_64"), (), "torch"),
        (("Linux", "x86_64"), ("torch",), "mlx"),
        (("Windows", "AMD64"), (), "torch"),
    ],
)
def test_auto_is_the_machines_own(
    machine: tuple[str, str], broken: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: machine[0])
    monkeypatch.setattr(platform, "machine", lambda: machine[1])
    monkeypatch.setattr(registry, "probe", lambda name: "it is broken" if name in broken else None)
    assert registry.choose("auto") == expected


def test_a_third_backend_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference under another name: it is chosen, described, planned with and opened like any other."""
    monkeypatch.setitem(table.BACKENDS, "third", table.Row("backends.reference", "backends.reference"))
    monkeypatch.setattr(registry, "probe", lambda name: None if name == "third" else "it is broken")
    assert "third" in registry.automatic()
    assert registry.choose("auto") == "third"
    assert registry.describe("third")["device"] == "cpu"
    assert registry.costs("third", "cpu").runtime > 0


def test_without_any_backend_every_reason_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "probe", lambda name: None if name == "reference" else f"{name} is broken.")
    with pytest.raises(BackendError, match=r"torch is broken.*mlx is broken|mlx is broken.*torch is broken"):
        registry.choose("auto")
    with pytest.raises(BackendError, match="mlx is broken"):
        registry.choose("mlx")
    with pytest.raises(BackendError, match="torch is broken"):
        registry.open_session("torch", ModelSpec(Path()), LoraSpec(4, 8.0), OptimSpec(), 0)
    assert registry.choose("reference") == "reference"

"""The registry: it loads nothing unasked, never raises from a probe, and chooses the machine's own backend."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from backends import registry
from backends.interface import BackendError, LoraSpec, ModelSpec, OptimSpec


def test_importing_it_loads_no_framework() -> None:
    heavy = "{'torch', 'mlx', 'mlx_lm', 'transformers', 'peft', 'bitsandbytes'}"
    program = f"import sys; from backends import registry; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


def test_probe_gives_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.NAMES, "mlx", "backends.not_there")
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


def test_without_any_backend_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "probe", lambda name: None if name == "reference" else f"{name} is broken.")
    with pytest.raises(BackendError, match=r"torch is broken.*mlx is broken|mlx is broken.*torch is broken"):
        registry.choose("auto")
    with pytest.raises(BackendError, match="mlx is broken"):
        registry.choose("mlx")
    with pytest.raises(BackendError, match="torch is broken"):
        registry.open_session("torch", ModelSpec(Path()), LoraSpec(4, 8.0), OptimSpec(), 0)
    assert registry.choose("reference") == "reference"

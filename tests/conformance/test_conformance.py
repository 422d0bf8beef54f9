"""Every backend, the same tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from backends import registry
from backends.interface import Backend, BackendError, Session, ThisMachine
from tests.conformance.checks import CHECKS
from tests.conformance.toy import BACKENDS, REAL_BACKENDS, Case

Usable = Callable[[str], None]
WITHOUT_4BIT = {"reference"}


def holdings() -> list[Any]:
    return [
        pytest.param(name, quantize, id=f"{name}-{quantize}")
        for name in BACKENDS
        for quantize in ("none", "4bit")
        if quantize == "none" or name not in WITHOUT_4BIT
    ]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "quantize"), holdings())
def test_keeps_the_contract(name: str, quantize: str, check: str, tiny_folder: Path, usable: Usable) -> None:
    usable(name)
    CHECKS[check](Case(name, tiny_folder, quantize))


@pytest.mark.parametrize("name", REAL_BACKENDS)
def test_base_weights_that_are_not_quantised_are_those_of_the_file(
    name: str, tiny_folder: Path, usable: Usable
) -> None:
    usable(name)
    session, file = Case(name, tiny_folder).open(), load_file(tiny_folder / "model.safetensors")
    for module in (*session.lora_shapes, "model.embed_tokens", "lm_head"):
        np.testing.assert_array_equal(session.base_weight(module), file[f"{module}.weight"])


@pytest.mark.parametrize("name", REAL_BACKENDS)
def test_the_original_in_place_of_the_dequantised_weight_is_found(
    name: str, tiny_folder: Path, usable: Usable, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable(name)
    case, file = Case(name, tiny_folder, "4bit"), load_file(tiny_folder / "model.safetensors")
    monkeypatch.setattr(type(case.open()), "base_weight", lambda session, module: file[f"{module}.weight"].copy())
    with pytest.raises(AssertionError):
        CHECKS["base_weights_are_what_is_multiplied_with"](case)


@pytest.mark.parametrize("name", registry.NAMES)
def test_has_the_signatures_of_the_protocols(name: str, tiny_folder: Path, usable: Usable) -> None:
    usable(name)
    module, session = registry.load(name), Case(name, tiny_folder).open()
    for method in (*_methods(ThisMachine), *_methods(Backend)):
        assert _parameters(getattr(module, method)) == _parameters(getattr(Backend, method))[1:], method
    for method in _methods(Session):
        assert _parameters(getattr(type(session), method)) == _parameters(getattr(Session, method)), method


@pytest.mark.parametrize("name", registry.NAMES)
def test_describes_itself(name: str, usable: Usable) -> None:
    usable(name)
    facts = registry.describe(name)
    assert {key: type(value) for key, value in facts.items()} == {
        "device": str,
        "versions": dict,
        "4bit": bool,
        "checkpointing": bool,
        "half": str,
        "others": str,
    }
    assert facts["4bit"] == (name not in WITHOUT_4BIT) or facts["device"].startswith("mps")


@pytest.mark.parametrize("name", sorted(WITHOUT_4BIT))
def test_refuses_4bit_it_does_not_have(name: str, tiny_folder: Path) -> None:
    with pytest.raises(BackendError, match="quantize"):
        Case(name, tiny_folder, "4bit").open()


def _methods(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]

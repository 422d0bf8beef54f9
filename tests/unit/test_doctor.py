"""`doctor`: plain English of every backend, and exit code 7 where none works."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from backends import registry
from finetune.commands.doctor import described, run
from finetune.errors import EnvironmentProblem


def test_a_backend_is_described_in_words() -> None:
    wanted = f"cpu; 4-bit: no; activation recomputation: no; numpy {np.__version__}"
    assert described("reference") == [wanted]


@pytest.mark.parametrize("able", [True, False])
def test_abilities_are_yes_or_no(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"device": "gpu: Some GPU", "versions": {"a": "1", "b": "2"}, "4bit": able, "checkpointing": not able}
    facts["others"] = ""
    monkeypatch.setattr(registry, "describe", lambda name, device: facts)
    monkeypatch.setattr(registry, "unused_accelerator", lambda name, device: None)
    words = ("yes", "no") if able else ("no", "yes")
    assert described("any") == [f"gpu: Some GPU; 4-bit: {words[0]}; activation recomputation: {words[1]}; a 1, b 2"]


def test_of_several_cards_it_is_told_which_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    machine, names = importlib.import_module("backends.torch_backend.machine"), ("RTX 4090", "RTX 4060")
    monkeypatch.setattr(machine, "pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(machine, "half_type", lambda device: "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: names[getattr(card, "index", card)])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(registry, "describe", lambda name, device: machine.describe(device))
    monkeypatch.setattr(registry, "unused_accelerator", lambda name, device: None)
    for count in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        told = described("torch")
        assert told[0].startswith("cuda: RTX 4090") and len(told) == count
    assert told[1].startswith("2 cards (0: RTX 4090, 1: RTX 4060), of which 0 is used; CUDA_VISIBLE_DEVICES")
    assert "--devices 2" in told[1]


def test_every_backend_has_a_row_with_its_shortcuts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"mlx": "it is not installed"}
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(registry, "probe", broken.get)
    monkeypatch.setattr(registry, "describe", lambda name, device: registry.load("reference").describe())
    monkeypatch.setattr(registry, "unused_accelerator", lambda name, device: None)
    run()
    out = capsys.readouterr().out
    assert all(name in out for name in registry.NAMES) and "it is not installed" in out
    assert ", ".join(registry.shortcuts("torch")) in out and ", ".join(registry.shortcuts("mlx")) not in out
    assert "True" not in out and "False" not in out


def test_no_backend_but_the_reference_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "probe", lambda name: None if name == "reference" else "it is broken")
    with pytest.raises(EnvironmentProblem, match="no backend works here") as error:
        run()
    assert error.value.exit_code == 7 and "it is broken" in capsys.readouterr().out

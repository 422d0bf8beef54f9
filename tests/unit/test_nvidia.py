"""A card that is there and not used is told, with the reason and the remedy; nothing is said where there is none."""

from __future__ import annotations

import ctypes
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from backends import nvidia, registry
from backends.interface import BackendError
from finetune.commands.doctor import described
from finetune.commands.train import run
from finetune.recipe.schema import Data, Model, Recipe
from finetune.training.job import refuse_unused_accelerator

RECIPE = Recipe(model=Model(path="builtin:reviews-base"), data=Data(train="reviews.csv"), backend="torch")


def library(cards: int = 1, cuda: int = 13000, error: int = 0, capability: tuple[int, int] = (8, 9)) -> Any:
    """The functions of the driver's library that are called, as cuda.h describes them."""

    def fill(pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: error,
        cuDriverGetVersion=lambda pointer: fill(pointer, cuda),
        cuDeviceGetCount=lambda pointer: fill(pointer, cards),
        cuDeviceGet=lambda pointer, number: fill(pointer, number),
        cuDeviceGetAttribute=lambda pointer, name, card: fill(pointer, capability[{75: 0, 76: 1}[name]]),
    )


def install(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    def load(name: str) -> Any:
        if found is None:
            raise OSError("no such library")
        return found

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize("found", [None, library(0), library(error=100), library(error=34)])
def test_without_a_card_nothing_is_said(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    install(monkeypatch, found)
    assert nvidia.driver() is None
    assert nvidia.unused_by("torch 2.13.0+cpu", None, lambda found: "install it") is None


@pytest.mark.parametrize(
    ("found", "built_for", "words"),
    [
        (library(), None, ["an NVIDIA card is in this machine", "is a build for the CPU", "INSTALL"]),
        (library(2), None, ["2 NVIDIA cards are in"]),
        (library(cuda=12080), "13.0", ["needs a driver for CUDA 13.0", "ends at CUDA 12.8", "update", "INSTALL 8.9"]),
        (
            library(cuda=11080),
            "13.0",
            ["needs a driver for CUDA 13.0; update the NVIDIA driver, which ends at CUDA 11.8"],
        ),
        (library(cuda=11080), None, ["is a build for the CPU; update the NVIDIA driver, which ends at CUDA 11.8"]),
        (library(cuda=13000), "13.0", ["does not find it", "nvidia-smi"]),
        (library(cuda=12040), "12.8", ["does not find it"]),  # drivers run every release of their major version
        (library(error=803), "13.0", ["CUDA error 803", "restart"]),
    ],
)
def test_why_a_card_is_not_used(
    monkeypatch: pytest.MonkeyPatch, found: Any, built_for: str | None, words: list[str]
) -> None:
    install(monkeypatch, found)

    def build(found: nvidia.Driver) -> str | None:
        return "INSTALL {}.{}".format(*found.capability) if found.cuda >= (12, 0) else None

    said = nvidia.unused_by("torch 2.13.0", built_for, build)
    assert said is not None and all(word in said for word in words), said


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_build_for_the_cpu_beside_a_card(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if registry.probe(name) or registry.describe(name)["device"] != "cpu":
        pytest.skip(f"{name} uses a GPU here, or is not there")
    install(monkeypatch, library())
    said = registry.unused_accelerator(name)
    assert said is not None and "NVIDIA card" in said and said in described(name)
    assert registry.unused_accelerator(name, "cpu") is None and "NVIDIA" not in described(name, "cpu")
    install(monkeypatch, None)
    assert registry.unused_accelerator(name) is None and "NVIDIA" not in described(name)


@pytest.mark.parametrize(
    ("cuda", "capability", "index"),
    [
        (13000, (8, 9), "cu130"),
        (12080, (8, 9), "cu126"),
        (12080, (12, 0), "cu129"),  # code for Blackwell came with CUDA 12.8
        (13000, (6, 1), "cu126"),  # builds for CUDA 13 begin at Turing
        (13000, (7, 0), "cu126"),
        (12080, (7, 5), "cu126"),
    ],
)
def test_torch_for_a_card_is_a_command(
    cuda: int, capability: tuple[int, int], index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    cards = importlib.import_module("backends.torch_backend.cards")
    install(monkeypatch, library(cuda=cuda, capability=capability))
    monkeypatch.setattr(torch.version, "cuda", None)
    said = cards.unused_card()
    assert said.endswith(f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}")
    install(monkeypatch, library(cuda=11080, capability=capability))
    assert "pip" not in cards.unused_card()


def test_training_beside_an_unused_card_needs_device_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if registry.probe("torch") or registry.describe("torch")["device"] != "cpu":
        pytest.skip("torch uses a GPU here, or is not there")
    install(monkeypatch, library())
    with pytest.raises(BackendError, match=r"NVIDIA card.*device=cpu"):  # before any data is looked for
        run(RECIPE, "run")
    refuse_unused_accelerator(RECIPE.model_copy(update={"device": "cpu"}))
    install(monkeypatch, library(0))
    refuse_unused_accelerator(RECIPE)


def test_the_reference_backend_knows_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, library())
    assert registry.unused_accelerator("reference") is None

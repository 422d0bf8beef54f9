"""This machine as torch sees it. Imports torch, but not transformers."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from backends.interface import Wanted
from backends.torch_backend.cards import several_cards, unused_card
from backends.torch_backend.device import device_name, free_of, half_type, pick_device


def probe() -> str | None:
    return None  # usable where the imports above work; the registry reports one that fails


def unused_accelerator() -> str | None:
    return None if pick_device("auto").type != "cpu" else unused_card()


def describe(device: Wanted = "auto") -> dict[str, Any]:
    picked = pick_device(device)
    packages = ("torch", "transformers", "bitsandbytes", "accelerate")
    versions = {name: version(name) for name in packages if find_spec(name)}
    four_bit = "bitsandbytes" in versions and picked.type != "mps"
    facts = {"device": device_name(picked), "versions": versions, "4bit": four_bit, "checkpointing": True}
    return facts | {"half": half_type(picked), "others": several_cards() if picked.type == "cuda" else ""}


def free_bytes(device: Wanted = "auto") -> int | None:
    return free_of(pick_device(device))

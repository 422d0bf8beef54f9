"""NVIDIA's cards and this build of torch: whether it has code for a card, and which build has."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from backends.nvidia import driver, unused_by

_INDEX = "https://download.pytorch.org/whl/"
# Builds of torch 2.8 and later by the newest CUDA version of the drivers that run them, the newest first, each with the
# compute capabilities that it has code for, as torch.cuda.PYTORCH_RELEASES_CODE_CC says of 2.13.
_BUILDS = (
    ((13, 0), "cu130", (7, 5), (99, 9)),
    ((12, 0), "cu126", (5, 0), (9, 0)),
    ((12, 0), "cu129", (7, 5), (99, 9)),
)
Capability = tuple[int, int]


def has_code(capability: Capability, compiled: Sequence[str]) -> bool:
    """Whether code for these architectures runs on such a card.

    Machine code ("sm_86") runs on cards of its major version, from its minor one on; PTX ("compute_90") is compiled for
    every later card. Nothing named: not known, and taken to run.
    """
    major, minor = capability
    for name in compiled:
        kind, _, number = name.partition("_")
        built = divmod(int(number.rstrip("af")), 10)
        if (built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return True
    return not compiled


def card_without_code() -> tuple[str, Capability] | None:
    """The name and compute capability of the card that torch finds and has no code for; None: there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():  # AMD's cards have names of their own
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it, and fails at its first kernel
        device = torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(device)
    if has_code(capability, torch.cuda.get_arch_list()):
        return None
    return torch.cuda.get_device_name(device), capability


def unused_card() -> str | None:
    """Why torch, which uses no card, does not use the one that is there; None: there is none."""
    name = f"torch {torch.__version__}"
    if (card := card_without_code()) is None:
        return unused_by(name, torch.version.cuda, lambda here: build_for(here.cuda, here.capability))
    (called, capability), here = card, driver()
    remedy = build_for(here.cuda if here else (13, 0), capability) or "no build of torch has it"
    return (
        f"{called} is in this machine and not used: {name} has no code for its compute capability, "
        f"{capability[0]}.{capability[1]}; {remedy}"
    )


def build_for(cuda: tuple[int, int], capability: Capability) -> str | None:
    """The command that installs a build for such a card, and for drivers up to that version; None: there is none."""
    for needed, build, first, last in _BUILDS:
        if cuda >= needed and first <= capability <= last:
            return f"pip install --force-reinstall torch --index-url {_INDEX}{build}"
    return None


def several_cards() -> str:
    """Which of several cards is used, and how another is chosen; empty where there are fewer."""
    count = torch.cuda.device_count()
    if count < 2:
        return ""
    names = ", ".join(f"{number}: {torch.cuda.get_device_name(number)}" for number in range(count))
    return (
        f"{count} cards ({names}), of which {torch.cuda.current_device()} is used; CUDA_VISIBLE_DEVICES=NUMBER lets "
        f"another be the only one, and --devices {count} uses all"
    )

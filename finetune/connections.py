"""Refuses network connections that the user did not ask for.

Nothing but a hub id in the recipe, and the data of `benchmark`'s tasks, needs the network. An audit hook of Python sees
each name that is looked up and each address that a socket connects or sends to. What leads beyond this machine is
refused, but for the hub's hosts while a model or data are fetched from there. What a library in C or Rust sends over
sockets of its own (torch.distributed, hf_xet) the hook cannot see.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finetune.errors import EnvironmentProblem
from finetune.streams import showing_bars
from finetune.text import harmless

# Set where the user has not: the libraries then do not even try.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_HUB = ("huggingface.co", "hf.co")  # the hub and where it keeps its files
_HOW = "sys.addaudithook in the process that wrote this: socket.connect, sendto and sendmsg, and names looked up"
_ADDRESSED = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_NAMED = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}

_watching = False
_ours: set[str] = set()  # the variables of _OFFLINE that we have set
_allowed: tuple[str, ...] = ()  # hosts that may be reached now, and those below them
_reached: list[str] = []  # a host or an address for each connection beyond this machine
_refused: list[str] = []  # a sentence for each


def watch() -> None:
    """From now on this process reaches nothing beyond this machine, but inside `to_hub`."""
    global _watching
    if _watching:
        return
    _watching = True
    for name, value in _OFFLINE.items():
        if name not in os.environ and "TRANSFORMERS_OFFLINE" not in os.environ:
            os.environ[name] = value
            _ours.add(name)
    sys.addaudithook(_hook)


def account() -> dict[str, Any]:
    """For report.json: how many connections left this machine, where to, and how that is known."""
    if not _watching:
        return {"connections": None, "connections_to": [], "connections_watched": "not watched"}
    return {"connections": len(_reached), "connections_to": sorted(set(_reached)), "connections_watched": _HOW}


def check() -> None:
    """Raises EnvironmentProblem where a library has tried to connect, even if it then went on without."""
    if _refused:
        raise EnvironmentProblem(_refused[0])


@contextmanager
def to_hub() -> Iterator[None]:
    """Inside, the hub may be reached, unless the user has set HF_HUB_OFFLINE."""
    global _allowed
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    _allowed = (*_HUB, *(urlsplit(one).hostname or "" for one in (constants.ENDPOINT, *getproxies().values())))
    try:
        _set_offline(False)
        with showing_bars():
            yield
    finally:
        _allowed = ()
        _set_offline(True)


def _set_offline(offline: bool) -> None:
    """For libraries that are imported already, and those that will be; nothing where the user has decided."""
    for name in _ours & {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}:
        os.environ.pop(name, None)
        if offline:
            os.environ[name] = _OFFLINE[name]
        for module in ("huggingface_hub.constants", "datasets.config"):
            if hasattr(sys.modules.get(module), name):
                setattr(sys.modules[module], name, offline)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises EnvironmentProblem, from within whatever wants to connect."""
    if event in _ADDRESSED:
        host = _addressee(*arguments[:2])
    elif event in _NAMED:
        host = _text(arguments[0])
        if _address(host) and event != "socket.gethostbyaddr":  # written as numbers, it needs no looking up
            return
    else:
        return
    if host is None or _is_here(host):
        return
    if any(host == name or host.endswith(f".{name}") for name in _allowed if name) or (_allowed and _address(host)):
        if event in _ADDRESSED:  # the name that an address came from was looked up by the same rule
            _reached.append(host)
        return
    why = "the recipe asks for the hub alone" if _allowed else "model and data are on this machine"
    tried = f"{_library(sys._getframe(1))} tried to reach {harmless(host)}"
    sentence = f"{tried}, and {why}. Nothing was sent: update that library, or switch off what it sends"
    _refused.append(sentence)
    raise EnvironmentProblem(sentence)


def _addressee(sender: socket.socket, address: Any) -> str | None:
    """The host of an internet address; None for sockets that stay on the machine."""
    if sender.family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple):
        return None
    return _text(address[0])


def _text(host: Any) -> str:
    name = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host or "")
    return name.rstrip(".").lower()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_here(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    if host in ("", "localhost", "ip6-localhost", "ip6-loopback") or host.endswith(".localhost"):
        return True
    address = _address(host)
    if address is None:
        return host == socket.gethostname().lower()
    if address.is_loopback or address.is_unspecified:
        return True
    import psutil

    own = (one.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for one in addresses)
    return host.partition("%")[0] in own


def _library(frame: FrameType | None) -> str:
    """The library that our code called, and that led here; in a thread of its own, the outermost one."""
    found, last = "", ""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in ("finetune", "backends") and frame.f_globals.get("__name__") != __name__:
            break
        last = package or last
        if package not in sys.stdlib_module_names and package not in ("finetune", "__main__"):
            found = package
        frame = frame.f_back
    return found or last or "a library"

"""Damage for files from elsewhere, and what must hold while they are read."""

from __future__ import annotations

import copy
import json
import random
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save

from backends.interface import BackendError, IncompatibleState
from finetune.errors import FinetuneError

REFUSALS = (BackendError, FinetuneError, IncompatibleState)
SECONDS, MEMORY = 2.0, 512 * 2**20
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1e308, float("nan"), "", "x" * 5000, "../../etc/passwd", "/etc/passwd", "a\0b",
    "os.system", [], [[]], {}, {"r": {"r": {}}}, [1, "2", None],
)  # fmt: skip
_watching: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    if event in ("os.system", "os.exec", "os.fork", "pickle.find_class", "socket.connect", "socket.getaddrinfo"):
        _watching.append(f"{event} {arguments!r:.100}")
    if event == "open" and "canary" in str(arguments[0]):
        _watching.append(f"open {arguments[0]}")


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)


def spent() -> float:
    """Seconds of processor time: this process, its children that ended and those that run."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


@contextmanager
def harmless() -> Iterator[None]:
    """No code run, no canary file opened, no more than 512 MB more than before, and 2 s of processor time.

    Of processor time, ours and our children's, so that a busy machine makes no test fail. What a child had spent
    before, to start, is not counted when it ends here.
    """
    global _watching

    before, began, _watching = resource.getrlimit(resource.RLIMIT_AS), spent(), []
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    try:
        yield
    finally:
        seen, _watching = _watching, None
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert seen == []
    assert spent() - began < SECONDS


def refused(call: Any, *arguments: Any, **named: Any) -> str | None:
    """The refusal's message; None where the file was taken. Any other error goes on, and fails the test."""
    with harmless():
        try:
            call(*arguments, **named)
        except REFUSALS as error:
            assert 0 < len(str(error)) < 2000, "a message that a person can read"
            return str(error)
    return None


def model_bytes() -> bytes:
    """Two blocks as Llama names them, 8 wide."""
    names = [f"model.layers.{block}.self_attn.{name}_proj.weight" for block in (0, 1) for name in "qkvo"]
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in names}
    return save(tensors | {"model.embed_tokens.weight": rng.standard_normal((32, 8)).astype(np.float32)})


CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "quantization": {"bits": 4, "group_size": 64},
}  # fmt: skip


def model(folder: Path, config: Any = None, weights: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(CONFIG if config is None else config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(model_bytes() if weights is None else weights)
    return folder


def damaged_json(rng: random.Random, value: Any) -> str:
    """One to three places replaced, or the text itself cut, nested deep or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        node, keys = value, []
        while isinstance(node, dict | list) and node and (not keys or rng.random() < 0.5):
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            keys.append((node, key))
            node = node[key]
        if keys:
            keys[-1][0][keys[-1][1]] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(value)
    how = rng.random()
    if how < 0.1:
        return text[: rng.randrange(len(text))]
    if how < 0.15:
        return '{"a":' * 100_000 + text
    if how < 0.2:
        return f"[{text}]"
    return text


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: str | dict[str, Any], body: bytes, size: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + body


def damaged_tensors(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped in the header, the file cut or longer, or the header's values replaced."""
    how = rng.randrange(5)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        return data + rng.randbytes(rng.randint(1, 64))
    if how == 2:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    header, body = header_of(data)
    if how == 3:
        one = header[rng.choice(list(header))]
        key = rng.choice(["dtype", "shape", "data_offsets"])
        one[key] = rng.choice([*VALUES, [0, 10**18], [-1, 4], [8, 8, 8], "F99", [64, 0], [2**63, 2]])
        return with_header(header, body)
    return with_header(damaged_json(rng, header), body)

"""Tiny models as GGUF files, and how far llama.cpp is from transformers on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from backends.interface import FloatArray
from backends.model_folder import ModelFolder
from finetune.disk.model_writer import Tensors
from finetune.export.engine import Engine
from finetune.export.gguf_file import write_model
from tests.tiny_models import family

WITH_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TOKENS = np.random.default_rng(5).integers(5, 320, 100).tolist()
LENGTHS = (5, 40, 100)
MORE: dict[str, dict[str, Any]] = {"smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}}


def model(name: str, folder: Path, tokenizer: Path, **settings: Any) -> Path:
    """A tiny model of that family with the tokenizer of 320 tokens of another folder."""
    family(name, folder, **({"vocab_size": 320} | MORE.get(name, {}) | settings))
    for file in WITH_TOKENIZER:
        shutil.copyfile(tokenizer / file, folder / file)
    return folder


def tensors(folder: Path) -> dict[str, FloatArray]:
    """Every tensor of a float32 folder of one file, in the order of its header."""
    whole = load_file(folder / "model.safetensors")
    return {name: whole[name] for name in ModelFolder.open(folder).whole_shapes}


def readers(whole: Mapping[str, FloatArray]) -> Tensors:
    """As they are handed to what writes them."""
    return {name: partial(np.asarray, tensor) for name, tensor in whole.items()}


def write(folder: Path, file: Path, kind: str = "f32", template: str = "") -> int:
    return write_model(file, ModelFolder.open(folder), readers(tensors(folder)), template, kind)


def engine(file: Path, adapter: Path | None = None) -> Engine:
    return Engine(file, adapter, context=256)


def expected(folder: Path) -> list[FloatArray]:
    """Log-probabilities after 5, 40 and 100 tokens, of transformers. [vocabulary] each"""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = whole(torch.tensor([TOKENS])).logits[0].double()
    return [torch.log_softmax(logits[length - 1], -1).numpy() for length in LENGTHS]


def distance(file: Path, wanted: list[FloatArray]) -> float:
    """The largest difference of llama.cpp's log-probabilities from these."""
    reader = engine(file)
    worst = 0.0
    for length, row in zip(LENGTHS, wanted, strict=True):
        told = reader.distribution(TOKENS[:length])
        assert len(told) == len(row)
        worst = max(worst, max(abs(value - row[token]) for token, value in told.items()))
    return float(worst)


def chat(reader: Engine, messages: Any, max_tokens: int) -> tuple[str, bool]:
    """The greedy answer as other programs ask for it, and whether a token of the file ended it."""
    body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0.0}
    choice = reader._ask("/v1/chat/completions", body)["choices"][0]
    return str(choice["message"]["content"]), choice["finish_reason"] == "stop"

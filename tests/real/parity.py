"""Log-probabilities of a real model's own weights on chats: both backends and llama.cpp against plain transformers.

    python tests/real/parity.py --model FOLDER --chats FILE [--rows 50] [--tokens 128] [--told 8]

FILE holds `messages` rows (JSONL), as shawgpt/ai-assistant-openai_data_training-data.jsonl; the system text, which is
the same in all of them, is left out. A model without a chat template is given the texts, one after the other. All in
float32. llama.cpp is asked for the last tokens of each row alone (`--told`), since it tells one token a call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.interface import Batch, FloatArray, LoraSpec, ModelSpec, OptimSpec, Reader
from backends.model_folder import ModelFolder, read_tensor
from finetune.data.tokenizer import encode, load_tokenizer
from finetune.errors import EnvironmentProblem
from finetune.export.engine import Engine
from finetune.export.gguf_file import write_model


def rows_of(folder: ModelFolder, chats: Path, count: int, longest: int) -> list[list[int]]:
    tokenizer, texts = load_tokenizer(folder), []
    for line in chats.read_text(encoding="utf-8").splitlines()[:count]:
        messages = [one for one in json.loads(line)["messages"] if one["role"] != "system"]
        if tokenizer.chat_template:
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
        else:
            texts.append("\n\n".join(one["content"] for one in messages))
    return [list(one.tokens)[:longest] for one in encode(tokenizer, texts)]


def scored(reader: Reader, rows: list[list[int]], told: int) -> list[FloatArray]:
    """Of each row's last `told` tokens, or of all but the first."""
    found = []
    for row in rows:
        weights = np.zeros((1, len(row) - 1), np.float32)
        weights[0, -told:] = 1
        inputs, targets = np.array([row[:-1]], np.int32), np.array([row[1:]], np.int32)
        found.append(reader.score(Batch(inputs, targets, weights)).logprob[0, -told:])
    return found


class Plain:
    """The model as transformers loads it, with nothing of ours."""

    shares_prefixes = False

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(self, batch: Batch) -> Any:
        with self._torch.no_grad():
            logits = self._model(self._torch.from_numpy(batch.inputs).long()).logits[0].double()
        logprob = self._torch.log_softmax(logits, -1).numpy()[None, np.arange(batch.inputs.shape[1]), batch.targets[0]]
        return type("Scores", (), {"logprob": logprob})

    def generate(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def session(backend: str, folder: ModelFolder) -> Reader:
    spec = ModelSpec(folder.path, dtype="float32", device="cpu", folder=folder)
    return registry.open_session(backend, spec, LoraSpec(1, 1.0), OptimSpec(), 0)


def llama_cpp(folder: ModelFolder, file: Path) -> Reader:
    """Raises EnvironmentProblem for a model that is not promised as GGUF."""
    tensors = {name: partial(read_tensor, path, name) for path, shapes in folder.weights.items() for name in shapes}
    write_model(file, folder, tensors, "", "f32")
    return Engine(file, None, context=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--told", type=int, default=8)
    asked = parser.parse_args()
    folder = ModelFolder.open(asked.model)
    rows = rows_of(folder, asked.chats, asked.rows, asked.tokens)
    right = scored(Plain(asked.model), rows, asked.tokens)
    print(f"{asked.model.name}: {len(rows)} rows, {sum(map(len, right)):,} tokens, float32, against transformers")
    with tempfile.TemporaryDirectory() as place:
        readers: dict[str, tuple[Callable[[], Reader], int]] = {
            "torch": (lambda: session("torch", folder), asked.tokens),
            "mlx": (lambda: session("mlx", folder), asked.tokens),
            "llama.cpp": (lambda: llama_cpp(folder, Path(place) / "model.gguf"), asked.told),
        }
        for name, (made, told) in readers.items():
            started = time.monotonic()
            try:
                found = scored(made(), rows, told)
            except EnvironmentProblem as error:
                print(f"{name}: {error}")
                continue
            errors = np.concatenate([abs(a - b[-len(a) :]) for a, b in zip(found, right, strict=True)])
            seconds = time.monotonic() - started
            print(f"{name}: {len(errors):,} tokens, error {errors.max():.1e} at most, {errors.mean():.1e} on average,"
                  f" {seconds:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

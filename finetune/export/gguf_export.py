"""Exports that are GGUF files: a whole model, an adapter alone, and either with a Modelfile for Ollama."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.interface import FloatArray
from finetune.data.rows import Message
from finetune.disk.adapter import Adapter
from finetune.export.engine import Engine
from finetune.export.families import Family, family_of
from finetune.export.gguf_file import Written, write_adapter, write_model
from finetune.export.making import Making
from finetune.export.measure import longest_answer
from finetune.export.merge import tensors
from finetune.export.packages import optional
from finetune.export.verify import Check
from finetune.text import command_line
from finetune.training.job import Job

MODEL, ADAPTER, BASE, TEMPLATE = "model.gguf", "adapter.gguf", "base.gguf", "chat_template.jinja"
_SHORTEST = 512  # positions
# Root mean square of a tensor's change, over its size.
_ROUNDING = {
    "F32": 1e-9, "F16": 5e-4, "BF16": 3e-3, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_0": 0.06, "Q5_1": 0.06,
    "Q4_K": 0.12,
}  # fmt: skip


class LoadedGguf:
    """A GGUF file as llama.cpp loads it (`measure.Exported`)."""

    stops: Collection[int] = ()  # the file itself says what ends an answer

    def __init__(self, job: Job, file: Path, adapter: Path | None = None) -> None:
        rows = job.prepared.held_out.examples
        longest = max(map(len, rows), default=0) + longest_answer(job)
        self.session: Any = Engine(file, adapter, context=max(_SHORTEST, longest + 8))

    def tokenise(self, text: str) -> list[int]:
        return self.session.tokenise(text, special=False)  # type: ignore[no-any-return]

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        return self.session.tokenise(self.session.render(messages, tools))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GgufFile:
    """`--to gguf`: merged into what was trained on, in one of llama.cpp's types."""

    kind: str

    @property
    def name(self) -> str:
        return f"gguf-{self.kind}"

    @property
    def finer(self) -> str:
        finer = {"q4_k_m": "q5_k_m", "q5_k_m": "q6_k", "q6_k": "q8_0", "q8_0": "f16"}.get(self.kind)
        return f"use --type {finer}" if finer else ""

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, job = making.job.folder, making.job
        whole = tensors(making.session, folder, making.adapter)
        written = write_model(to / MODEL, folder, whole, making.travels.template, self.kind)
        again = tensors(making.session, job.folder, making.adapter)
        return [_file_check(to / MODEL, family_of(folder), again, written)]

    def open(self, path: Path, job: Job) -> LoadedGguf:
        return LoadedGguf(job, path / MODEL)

    def tidy(self, path: Path) -> None:
        """There is nothing but the export."""

    def commands(self, path: Path) -> list[str]:
        return [command_line("llama-server", "-m", str(path / MODEL), "--jinja")]


@dataclass(frozen=True)
class GgufAdapter:
    """`--to gguf --adapter`: the adapter for a GGUF of its base, verified on one that is written for that alone."""

    numbers: str
    finer = "use --to gguf without --adapter: the adapter was trained on weights of 4 bits"
    name = "gguf-adapter"
    kind = "adapter"

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, template = making.job.folder, making.travels.template
        bare = tensors(making.session, folder, Adapter({}, making.adapter.rank, 0.0), original=True)
        write_model(to / BASE, folder, bare, template, "f16")
        alpha = making.adapter.scale * making.adapter.rank
        written = write_adapter(to / ADAPTER, folder, making.adapter.tensors, alpha, self.numbers)
        (to / TEMPLATE).write_text(template, encoding="utf-8")
        return [_adapter_check(to / ADAPTER, family_of(folder), making.adapter, written)]

    def open(self, path: Path, job: Job) -> LoadedGguf:
        return LoadedGguf(job, path / BASE, path / ADAPTER)

    def tidy(self, path: Path) -> None:
        (path / BASE).unlink(missing_ok=True)

    def commands(self, path: Path) -> list[str]:
        files = ("-m", "BASE.gguf", "--lora", str(path / ADAPTER), "--jinja")
        return [command_line("llama-server", *files, "--chat-template-file", str(path / TEMPLATE))]


def _file_check(file: Path, family: Family, tensors: Any, written: Written) -> Check:
    """The file read again: each tensor's name, shape and numbers against those of the merged model."""
    numbers = ((family.names[name], family.converted(name, one)) for name, one in tensors if name in family.names)
    note = f", {written.narrow} of them in a larger type" if written.narrow else ""
    return _compared(file, numbers, note, {"rope_freqs.weight"})


def _adapter_check(file: Path, family: Family, adapter: Adapter, written: Written) -> Check:
    numbers = []
    for name, tensor in adapter.tensors.items():
        module, _, factor = name.rpartition(".")
        target = f"{module}.weight"
        second = factor == "lora_B"
        numbers.append(
            (f"{family.names[target]}.{factor.lower()}", family.converted(target, tensor) if second else tensor)
        )
    return _compared(file, numbers, "", set())


def _compared(file: Path, numbers: Any, note: str, computed: set[str]) -> Check:
    gguf = optional("gguf")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wrong, worst, where, count = [], 0.0, "", len(held)
    for name, wanted in numbers:
        tensor = held.pop(name, None)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != wanted.shape:
            wrong.append(name)
            continue
        error = _error(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape), wanted)
        if error > worst:
            worst, where = error, name
        if not error <= _ROUNDING[tensor.tensor_type.name]:
            wrong.append(name)
    wrong += sorted(set(held) - computed)
    if wrong:
        return Check("file", f"{count:,} tensors", f"{len(wrong)} differ", "no", ", ".join(wrong[:3]))
    result = f"rounding changed {worst:.1e} of a tensor at most{note}"
    return Check("file", f"{count:,} tensors", result, "yes", where)


def _error(held: FloatArray, wanted: FloatArray) -> float:
    size = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))) if wanted.size else 0.0
    return float(np.sqrt(np.mean(np.square(np.subtract(held, wanted, dtype=np.float64))))) / (size or 1.0)

"""Exports that are GGUF files: a whole model, an adapter alone, and either with a Modelfile for Ollama."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.rows import Message
from finetune.disk.adapter import Adapter
from finetune.export.engine import Engine
from finetune.export.families import family_of
from finetune.export.gguf_file import of_file, tensors_of, write_adapter, write_model
from finetune.export.making import Making, Target
from finetune.export.measure import longest_answer
from finetune.export.merge import tensors
from finetune.export.verify import Check
from finetune.export.weights import Kind, file_check
from finetune.text import command_line
from finetune.training.job import Job

MODEL, ADAPTER, BASE, TEMPLATE = "model.gguf", "adapter.gguf", "base.gguf", "chat_template.jinja"
_SHORTEST = 512  # positions


class LoadedGguf:
    """A GGUF file as llama.cpp loads it (`measure.Exported`)."""

    stops: Collection[int] = ()  # the file itself says what ends an answer

    def __init__(self, job: Job, file: Path, adapter: Path | None = None) -> None:
        rows = job.prepared.held_out.examples
        longest = max(map(len, rows), default=0) + longest_answer(job)
        self.session = Engine(file, adapter, context=max(_SHORTEST, longest + 8))

    def tokenise(self, text: str) -> list[int]:
        return self.session.tokenise(text, special=False)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        return self.session.tokenise(self.session.render(messages, tools))


class GgufFile(Target):
    """`--to gguf`: merged into what was trained on, in one of llama.cpp's types."""

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, file = making.job.folder, to / MODEL
        whole = tensors(making.session, folder, making.adapter)
        narrow = write_model(file, folder, whole, making.travels.template, self.kind)
        again = of_file(family_of(folder), tensors(making.session, folder, making.adapter))
        note = f", {narrow} of them in a larger type" if narrow else ""
        return [file_check(tensors_of(file), again, note)]

    def open(self, path: Path, job: Job) -> LoadedGguf:
        return LoadedGguf(job, path / MODEL)

    def commands(self, path: Path) -> list[str]:
        return [command_line("llama-server", "-m", str(path / MODEL), "--jinja")]


@dataclass(frozen=True)
class GgufAdapter(Target):
    """`--to gguf --adapter`: the adapter for a GGUF of its base, verified on one that is written for that alone."""

    numbers: Kind = "f16"

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, template, adapter = making.job.folder, making.travels.template, making.adapter
        written = write_adapter(to / ADAPTER, folder, adapter.tensors, adapter.scale * adapter.rank, self.numbers)
        (to / TEMPLATE).write_text(template, encoding="utf-8")
        bare = tensors(making.session, folder, Adapter({}, adapter.rank, 0.0), original=True)
        write_model(to / BASE, folder, bare, template, "f16")
        return [file_check(tensors_of(to / ADAPTER), written.items())]

    def open(self, path: Path, job: Job) -> LoadedGguf:
        return LoadedGguf(job, path / BASE, path / ADAPTER)

    def commands(self, path: Path) -> list[str]:
        files = ("-m", "BASE.gguf", "--lora", str(path / ADAPTER), "--jinja")
        return [command_line("llama-server", *files, "--chat-template-file", str(path / TEMPLATE))]

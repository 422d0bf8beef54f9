"""Exports that are GGUF files: a whole model, an adapter alone, and either with a Modelfile for Ollama."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.disk.adapter import Adapter
from finetune.export.engine import Engine
from finetune.export.families import family_of
from finetune.export.gguf_file import of_file, tensors_of, write_adapter, write_model
from finetune.export.measure import Exported, Making, longest_answer
from finetune.export.merge import file_check, tensors
from finetune.export.ollama import READS_JINJA, modelfile, ollama_commands, template_of
from finetune.export.verify import Check
from finetune.text import command_line
from finetune.training.job import Job

MODEL, ADAPTER, BASE, TEMPLATE = "model.gguf", "adapter.gguf", "base.gguf", "chat_template.jinja"
_SHORTEST = 512  # positions


def loaded_gguf(job: Job, file: Path, adapter: Path | None = None) -> Exported:
    """A GGUF file as llama.cpp loads it."""
    longest = max(map(len, job.prepared.held_out.examples), default=0) + longest_answer(job)
    engine = Engine(file, adapter, context=max(_SHORTEST, longest + 8))
    return Exported(
        engine,
        (),
        lambda text: engine.tokenise(text, special=False),
        lambda messages, tools: engine.tokenise(engine.render(messages, tools)),
    )


@dataclass(frozen=True)
class GgufFile:
    """`--to gguf`: merged into what was trained on, in one of llama.cpp's types."""

    name: str  # of its folder, where the user names none
    kind: str  # the type of its numbers: how near to the run's model it must be
    finer: str = ""  # of what is quantised: what to use where it loses too much

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, file = making.job.folder, to / MODEL
        whole = tensors(making.session, folder, making.adapter)
        narrow = write_model(file, folder, whole, making.template, self.kind)
        note = f", {narrow} of them in a larger type" if narrow else ""
        return [file_check(tensors_of(file), of_file(family_of(folder), whole), note)]

    def open(self, path: Path, job: Job) -> Exported:
        return loaded_gguf(job, path / MODEL)

    def commands(self, path: Path, job: Job, adapter: Path) -> list[str]:
        return [command_line("llama-server", "-m", str(path / MODEL), "--jinja")]


class OllamaFolder(GgufFile):
    """`--to ollama`: the same file beside a Modelfile."""

    def write(self, to: Path, making: Making) -> list[Check]:
        template = template_of(making)
        (to / "Modelfile").write_text(modelfile(making, MODEL, template), encoding="utf-8")
        said = "says the same for Ollama" if template else f"left to Ollama {READS_JINJA} and newer"
        return [*super().write(to, making), Check("Modelfile", "its TEMPLATE", said, "yes")]

    def commands(self, path: Path, job: Job, adapter: Path) -> list[str]:
        return ollama_commands(path)


class GgufAdapter(GgufFile):
    """`--to gguf --adapter`: the adapter for a GGUF of its base, verified on one that is written for that alone."""

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, adapter = making.job.folder, making.adapter
        written = write_adapter(to / ADAPTER, folder, adapter.tensors, adapter.scale * adapter.rank, self.kind)
        (to / TEMPLATE).write_text(making.template, encoding="utf-8")
        bare = tensors(making.session, folder, Adapter({}, adapter.rank, 0.0), original=True)
        write_model(to / BASE, folder, bare, making.template, "f16")
        return [file_check(tensors_of(to / ADAPTER), written)]

    def open(self, path: Path, job: Job) -> Exported:
        return loaded_gguf(job, path / BASE, path / ADAPTER)

    def commands(self, path: Path, job: Job, adapter: Path) -> list[str]:
        files = ("-m", "BASE.gguf", "--lora", str(path / ADAPTER), "--jinja")
        return [command_line("llama-server", *files, "--chat-template-file", str(path / TEMPLATE))]

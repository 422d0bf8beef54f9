"""Exports that are model folders: merged, in one of three types, or quantised for MLX."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends import registry
from backends.interface import LoraSpec, OptimSpec
from backends.model_folder import ModelFolder, read_object
from finetune.data.conversation import Conversation
from finetune.data.rows import Message
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import encode, load_tokenizer
from finetune.export.making import Making
from finetune.export.merge import write_merged, write_tokenizer
from finetune.export.mlx_folder import quantise
from finetune.export.verify import Check
from finetune.export.weights import Kind, Written, check_weights
from finetune.recipe.specs import model_spec
from finetune.text import command_line
from finetune.training.job import Job

_ROUNDING = {"f32": 1e-9, "f16": 5e-4, "bf16": 3e-3}  # root mean square of a tensor's change, over its size
_READER = "mlx"


class LoadedFolder:
    """A model folder as transformers or mlx-lm loads it (`measure.Exported`)."""

    def __init__(self, path: Path, job: Job, backend: str) -> None:
        folder = ModelFolder.open(path, job.folder.remote_code)
        spec = replace(model_spec(job.recipe, folder), quantize="none", checkpointing=False)
        self._tokenizer = load_tokenizer(folder)
        self.stops: Collection[int] = frozenset(read_object(path / "generation_config.json")["eos_token_id"])
        # An adapter that is not trained adds nothing: this is the folder's own model.
        self.session = registry.open_session(backend, spec, LoraSpec(1, 1.0), OptimSpec(), 0)

    def tokenise(self, text: str) -> list[int]:
        return next(encode(self._tokenizer, [text])).tokens

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        conversation = Conversation(messages, [(len(messages), True)], list(tools) or None)
        return self.tokenise(render(self._tokenizer, conversation)[0])


@dataclass(frozen=True)
class MergedFolder:
    """`--to merged`, and `--to mlx` without `--bits`: what transformers, vLLM and mlx-lm load."""

    kind: Kind
    reader: str | None = None  # the backend that verifies it; None: the run's
    finer = ""

    @property
    def name(self) -> str:
        return f"merged-{self.kind}"

    def write(self, to: Path, making: Making) -> list[Check]:
        written = write_merged(to, making.session, making.job.folder, making.adapter, self.kind)
        write_tokenizer(to, making.job.folder, making.job.tokenizer, making.travels.template)
        return [file_check(to, written, _ROUNDING[self.kind])]

    def open(self, path: Path, job: Job) -> LoadedFolder:
        return LoadedFolder(path, job, self.reader or job.backend)

    def tidy(self, path: Path) -> None:
        """There is nothing but the export."""

    def commands(self, path: Path) -> list[str]:
        served = command_line("vllm", "serve", str(path))
        return [served, command_line("mlx_lm.server", "--model", str(path))]


@dataclass(frozen=True)
class QuantisedFolder:
    """`--to mlx --bits n`: quantised on the grid of the training, so the original weights are what is merged into."""

    bits: int
    numbers: Kind  # of what is not quantised

    @property
    def kind(self) -> str:
        return f"{self.bits}bit"

    @property
    def name(self) -> str:
        return f"mlx-{self.bits}bit"

    @property
    def finer(self) -> str:
        return "use --bits 8, or --to merged" if self.bits < 8 else "use --to merged"

    def write(self, to: Path, making: Making) -> list[Check]:
        merged, quantised = to / "merged", to / "quantised"
        merged.mkdir()
        job = making.job
        write_merged(merged, making.session, job.folder, making.adapter, self.numbers, original=True)
        write_tokenizer(merged, job.folder, job.tokenizer, making.travels.template)
        quantise(merged, quantised, self.bits, job.folder.remote_code)
        shutil.rmtree(merged)
        for file in quantised.iterdir():
            file.rename(to / file.name)
        quantised.rmdir()
        write_tokenizer(to, job.folder, job.tokenizer, making.travels.template)  # as it was, for old readers too
        count = len(ModelFolder.open(to, job.folder.remote_code).shapes)
        return [Check("file", f"{count:,} tensors", "whole", "yes")]

    def open(self, path: Path, job: Job) -> LoadedFolder:
        return LoadedFolder(path, job, _READER)

    def tidy(self, path: Path) -> None:
        """There is nothing but the export."""

    def commands(self, path: Path) -> list[str]:
        return [command_line("mlx_lm.server", "--model", str(path))]


def file_check(folder: Path, written: dict[str, Written], rounding: float) -> Check:
    """The weights read again from the disk, and what their type has changed."""
    wrong = check_weights(sorted(folder.glob("model*.safetensors")), written)
    worst = max(written, key=lambda name: written[name].error)
    if written[worst].error > rounding:
        wrong.append(f"{worst} lost more than its type allows")
    on = f"{len(written):,} tensors"
    if wrong:
        return Check("file", on, f"{len(wrong)} differ", "no", "; ".join(wrong[:3]))
    return Check("file", on, f"rounding changed {written[worst].error:.1e} of a tensor at most", "yes", worst)

"""Exports that are model folders: merged, in one of three types, or quantised for MLX."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, cast

from backends import registry
from backends.interface import LoraSpec, OptimSpec
from backends.model_folder import ModelFolder, read_object
from finetune.data.conversation import Conversation
from finetune.data.rows import Message
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import encode, load_tokenizer
from finetune.disk.safetensors_file import read_header, read_tensor
from finetune.errors import EnvironmentProblem
from finetune.export.making import Making, Target
from finetune.export.merge import tensors, write_merged, write_tokenizer
from finetune.export.verify import Check
from finetune.export.weights import Kind, file_check
from finetune.recipe.specs import model_spec
from finetune.text import command_line
from finetune.training.job import Job

BITS = (4, 6, 8)


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
class MergedFolder(Target):
    """`--to merged`, and `--to mlx` without `--bits`: what transformers, vLLM and mlx-lm load."""

    reader: str | None = None  # the backend that verifies it; None: the run's

    def write(self, to: Path, making: Making) -> list[Check]:
        folder, kind = making.job.folder, cast(Kind, self.kind)
        write_merged(to, making.session, folder, making.adapter, kind)
        write_tokenizer(to, folder, making.job.tokenizer, making.travels.template)
        held = {
            name: (kind.upper(), partial(read_tensor, file, name))
            for file in to.glob("model*.safetensors")
            for name in read_header(file)[0]
        }
        return [file_check(held, tensors(making.session, folder, making.adapter))]

    def open(self, path: Path, job: Job) -> LoadedFolder:
        return LoadedFolder(path, job, self.reader or job.backend)

    def commands(self, path: Path) -> list[str]:
        number = ("--dtype", "float32") if self.kind == "f32" else ()  # vLLM's own choice for it is float16
        served = command_line("vllm", "serve", str(path), *number, *_trust(path))
        return [served, command_line("mlx_lm.server", "--model", str(path), *_trust(path))]


@dataclass(frozen=True)
class QuantisedFolder(Target):
    """`--to mlx --bits n`: quantised on the grid of the training, so the original weights are what is merged into."""

    bits: int = BITS[0]
    numbers: Kind = "f32"  # of what is not quantised

    def write(self, to: Path, making: Making) -> list[Check]:
        job, merged, quantised = making.job, to / "merged", to / "quantised"
        merged.mkdir()
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
        return LoadedFolder(path, job, "mlx")

    def commands(self, path: Path) -> list[str]:
        return [command_line("mlx_lm.server", "--model", str(path), *_trust(path))]


def _trust(path: Path) -> tuple[str, ...]:
    """What servers need for a model that comes with code of its own."""
    return ("--trust-remote-code",) if any(path.glob("*.py")) else ()


def quantise(merged: Path, to: Path, bits: int, remote_code: bool) -> None:
    """Writes the folder `to`, which must not exist. Raises EnvironmentProblem where mlx-lm is missing or fails."""
    try:
        from mlx_lm import convert
    except ImportError as error:
        raise EnvironmentProblem(
            f'{error.name or error} cannot be imported; pip install "recipe-finetune[mlx]"'
        ) from None
    trust = {"trust_remote_code": True} if remote_code else {}  # mlx-lm 0.31 has no such parameter
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            convert(str(merged), str(to), quantize=True, q_bits=bits, q_group_size=64, **trust)
    except Exception as error:  # whatever a model's own code makes of weights it was not written for
        raise EnvironmentProblem(
            f"mlx-lm cannot quantise this model ({type(error).__name__}: {error!s:.200})"
        ) from error

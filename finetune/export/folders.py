"""Exports that are model folders: merged, in one of three types, or quantised for MLX."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np

from backends import registry
from backends.interface import LoraSpec, OptimSpec
from backends.model_folder import ModelFolder, ending, read_object
from finetune.data.conversation import Conversation
from finetune.data.rows import Message
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import encode, load_tokenizer
from finetune.disk.adapter import Adapter
from finetune.disk.safetensors_file import read_header, read_tensor
from finetune.errors import EnvironmentProblem
from finetune.export.making import Making, Target
from finetune.export.measure import Exported
from finetune.export.merge import Kind, Tensors, file_check, product, tensors, write_merged, write_tokenizer
from finetune.export.packages import optional
from finetune.export.verify import Check, graded
from finetune.recipe.specs import model_spec
from finetune.text import command_line
from finetune.training.job import Job

BITS = (4, 6, 8)


def loaded_folder(path: Path, job: Job, backend: str) -> Exported:
    """A model folder as transformers or mlx-lm loads it."""
    folder = ModelFolder.open(path, job.folder.remote_code)
    spec, tokenizer = model_spec(job.recipe, folder), load_tokenizer(folder)

    def tokenise(text: str) -> list[int]:
        return next(encode(tokenizer, [text])).tokens

    def prompt(messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        return tokenise(render(tokenizer, Conversation(messages, [(len(messages), True)], list(tools) or None))[0])

    plain = replace(spec, quantize="none", checkpointing=False)
    # An adapter that is not trained adds nothing: this is the folder's own model.
    session = registry.open_session(backend, plain, LoraSpec(1, 1.0), OptimSpec(), 0)
    stops = read_object(path / "generation_config.json")["eos_token_id"]
    return Exported(session, frozenset(stops), tokenise, prompt)


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

    def open(self, path: Path, job: Job) -> Exported:
        return loaded_folder(path, job, self.reader or job.backend)

    def commands(self, path: Path) -> list[str]:
        number = ("--dtype", "float32") if self.kind == "f32" else ()  # vLLM's own choice for it is float16
        code = ("--trust-remote-code",) if any(path.glob("*.py")) else ()  # that comes with the model
        served = command_line("vllm", "serve", str(path), *number, *code)
        return [served, command_line("mlx_lm.server", "--model", str(path), *code)]


@dataclass(frozen=True)
class QuantisedFolder(MergedFolder):
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
        wanted = tensors(making.session, job.folder, making.adapter, original=True)
        return [*change_check(to, wanted, making.adapter)]

    def commands(self, path: Path) -> list[str]:
        return super().commands(path)[1:]  # vLLM reads no such folder


def change_check(to: Path, wanted: Tensors, adapter: Adapter) -> Iterator[Check]:
    """How much of what training changed is in the quantised weights: their change in the direction of the adapter's
    product, over that product. Rounding to the grid that the adapter was trained on takes small changes back; the loss
    hardly shows it where the base was far from the answers. wanted: the merged tensors before they were quantised.
    """
    import mlx.core as mx

    arrays: dict[str, Any] = {}
    for file in to.glob("model*.safetensors"):
        arrays |= {ending(name): array for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]
    layers, found, whole = 0, 0.0, 0.0
    for name, numbers in wanted:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" not in adapter.tensors or f"{ending(module)}.scales" not in arrays:
            continue
        change = product(adapter, module)
        words, scales, biases = (arrays[f"{ending(module)}.{part}"] for part in ("weight", "scales", "biases"))
        group, bits = change.shape[1] // scales.shape[1], words.shape[1] * 32 // change.shape[1]
        held = np.array(mx.dequantize(words, scales, biases, group, bits).astype(mx.float32))
        layers, found = layers + 1, found + float(((held - numbers + change) * change).sum())
        whole += float(np.square(change).sum())
    if whole:
        share = found / whole
        yield Check("change of the weights", f"{layers} layers", f"{share:.1%} is in them", graded(share))


def quantise(merged: Path, to: Path, bits: int, remote_code: bool) -> None:
    """Writes the folder `to`, which must not exist. Raises EnvironmentProblem where mlx-lm is missing or fails."""
    convert = optional("mlx_lm", extra="mlx").convert
    trust = {"trust_remote_code": True} if remote_code else {}  # mlx-lm 0.31 has no such parameter
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            convert(str(merged), str(to), quantize=True, q_bits=bits, q_group_size=64, **trust)
    except Exception as error:  # whatever a model's own code makes of weights it was not written for
        said = f"mlx-lm cannot quantise this model ({type(error).__name__}: {error!s:.200})"
        raise EnvironmentProblem(said) from error

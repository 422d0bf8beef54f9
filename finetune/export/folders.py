"""Exports that are model folders: merged, in one of three types, or quantised for MLX."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from backends import registry
from backends.interface import LoraSpec, OptimSpec
from backends.model_folder import ModelFolder, ending, read_header, read_object, read_tensor
from finetune.data.rows import Message
from finetune.data.tokenizer import encode, load_tokenizer
from finetune.disk.adapter import Adapter
from finetune.disk.model_writer import Tensors, write_tokenizer
from finetune.errors import EnvironmentProblem
from finetune.export import merge
from finetune.export.measure import Exported, Making
from finetune.export.packages import optional
from finetune.export.prompt import prompt_of
from finetune.export.verify import Check, graded
from finetune.recipe.specs import model_spec
from finetune.text import command_line
from finetune.training.job import Job

BITS = (4, 6, 8)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank takes


def loaded_folder(path: Path, job: Job, backend: str) -> Exported:
    """A model folder as transformers or mlx-lm loads it."""
    folder = ModelFolder.open(path, job.folder.remote_code)
    spec, tokenizer = model_spec(job.recipe, folder), load_tokenizer(folder)

    def tokenise(text: str) -> list[int]:
        return next(encode(tokenizer, [text])).tokens

    def prompt(messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        return tokenise(prompt_of(tokenizer, messages, tools))

    plain = replace(spec, quantize="none", checkpointing=False)
    # An adapter that is not trained adds nothing: this is the folder's own model.
    session = registry.open_session(backend, plain, LoraSpec(1, 1.0), OptimSpec(), 0)
    stops = read_object(path / "generation_config.json")["eos_token_id"]
    return Exported(session, frozenset(stops), tokenise, prompt)


@dataclass(frozen=True)
class MergedFolder:
    """`--to merged`, and `--to mlx` without `--bits`: what transformers, vLLM and mlx-lm load."""

    name: str  # of its folder, where the user names none
    kind: str  # the type of its numbers: how near to the run's model it must be
    finer: str = ""  # of what is quantised: what to use where it loses too much
    reader: str | None = None  # the backend that verifies it; None: the run's

    def write(self, to: Path, making: Making) -> list[Check]:
        _write(to, making, self.kind)
        held = {
            name: (self.kind.upper(), partial(read_tensor, file, name))
            for file in to.glob("model*.safetensors")
            for name in read_header(file)[0]
        }
        return [merge.file_check(held, merge.tensors(making.session, making.job.folder, making.adapter))]

    def open(self, path: Path, job: Job) -> Exported:
        return loaded_folder(path, job, self.reader or job.backend)

    def commands(self, path: Path, job: Job, adapter: Path) -> list[str]:
        code = ("--trust-remote-code",) if any(path.glob("*.py")) else ()  # that comes with the model
        served: list[tuple[str, ...]] = [("vllm", "serve", str(path)), ("mlx_lm.server", "--model", str(path))]
        known = (most for most in VLLM_RANKS if most >= job.recipe.lora.rank)
        rank = next(known, None) if job.recipe.method == "lora" else None
        if self.kind == "f32":
            served[0] += ("--dtype", "float32")  # its own choice would be float16
        elif rank and job.recipe.quantize == "none" and not job.folder.packed:  # the adapter on its base does the same
            module = json.dumps({"name": "tuned", "path": str(adapter)})
            lora = ("--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module)
            prompt = ("--chat-template", str(path / "chat_template.jinja"), "--generation-config", str(path))
            served.insert(1, ("vllm", "serve", str(job.folder.path.resolve()), *lora, *prompt))
        return [command_line(*words, *code) for words in served]


@dataclass(frozen=True)
class QuantisedFolder(MergedFolder):
    """`--to mlx --bits n`: quantised on the grid of the training, so the original weights are what is merged into."""

    bits: int = BITS[0]

    def write(self, to: Path, making: Making) -> list[Check]:
        job, merged, quantised = making.job, to / "merged", to / "quantised"
        merged.mkdir()
        _write(merged, making, "f32" if making.adapter.whole else merge.base_kind(job.folder.weights), original=True)
        quantise(merged, quantised, self.bits, job.folder.remote_code)
        shutil.rmtree(merged)
        for file in quantised.iterdir():
            file.rename(to / file.name)
        quantised.rmdir()
        write_tokenizer(to, job.folder, job.tokenizer, making.template)  # as it was, for old readers too
        adapters = Adapter({}, making.adapter.rank, 0.0), making.adapter
        before, after = (merge.tensors(making.session, job.folder, one, original=True) for one in adapters)
        return change_checks(to, before, after, making.adapter)

    def commands(self, path: Path, job: Job, adapter: Path) -> list[str]:
        return super().commands(path, job, adapter)[-1:]  # vLLM reads no such folder


def _write(to: Path, making: Making, kind: str, original: bool = False) -> None:
    merge.write_merged(to, making.session, making.job.folder, making.adapter, kind, original=original)
    write_tokenizer(to, making.job.folder, making.job.tokenizer, making.template)


def change_checks(to: Path, before: Tensors, after: Tensors, adapter: Adapter) -> list[Check]:
    """How much of what training changed is in the quantised weights: their change in the direction of the adapter's,
    over that one. Rounding to the grid that the adapter was trained on takes small changes back; the loss hardly shows
    it where the base was far from the answers. before, after: the base's tensors and the merged ones, not quantised.
    """
    import mlx.core as mx

    arrays: dict[str, Any] = {}
    for file in to.glob("model*.safetensors"):
        arrays |= {ending(name): array for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]
    layers, found, whole = 0, 0.0, 0.0
    ends = ".weight" if adapter.whole else ".lora_A"
    for module in (name.removesuffix(ends) for name in adapter.tensors if name.endswith(ends)):
        if f"{ending(module)}.scales" not in arrays:
            continue
        words, scales, biases = (arrays[f"{ending(module)}.{part}"] for part in ("weight", "scales", "biases"))
        numbers = after[f"{module}.weight"]()
        change = np.subtract(numbers, before[f"{module}.weight"](), dtype=np.float64)
        group, bits = change.shape[1] // scales.shape[1], words.shape[1] * 32 // change.shape[1]
        held = np.array(mx.dequantize(words, scales, biases, group, bits).astype(mx.float32))
        layers, found = layers + 1, found + float(((held - numbers + change) * change).sum())
        whole += float(np.square(change).sum())
    share = found / (whole or 1.0)
    return (
        [Check("change of the weights", f"{layers} layers", f"{share:.1%} is in them", graded(share))] if whole else []
    )


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

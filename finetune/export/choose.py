"""Which export the options of `finetune export` ask for."""

from __future__ import annotations

from backends import registry
from backends.interface import Session
from finetune.errors import RecipeError
from finetune.export.families import family_of
from finetune.export.folders import BITS, MergedFolder, QuantisedFolder
from finetune.export.gguf_export import GgufAdapter, GgufFile, OllamaFolder
from finetune.export.gguf_file import KINDS as GGUF_TYPES
from finetune.export.making import Target
from finetune.export.merge import KINDS, base_kind
from finetune.export.packages import optional
from finetune.recipe.schema import Recipe
from finetune.recipe.specs import model_spec
from finetune.text import harmless
from finetune.training.job import Job

FORMATS = ("merged", "mlx", "gguf", "ollama")
_USUAL = "q8_0"
_FINER = {"q4_k_m": "q5_k_m", "q5_k_m": "q6_k", "q6_k": "q8_0", "q8_0": "f16"}


def check_options(to: str, kind: str | None, bits: int | None, adapter_alone: bool) -> None:
    """Raises RecipeError for options that do not go together."""
    if to not in FORMATS:
        raise RecipeError(f"--to {harmless(to)}: there are {', '.join(FORMATS)}")
    if bits is not None and (to != "mlx" or bits not in BITS):
        raise RecipeError(f"--bits {bits}: belongs to --to mlx, and is {', '.join(map(str, BITS))}")
    if adapter_alone and to != "gguf":
        raise RecipeError("--adapter: belongs to --to gguf; PEFT and mlx-lm load the run's folder adapter/ as it is")
    types = tuple(GGUF_TYPES) if to in ("gguf", "ollama") and not adapter_alone else tuple(KINDS)
    if kind is not None and (bits is not None or kind not in types):
        what = "with --bits there is none" if bits is not None else f"for this export there are {', '.join(types)}"
        raise RecipeError(f"--type {harmless(kind)}: {what}")


def refuse_adapter(recipe: Recipe) -> None:
    """Raises RecipeError for a run without one."""
    if recipe.method == "full":
        raise RecipeError(
            "--adapter: this run trained the whole model, and has no adapter; use --to gguf without --adapter"
        )


def target_of(to: str, kind: str | None, bits: int | None, adapter_alone: bool, job: Job) -> Target:
    """What the options ask for. Raises EnvironmentProblem where a package is missing, or for a model that llama.cpp
    reads otherwise, and RecipeError for an adapter that it cannot apply: before anything is measured.
    """
    if adapter_alone and job.recipe.lora.dora:
        raise RecipeError("--adapter: llama.cpp does not know lora.dora; use --to gguf without --adapter")
    if to in ("gguf", "ollama"):
        for package in ("gguf", "xllamacpp", *(["libgguf"] if "_k" in (kind or "") else [])):
            optional(package)
        family_of(job.folder)
        if adapter_alone:
            packed = job.recipe.quantize != "none" or job.folder.packed
            finer = "use --to gguf without --adapter: the adapter was trained on weights of 4 bits" if packed else ""
            return GgufAdapter("gguf-adapter", kind or "f16", finer)
        kind = kind or _USUAL
        finer = f"use --type {_FINER[kind]}" if kind in _FINER else ""
        return (GgufFile if to == "gguf" else OllamaFolder)(f"{to}-{kind}", kind, finer)
    if to == "mlx":
        optional("mlx_lm", extra="mlx")
    if bits is not None:
        finer = "use --bits 8, or --to merged" if bits < 8 else "use --to merged"
        return QuantisedFolder(f"mlx-{bits}bit", f"{bits}bit", finer, to, bits)
    kind = kind or ("f32" if job.recipe.method == "full" else base_kind(job.folder.weights))
    return MergedFolder(f"merged-{kind}", kind, "", to if to == "mlx" else None)


def precision(target: Target, job: Job, session: Session) -> str:
    """What bounds how near the models can be: the type of the file, or what the device or llama.cpp computes with."""
    if target.finer:
        return "quantised"
    half = registry.describe(job.backend, job.recipe.device)["half"]
    number = model_spec(job.recipe, job.folder).number_type(registry.device_kind(session.device), half)
    kinds = [target.kind, *(short for short, name in KINDS.items() if name == number)]
    if isinstance(target, GgufFile | GgufAdapter):
        kinds.append("f16")  # llama.cpp reads some functions from tables of 16 bits
    return max(kinds, key=tuple(KINDS).index)

"""What the files of a run alone can refuse is refused before its model is loaded, merged or measured."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("xllamacpp")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune.commands import export
from finetune.errors import ExitCode
from finetune.export import packages
from finetune.training.job import Setup
from tests.end_to_end.command import Work
from tests.tiny_models import CHAT, family, model_with_tokenizer
from tests.unit.export import exported_run
from tests.unit.export.gguf_models import model
from tests.unit.test_wrong_resume import finetune

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`finetune export` of a run on that base, which fails as a bug where it gets as far as to load a model."""

    def ask(base: Path, *options: str, **sections: Any) -> Any:
        monkeypatch.setattr(exported_run, "STEPS", 0)
        run = exported_run.trained_run(tmp_path / "work", base, "torch", **sections)
        for place, name in ((Setup, "session"), (export, "read_trained"), (export, "measured")):
            monkeypatch.setattr(place, name, lambda *given, what=name, **named: pytest.fail(f"{what} was called"))
        work = Work.__new__(Work)
        work.folder = tmp_path
        answer = finetune(work, "export", str(run.path), *options)
        assert not (run.path / "exports").exists() or not [*(run.path / "exports").iterdir()]
        return answer

    return ask


def by_words(folder: Path) -> Path:
    """A base whose tokenizer has whole words."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", "a", "fine", "film", "positive", "negative"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    whole.chat_template = CHAT
    whole.save_pretrained(folder)
    return family("llama", folder, vocab_size=len(words))


def of_other_cuts(folder: Path, tokenizer: Path) -> Path:
    """A base whose tokenizer cuts texts by a pattern that llama.cpp does not have."""
    base = model("llama", folder, tokenizer)
    state = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+|[^\s\p{L}]+"}, "behavior": "Isolated", "invert": False}
    last = {**state["pre_tokenizer"], "use_regex": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}
    (base / "tokenizer.json").write_text(json.dumps(state))
    return base


def in_eight_bits(folder: Path, tokenizer: Path) -> Path:
    """A base whose norms are numbers of 8 bits, which transformers casts."""
    base = model("llama", folder, tokenizer)
    tensors = load_file(base / "model.safetensors")
    small = {name: one.to(torch.float8_e4m3fn) for name, one in tensors.items() if one.ndim == 1}
    save_file(tensors | small, base / "model.safetensors", {"format": "pt"})
    return base


def of_arcee(folder: Path, tokenizer: Path) -> Path:
    """A base of a family that mlx-lm does not have."""
    return model("arcee", folder, tokenizer)


BASES: dict[str, tuple[Callable[[Path, Path], Path], list[str], str]] = {
    "words": (lambda folder, _: by_words(folder), ["--to", "gguf"], "tokenizer is WordLevel"),
    "words, for Ollama": (lambda folder, _: by_words(folder), ["--to", "ollama"], "tokenizer is WordLevel"),
    "words, adapter": (lambda folder, _: by_words(folder), ["--to", "gguf", "--adapter"], "tokenizer is WordLevel"),
    "cuts": (of_other_cuts, ["--to", "gguf", "--type", "f16"], "pre-tokenizer is not one that llama.cpp has"),
    "family": (lambda folder, words: model("gpt_neox", folder, words), ["--to", "gguf"], "model_type gpt_neox"),
    "longrope": (
        lambda folder, words: model("phi3", folder, words, rope_parameters=LONGROPE),
        ["--to", "ollama", "--type", "q4_k_m"],
        "longrope",
    ),
    "family, for MLX": (of_arcee, ["--to", "mlx"], "mlx-lm cannot load this model"),
    "family, in 8 bits": (of_arcee, ["--to", "mlx", "--bits", "8"], "mlx-lm cannot load this model"),
    "8 bits, merged": (in_eight_bits, ["--to", "merged"], "numbers of type F8_E4M3"),
    "8 bits, for MLX": (in_eight_bits, ["--to", "mlx", "--bits", "4"], "numbers of type F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_written_is_refused(
    case: str, asked: Callable[..., Any], tokenizer: Path, tmp_path: Path
) -> None:
    made, options, reason = BASES[case]
    said = asked(made(tmp_path / "base", tokenizer), *options).failed(ExitCode.BACKEND)
    assert reason in said
    assert ("Write it with --to merged" in said) == (options[1] in ("gguf", "ollama"))


RUNS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "head": ({"head": {}}, ["--to", "merged"], "this run's model chooses a label with its head"),
    "head, adapter": ({"head": {}}, ["--to", "gguf", "--adapter"], "this run's model chooses a label with its head"),
    "DoRA": ({"lora": {"dora": True}}, ["--to", "gguf", "--adapter"], "llama.cpp does not know lora.dora"),
    "whole": ({"method": "full"}, ["--to", "gguf", "--adapter"], "trained the whole model"),
    "format": ({}, ["--to", "onnx"], "there are merged, mlx, gguf, ollama"),
    "bits": ({}, ["--to", "gguf", "--bits", "4"], "belongs to --to mlx"),
    "type": ({}, ["--to", "mlx", "--type", "q8_0"], "there are f32, f16, bf16"),
    "adapter": ({}, ["--to", "merged", "--adapter"], "belongs to --to gguf"),
    "output": ({}, ["--to", "merged", "-o", "."], "is there, and is no export"),
}


@pytest.mark.parametrize("case", RUNS)
def test_what_a_run_cannot_be_asked_for_is_refused(case: str, asked: Callable[..., Any], tokenizer: Path) -> None:
    sections, options, reason = RUNS[case]
    assert reason in asked(tokenizer, *options, **sections).failed(ExitCode.RECIPE)


def test_without_rows_to_verify_it_on_nothing_is_exported(asked: Callable[..., Any], tokenizer: Path) -> None:
    assert "set data.test" in asked(tokenizer, "--to", "merged", held_out=1).failed(ExitCode.INCOMPATIBLE)


def test_a_place_where_no_folder_can_be_is_refused(asked: Callable[..., Any], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file: " in asked(tokenizer, "--to", "merged", "-o", "file/model").failed(ExitCode.DISK)


@pytest.mark.parametrize(
    ("lacking", "options", "extra"),
    [
        ("gguf", ["--to", "gguf"], "gguf"),
        ("xllamacpp", ["--to", "ollama"], "gguf"),
        ("libgguf", ["--to", "gguf", "--type", "q5_k_m"], "gguf"),
        ("mlx_lm", ["--to", "mlx"], "mlx"),
    ],
)
def test_a_package_that_is_not_here_is_named(
    lacking: str, options: list[str], extra: str, asked: Callable[..., Any], tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def load(name: str) -> Any:
        if name == lacking:
            raise ImportError(f"No module named {name!r}")
        return importlib.import_module(name)

    monkeypatch.setattr(packages, "importlib", SimpleNamespace(import_module=load))
    said = asked(tokenizer, *options).failed(ExitCode.BACKEND)
    assert f"needs the package {lacking}" in said and f'pip install "recipe-finetune[{extra}]"' in said
    assert ("--type q8_0" in said) == (lacking == "libgguf")

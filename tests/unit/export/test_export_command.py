"""What the command line hands to `export`, and what it refuses before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune import cli, cli_use
from finetune.commands import export
from finetune.commands.export import check_options, target_of
from finetune.errors import EnvironmentProblem, RecipeError
from finetune.export import packages
from finetune.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--to", "merged"], ("merged", None, None, False, None, 50, None)),
        (["--to", "mlx", "--bits", "6", "--rows", "9"], ("mlx", None, 6, False, None, 9, None)),
        (["--to", "gguf", "--type", "q6_k", "-o", "out"], ("gguf", "q6_k", None, False, Path("out"), 50, None)),
        (["--to", "gguf", "--adapter"], ("gguf", None, None, True, None, 50, None)),
    ],
)
def test_every_option_arrives(options: list[str], wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {path: m}\ndata: {train: a.jsonl}\noutput: runs\n")
    handed: list[Any] = []
    monkeypatch.setattr(cli_use, "begin", lambda alone=True: None)
    monkeypatch.setattr(export, "run", lambda *given: handed.append(given[2:]))
    answer = CliRunner().invoke(cli.app, ["export", str(tmp_path), *options])
    assert answer.exit_code == 0, answer.output
    assert handed == [wanted]


def test_the_format_must_be_named() -> None:
    assert CliRunner().invoke(cli.app, ["export", "run"]).exit_code == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("onnx", None, None, False), "--to onnx: there are merged, mlx, gguf, ollama"),
        (("merged", None, 4, False), "--bits 4"),
        (("mlx", None, 5, False), "--bits 5"),
        (("mlx", "f16", 4, False), "with --bits there is none"),
        (("merged", "q8_0", None, False), "there are f32, f16, bf16"),
        (("gguf", "q9", None, False), "q4_k_m"),
        (("gguf", "q8_0", None, True), "--type q8_0"),
        (("ollama", None, None, True), "--adapter"),
        (("gguf", None, None, True, {"lora": {"dora": True}}), "does not know lora.dora; use --to gguf without"),
        (("gguf", None, None, True, {"method": "full"}), "trained the whole model, .*; use --to gguf without"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_options(recipe(*given[4:]), *given[:4])


@pytest.mark.parametrize(
    "given",
    [
        ("merged", "bf16", None, False),
        ("gguf", "f32", None, False),
        ("mlx", None, 8, False),
        ("gguf", None, None, False, {"lora": {"dora": True}}),
        ("gguf", None, None, True, {"lora": {"rslora": True}}),
    ],
)
def test_options_that_go_together_are_taken(given: Any) -> None:
    check_options(recipe(*given[4:]), *given[:4])


def recipe(more: Mapping[str, Any] | None = None) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "a.jsonl"}, **(more or {})})


@pytest.mark.parametrize("bits", [None, 4])
def test_without_mlx_lm_it_is_said_before_anything_is_read(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(packages, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(EnvironmentProblem, match=r'needs the package mlx_lm .*pip install "recipe-finetune\[mlx\]"'):
        target_of("mlx", None, bits, False, SimpleNamespace(), "")  # type: ignore[arg-type]

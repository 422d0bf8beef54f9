"""What a command loads. Lists of modules and no times: a slow machine passes, one import too many does not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from backends import registry
from finetune.commands.plan import backends_table
from finetune.recipe.load import check_recipe

FRAMEWORKS = {"torch", "mlx", "mlx_lm", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers"}
SCIENCE = {"numpy", "scipy", "matplotlib", "datasets", "pandas", "pyarrow", "safetensors", "psutil"}
HUB = {"huggingface_hub", "httpx", "requests"}
HEAVY = FRAMEWORKS | SCIENCE | HUB
LIGHT = {
    f"finetune.{name}" for name in ("cli", "cli_examine", "cli_use", "startup", "errors", "options", "streams", "text")
}
RECIPE = "model: {path: somewhere}\ndata: {train: rows.jsonl}\nlora: {rnk: 3}\n"


def loaded(folder: Path, *arguments: str, code: int) -> set[str]:
    """The modules that `finetune *arguments` has loaded when it ends with `code`, children's too."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "finetune", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr[-2000:]
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[-1].strip() for line in lines}


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "a film", "label": "good"}\n{"text": "a flop", "label": "bad"}\n' * 6
    )
    (tmp_path / "broken-run").mkdir()
    (tmp_path / "broken-run" / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
def test_what_is_loaded_is_seen(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("rnk", "rank").replace("rows", "absent"))
    assert "numpy" in packages(loaded(folder, "train", "recipe.yaml", code=2))


def test_help_loads_the_command_line_and_nothing_else(folder: Path) -> None:
    found = loaded(folder, "--help", code=0)
    assert not packages(found) & (HEAVY | {"pydantic", "ruamel", "backends", "asyncio"})
    assert {one for one in found if one.startswith("finetune.")} == LIGHT


@pytest.mark.parametrize("command", ["train", "plan", "check", "doctor", "chat"])
def test_help_of_a_command_loads_nothing_of_it(folder: Path, command: str) -> None:
    found = loaded(folder, command, "--help", code=0)
    assert not packages(found) & (HEAVY | {"ruamel", "backends"})
    assert {one for one in found if one.startswith("finetune.")} == LIGHT


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "recipe.yaml"),
        ("train", "absent.yaml"),
        ("train", "recipe.yaml", "--no-supervisor"),
        ("plan", "recipe.yaml"),
        ("resume", "broken-run"),
        ("eval", "broken-run"),
        ("generate", "broken-run", "a prompt"),
        ("chat", "broken-run"),
    ],
    ids=" ".join,
)
def test_a_mistake_in_a_recipe_needs_only_what_reads_recipes(folder: Path, arguments: tuple[str, ...]) -> None:
    found = loaded(folder, *arguments, code=2)
    assert not packages(found) & (HEAVY | {"rich", "backends"})
    assert not {one for one in found if one.startswith(("finetune.data", "finetune.training"))}


def test_a_mistake_in_a_checked_recipe(folder: Path) -> None:
    found = loaded(folder, "check", "recipe.yaml", code=2)
    assert not packages(found) & (HEAVY | {"backends"})


def test_what_is_no_run_needs_nothing_more(folder: Path) -> None:
    for command in ("resume", "eval", "chat"):
        assert not packages(loaded(folder, command, "absent", code=8)) & (HEAVY | {"backends"})


def test_a_starter_recipe_needs_no_numbers(folder: Path) -> None:
    found = loaded(folder, "init", "rows.jsonl", "--output", "new.yaml", code=0)
    assert not packages(found) & (HEAVY | {"rich"})  # it reads back what it wrote, with ruamel


def test_the_schema_needs_only_the_recipe(folder: Path) -> None:
    assert not packages(loaded(folder, "schema", code=0)) & (HEAVY | {"rich", "ruamel", "backends"})


def test_a_look_at_the_machine_reads_no_data_and_draws_nothing(folder: Path) -> None:
    pytest.importorskip("torch")
    found = loaded(folder, "doctor", code=0)
    assert not packages(found) & {"matplotlib", "datasets", "ruamel", "pyarrow"}
    assert not {one for one in found if one.startswith("finetune.data")}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--largest"]])
def test_a_plan_loads_no_framework_but_in_another_process(arguments: list[str]) -> None:
    """Of a model whose layers have the usual names."""
    pytest.importorskip("torch")
    recipe = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
    command = [sys.executable, "-X", "importtime", "-m", "finetune", "plan", recipe, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = packages({line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line})
    assert "transformers" in found and not found & {"torch", "mlx", "scipy", "matplotlib", "bitsandbytes"}
    assert "fits here (torch)" in done.stdout or "fits here (mlx)" in done.stdout


def test_a_plan_loads_only_the_backend_that_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    monkeypatch.setattr(registry, "probe", lambda name: probed.append(name))
    recipe = check_recipe({"model": {"path": "m"}, "data": {"train": "t"}})
    table = backends_table(recipe, "reference")
    assert set(probed) == {"reference"}, "described"
    assert list(table.columns[1].cells) == [
        "chosen" if name == "reference" else "installed" if find_spec(name) else "not installed"
        for name in registry.NAMES
    ]

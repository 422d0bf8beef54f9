"""No backend's name stands outside the table of backends, the recipe's schema and the backend's own folder.

So a backend is added, or taken away, in its folder and in those two files. Identifiers, strings and imports count;
docstrings and comments do not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.table import BACKENDS

ROOT = Path(__file__).parents[2]
ANYWHERE = {"backends/table.py", "finetune/recipe/schema.py"}
LIBRARIES = re.compile("mlx.lm", re.IGNORECASE)  # mlx-lm's adapter format is not a backend
# (file, name): why it may stand there
ALLOWED = {
    ("finetune/disk/adapter.py", "mlx"): "names of mlx-lm's adapter format, which every run reads",
    ("finetune/disk/adapter_writer.py", "mlx"): "names of mlx-lm's adapter format, which every run writes",
    ("backends/registry_process.py", "torch"): "what transformers shall not find where only its tokenizers are needed",
    ("backends/predictions.py", "torch"): "what transformers loads wherever it finds it, and takes memory",
    ("backends/torch_backend/model.py", "mlx"): "the remedy where 4-bit on Apple GPUs is asked for",
    ("backends/usual_families.py", "torch"): "a key of config.json that older libraries write",
    ("finetune/options.py", "mlx"): "the format of an export",
    ("finetune/commands/export.py", "mlx"): "the format of an export",
    ("finetune/export/folders.py", "mlx"): "the format of an export, which that backend reads",
    ("finetune/disk/model_writer.py", "torch"): "a key of config.json that older readers know",
}


def home(name: str) -> str:
    """The folder or the file of a backend: `backends/torch_backend/`, `backends/reference.py`."""
    package, _, module = BACKENDS[name].session.rpartition(".")
    return f"{package.replace('.', '/')}/" if "." in package else f"{package}/{module}.py"


def texts(source: str) -> Iterator[str]:
    """Every identifier, string and imported name in the code."""
    tree = ast.parse(source)
    standing_alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in standing_alone:
            yield node.value
        for field in ("id", "attr", "name", "arg", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield text


def named(source: str) -> set[str]:
    """The backends that the code names."""
    parts = {part for text in texts(source) for part in re.split("[^a-z0-9]+", LIBRARIES.sub("", text).lower())}
    return parts & set(BACKENDS)


def names_outside() -> set[tuple[str, str]]:
    found = set()
    for folder in ("backends", "finetune"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if file not in ANYWHERE:
                code = named(path.read_text(encoding="utf-8"))
                found |= {(file, name) for name in code if not file.startswith(home(name))}
    return found


def test_no_backend_is_named_outside_its_folder() -> None:
    assert names_outside() - set(ALLOWED) == set()


def test_every_exception_is_needed() -> None:
    assert set(ALLOWED) <= names_outside()


def test_home_is_where_a_backend_lives() -> None:
    homes = {name: home(name) for name in BACKENDS}
    assert all((ROOT / place).exists() for place in homes.values())
    assert homes["torch"] == "backends/torch_backend/" and homes["reference"] == "backends/reference.py"


@pytest.mark.parametrize(
    "source",
    [
        'x = "torch" if y else None',
        "import torch",
        "from backends.torch_backend.session import open",
        'raise ValueError(f"use {name}, or backend: torch")',
        "torch_folder = 1",
        "def choose(torch=True): pass",
        'TABLE = {"torch": 1}',
    ],
)
def test_a_name_is_seen(source: str) -> None:
    assert named(source) == {"torch"}


@pytest.mark.parametrize(
    "source", ['"""As torch has it."""', "x = 1  # torch", 'x = "mlx-lm loads it"', "torchlight = 1"]
)
def test_what_is_no_name_is_not(source: str) -> None:
    assert named(source) == set()

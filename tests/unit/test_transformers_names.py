"""transformers is imported without the search of its own files for names, and knows the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.transformers_names import _kept, keep, kept_in

SEARCH = """
import os
SEARCHED = []
def create_import_structure_from_path(path):
    SEARCHED.append(os.fspath(path))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    files = {name: {frozenset(): {name: {name[:2]}}, frozenset({"torch", "b"}): {}} for name in os.listdir(folder)}
    return {**files, "empty": {}, "deep": {"deeper": {frozenset({"x"}): {"m": {"A", "B"}}}}}
"""
PACKAGE = """
from pathlib import Path
from .utils import import_utils
models = Path(__file__).parent / "models"
search = import_utils.create_import_structure_from_path
structures = [search(models), search(str(models / "__init__.py")), search(str(models / "llama"))]
"""
RUN = """
import json, sys
sys.path.insert(0, {library!r})
from pathlib import Path
from backends.transformers_names import keep
{begin}
import transformers
first, second, _ = transformers.structures
assert first == second and first is not second  # each may change its own
whole = first["deep"]["deeper"].popitem()[1]["m"] == {{"A", "B"}}
print(json.dumps([len(transformers.import_utils.SEARCHED), sorted(first), whole]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A toy that is built as transformers is."""
    folder = tmp_path / "lib" / "transformers"
    about = tmp_path / "lib" / "transformers-9.1.dist-info"
    for made in (folder / "utils", folder / "models" / "llama", about):
        made.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.1\n")
    (folder / "models" / "__init__.py").touch()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "utils" / "__init__.py").write_text("from .. import __version__")
    (folder / "utils" / "import_utils.py").write_text(SEARCH)
    return folder


def imported(package: Path, file: Path) -> list[Any]:
    """How many searches an import makes, and what they tell."""
    code = RUN.format(library=str(package.parent), begin=f"keep(Path({str(file)!r}))")
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: list[Any] = json.loads(done.stdout)
    return told


def test_a_second_process_searches_nothing_that_the_first_has_found(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "names.json"
    assert imported(package, file) == [2, ["__init__.py", "deep", "empty", "llama"], True]
    assert imported(package, file) == [1, ["__init__.py", "deep", "empty", "llama"], True]  # one folder alone
    (package / "models" / "qwen").mkdir()
    assert imported(package, file) == [2, ["__init__.py", "deep", "empty", "llama", "qwen"], True]
    about = package.parent / "transformers-9.1.dist-info" / "METADATA"
    about.write_text(about.read_text().replace("9.1", "9.2"))
    assert imported(package, file)[0] == 2
    (package / "models" / "qwen" / "modeling_qwen.py").touch()
    assert imported(package, file)[0] == 2
    assert imported(package, file)[0] == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"stamp": 3, "found": {}}', b"\xff\x00", b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_as_none(package: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names.json").write_bytes(content)
    assert imported(package, tmp_path / "names.json")[0] == 2


def test_a_package_that_is_built_otherwise_is_imported_as_ever(package: Path, tmp_path: Path) -> None:
    (package / "utils" / "import_utils.py").write_text(SEARCH.replace("create_", "make_"))
    (package / "__init__.py").write_text(PACKAGE.replace("create_", "make_"))
    for _ in range(2):
        assert imported(package, tmp_path / "names.json")[0] == 3
    assert not (tmp_path / "names.json").exists()


def test_what_is_kept_of_the_installed_version_is_what_its_search_finds(tmp_path: Path) -> None:
    from transformers.utils import import_utils

    models = Path(import_utils.__file__).parents[1] / "models"
    whole = import_utils.create_import_structure_from_path(str(models))
    first = _kept(lambda path: whole, models, tmp_path / "names.json")
    second = _kept(lambda path: pytest.fail("it searches again"), models, tmp_path / "names.json")
    assert first(models) == second(models) == second(str(models / "__init__.py")) == whole
    assert len(whole) > 100


def test_it_is_begun_once_and_not_after_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = kept_in()
    monkeypatch.setitem(sys.modules, "transformers", sys)
    keep(tmp_path / "a.json")
    assert kept_in() == before
    monkeypatch.delitem(sys.modules, "transformers")
    for name in ("b.json", "c.json"):
        keep(tmp_path / name)
    assert kept_in() == (before or tmp_path / "b.json")

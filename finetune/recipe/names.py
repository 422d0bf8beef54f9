"""What a text of a recipe names: something built in, a path on this disk, or a hub id.

The disk is asked first: what is there is a path. Only what is not there is judged by how it is written, and a name
beside which a file of nearly that name stands is taken for a misspelt file.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Collection
from pathlib import Path

from finetune.errors import RecipeError
from finetune.recipe.schema import Recipe
from finetune.text import shorten

BUILTIN = "builtin:"
# Endings of files: a name that ends so and is not there is a misspelt file, never a hub id.
FILE_ENDINGS = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar",
    ".txt", ".md", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".pkl", ".db", ".sqlite", ".pdf", ".yaml", ".yml",
)  # fmt: skip
_PATH = re.compile(r"[./~\\]|[A-Za-z]:[\\/]")  # how only a path begins
_PART = r"[A-Za-z0-9](?:[\w.-]*[\w])?"
_MODEL_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
# name, org/name or org/name/config, each with :split or without
_DATA_ID = re.compile(rf"{_PART}(?:/{_PART}){{0,2}}(?::.+)?", re.ASCII)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
DATA_KEYS = (("data", "train"), ("data", "valid"), ("data", "test"))
ON_DISK = (("lora", "start_from"), ("evaluate", "suite"))  # always on this disk


def local(text: str, start: Path | None) -> Path | None:
    """The path that a source of rows names, absolute, there or not; None for what is built in, an address, or a hub id.

    start: the folder that relative paths begin from; None where paths were made absolute before, and a text that is not
    is no path.
    """
    if text.startswith(BUILTIN) or _ADDRESS.match(text):
        return None
    if start is None:
        return Path(text) if Path(text).is_absolute() else None
    path = _absolute(text, start)
    head, _, split = text.rpartition(":")
    if split and head and not _there(path) and _absolute(head, start).is_dir():
        return path  # a split of a folder
    if _there(path) or _PATH.match(text) or "\\" in text or is_file_name(text):
        return path
    if matching(path) or not _DATA_ID.fullmatch(text):
        return path
    return path if ":" not in text and near(path) else None


def near(path: Path) -> str | None:
    """The file or folder beside `path` whose name is most like its own; the path itself is not there."""
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return close[0] if close else None


def matching(pattern: Path) -> list[Path]:
    """The files that a pattern (*, ?, [a-z], ** for folders within) fits, in the order of their names."""
    if not glob.has_magic(str(pattern)):
        return []
    parts, literal = list(pattern.parts), Path()
    while parts and _there(literal / parts[0]):  # a folder that is called [x] is no pattern
        literal /= parts.pop(0)
    if not parts:
        return []
    fitting = (path.relative_to(literal) for path in literal.glob(str(Path(*parts))) if path.is_file())
    return sorted(literal / path for path in fitting if not any(part.startswith(".") for part in path.parts))


def is_model_id(text: str) -> bool:
    """Whether a text that names nothing on this disk may be a model's hub id: org/name."""
    return bool(_MODEL_ID.fullmatch(text)) and not is_file_name(text)


def is_file_name(text: str) -> bool:
    """Whether it ends as files of data do, ours or others'."""
    return text.lower().endswith(FILE_ENDINGS)


def hub_id_in(address: str) -> str | None:
    """The hub id that an address of the hub holds, such as https://huggingface.co/org/name."""
    match = re.match(
        rf"(?:https?://(?:huggingface\.co|hf\.co)|hf:/)/(?:datasets/)?({_PART}/{_PART})", address, re.ASCII
    )
    return match[1] if match else None


def is_address(text: str) -> bool:
    return bool(_ADDRESS.match(text))


def absolute_paths(recipe: Recipe, folder: Path, overridden: Collection[str]) -> Recipe:
    """The recipe with its paths made absolute: to the recipe's folder, or to the current one where the command line
    gave them. Hub ids, and what is built in, stay as they are.
    """
    values = recipe.model_dump()
    _check_path("output", recipe.output, folder)

    def start(section: str, key: str) -> Path:
        return Path.cwd() if f"{section}.{key}" in overridden else folder

    for section, key in (*DATA_KEYS, *ON_DISK, ("model", "path")):
        if values[section][key] is not None:
            _check_path(f"{section}.{key}", values[section][key], start(section, key))
    for section, key in DATA_KEYS:
        text = values[section][key]
        if text is not None and (path := local(text, start(section, key))):
            values[section][key] = str(path)
    model = recipe.model.path
    if not model.startswith(BUILTIN) and not is_address(model):
        path = _absolute(model, start("model", "path"))
        if _there(path) or not is_model_id(model):
            values["model"]["path"] = str(path)
    for section, key in ON_DISK:
        if (text := values[section][key]) is not None:
            values[section][key] = str(_absolute(text, start(section, key)))
    return Recipe.model_validate(values)


def _check_path(key: str, given: str, start: Path) -> None:
    """Raises RecipeError for text that no system takes as a path, or whose `~` stands for no folder."""
    try:
        if b"\0" in given.encode():
            raise RecipeError(f"{key}: {shorten(repr(given), 80)} holds a NUL character; no path has one")
        if _there(start / given):  # a file may be called so
            return
        Path(given).expanduser()
    except UnicodeEncodeError:
        reason = (
            "is not UTF-8 (half a character, or bytes of another encoding); rename it, or write the character itself"
        )
        raise RecipeError(f"{key}: {shorten(ascii(given), 80)} {reason}") from None
    except RuntimeError:
        raise RecipeError(
            f"{key}: {shorten(repr(given), 80)}: no such user on this machine; write the path out"
        ) from None
    if given.startswith("~") and not os.path.isdir(home := Path(given.split("/")[0]).expanduser()):  # noqa: PTH112
        raise RecipeError(f"{key}: {shorten(repr(given), 80)}: there is no folder {home}; write the path out")


def _absolute(text: str, start: Path) -> Path:
    """Expanded and absolute. A link keeps its own name: the hub's cache links names to files that have none."""
    try:
        path = start / Path(text).expanduser()
    except RuntimeError:  # ~ of somebody who is not known here
        path = start / text
    try:
        return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    except (OSError, RuntimeError, ValueError):  # a name that no file can have: too long, a loop, a NUL
        return path


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False

"""Resolves a data source's name to the files of each split: a folder, a pattern, or single files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.data.problems import BadSource
from finetune.recipe.names import is_file_name, local, matching, near
from finetune.recipe.schema import Data

SplitName = Literal["train", "valid", "test"]

TABLES = (".csv", ".tsv", ".tab")
ENDINGS = (".jsonl", ".ndjson", ".json", *TABLES, ".parquet")
PACKINGS = (".gz", ".zst")
_WORDS: Mapping[str, SplitName] = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_NO_ROWS = (  # JSON that stands beside rows, or in a model's folder
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "tokenizer.json",
    "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "vocab.json", "package.json",
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """The files of one source, in the order in which they are read."""

    paths: Sequence[Path]
    notes: tuple[str, ...] = ()


def ending_of(path: Path | str) -> str:
    """What the name says is in the file, whatever it is packed with: `.csv` of rows.csv.gz."""
    name = Path(path).name.lower()
    for packing in PACKINGS:
        name = name.removesuffix(packing)
    return Path(name).suffix


def files_of(source: str, base: Path | None, split: SplitName) -> Files | None:
    """The files that a source names on this disk; None where it names none: a hub data set.

    A folder gives the files of `split`, or of the one that is named after a colon. Raises BadSource.
    """
    path = local(source, base)
    if path is None:
        return None
    try:
        if path.is_dir():
            return _of_split(path, source, split)
        if path.exists():
            return Files([path])
        if paths := matching(path):
            return Files(paths, (f"{source}: {len(paths)} files",))
        folder, _, wanted = str(path).rpartition(":")
        if folder and Path(folder).is_dir():
            if wanted not in _WORDS:
                raise BadSource(source, f"no split is called {wanted}; there are train, valid and test")
            return _of_split(Path(folder), source, _WORDS[wanted])
    except OSError as error:
        raise BadSource(source, f"{error.strerror}; give another name") from None
    raise BadSource(source, _not_there(source, path))


def _not_there(source: str, path: Path) -> str:
    if "*" in source or "?" in source:
        return f"no file fits the pattern; looked in {path.parent}"
    if "\\" in source and Path(slashed := str(path).replace("\\", "/")).exists():
        return f"no such file; write slashes: {slashed}"
    close = near(path)
    if close is None and not path.parent.is_dir() and not is_file_name(path.name):
        return "neither a file nor a data set id (org/name, org/name:split, org/name/config:split)"
    if close is None:
        return f"no such file; looked in {path.parent}"
    hub = "" if is_file_name(path.name) else " (A data set of the hub is named with its split, such as org/name:train.)"
    return f"no such file; did you mean {close}?{hub}"


def held_out_sources(data: Data, base: Path | None) -> dict[SplitName, str]:
    """Where the rows of valid and test come from: the recipe's sources, or the folder of the training rows."""
    path = local(data.train, base)
    folder = _splits(path) if path is not None and path.is_dir() else {}
    named: dict[SplitName, str | None] = {"valid": data.valid, "test": data.test}
    with_folder = {name: source or (data.train if folder.get(name) else None) for name, source in named.items()}
    return {name: source for name, source in with_folder.items() if source is not None}


def _of_split(folder: Path, source: str, split: SplitName) -> Files:
    splits = _splits(folder)
    if not splits:
        arrow = any(folder.glob("**/*.arrow"))
        saved = "a data set of save_to_disk; write its rows: datasets.load_from_disk(...).to_json(...)"
        none = f"a folder without files of rows ({', '.join(ENDINGS)}); name a file"
        raise BadSource(source, f"is {saved if arrow else none}")
    if split not in splits:
        if list(splits) != ["train"]:
            have = " and ".join(splits)
            raise BadSource(source, f"the folder has rows for {have}, and none for {split}; name a file in it")
        split = "train"
    files = splits[split]
    names = ", ".join(file.name for file in files[:6]) + (", ..." if len(files) > 6 else "")
    if len({ending_of(file) for file in files}) > 1:
        raise BadSource(source, f"the folder has {split} rows in several forms ({names}); name a file, or a pattern")
    used = {file for paths in splits.values() for file in paths}
    unused = [file.name for file in _row_files(files[0].parent) if file not in used]
    left = f"; left out, as their names tell no split: {', '.join(unused[:6])}" if unused else ""
    return Files(files, (f"{source}: {names} for {split}{left}",))


def _splits(folder: Path) -> dict[SplitName, list[Path]]:
    """The files of each split, by the word for it in a file's name or its folder's; files without one are train's
    where no file has one.
    """
    files = _row_files(folder)
    inner = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _word(entry.name)]
    if not files and not inner and (folder / "data").is_dir():  # as a repository of the hub has them
        return _splits(folder / "data")
    splits: dict[SplitName, list[Path]] = {}
    for named, file in [
        *((file.name, file) for file in files),
        *((e.name, file) for e in inner for file in _row_files(e)),
    ]:
        if word := _word(named):
            splits.setdefault(word, []).append(file)
    return splits or ({"train": files} if files else {})


def _row_files(folder: Path) -> list[Path]:
    names = (file for file in sorted(folder.iterdir()) if not file.name.startswith(".") and file.name not in _NO_ROWS)
    return [file for file in names if ending_of(file) in ENDINGS and file.is_file()]


def _word(name: str) -> SplitName | None:
    """The split that a name speaks of: its first word for one (train-00000-of-00003.parquet, my_test.csv)."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def shown(path: Path, source: str, base: Path | None) -> str:
    """How messages name a file of a source: as the source does, or as its folder does."""
    if local(source, base) == path:
        return source
    if base is not None and not Path(source).is_absolute() and path.is_relative_to(base):
        return str(path.relative_to(base))
    return str(path)

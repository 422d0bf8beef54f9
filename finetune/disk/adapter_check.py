"""Reads the written adapter back and matches its names with the modules of the libraries that will load it.

No weights are loaded: both libraries build the base model from its config and shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from backends import libraries
from backends.interface import BackendError
from backends.model_folder import ModelFolder, read_object, validate
from finetune.disk.adapter_writer import CONFIG_FILE, FILES
from finetune.text import shorten

Tensors = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Loading:
    """Whether a library would load the adapter folder."""

    library: str
    fits: bool | None  # None: not checked
    reason: str = ""  # why not, why it was not checked, or what the library computes otherwise than the run did


def loadings(adapter: Path, base: ModelFolder) -> tuple[Loading, ...]:
    """For each library that the folder is written for. Never raises: a run is not lost by what is said of it."""
    return tuple(_loading(library, adapter, base) for library in libraries.by_name())


def in_words(checked: tuple[Loading, ...]) -> Iterator[str]:
    """What was checked, why a library would not load the folder, and what it computes otherwise."""
    fitting = [one.library for one in checked if one.fits]
    if fitting:
        yield f"checked: {' and '.join(fitting)} find{'s' * (len(fitting) == 1)} every layer of it"
    for one in checked:
        if one.fits is None:
            yield f"not checked for {one.library}: {one.reason}"
        elif not one.fits:
            yield f"{one.library} does not load it: {one.reason}"
        elif one.reason:
            yield f"{one.library} computes this model a little otherwise than transformers and this run: {one.reason}"


def _loading(library: str, adapter: Path, base: ModelFolder) -> Loading:
    try:
        module, config = libraries.by_name()[library], read_object(adapter / CONFIG_FILE)
        if config.get("task_type") == "SEQ_CLS" and not module.HEADS:
            return Loading(library, None, "it has no models with a classification head")
        expected = module.looks_for(base, config)
        problem = _difference(validate(adapter / FILES[library]), expected)
    except ImportError as error:
        return Loading(library, None, f"{error.name or error} is not installed here")
    except (BackendError, OSError, ValueError) as error:
        return Loading(library, False, str(error))
    except Exception as error:  # a library, or a model's own code, that fails on what it was not written for
        return Loading(library, None, shorten(f"{type(error).__name__}: {error}", 200))
    return Loading(library, problem is None, problem or module.differs(base))


def _difference(written: Tensors, expected: Tensors) -> str | None:
    """What is wrong with the tensors of a file, in words; None: nothing."""
    lacking, unknown = sorted({*expected} - {*written}), sorted({*written} - {*expected})
    if unknown:
        return f"{len(unknown)} of {len(written)} tensors are not looked for, such as {unknown[0]}"
    if lacking:
        return f"{len(lacking)} of {len(expected)} tensors are missing, such as {lacking[0]}"
    for name, shape in expected.items():
        if written[name] != shape:
            return f"{name} is {list(written[name])}, and must be {list(shape)}"
    return None if written else "there are no tensors in it"

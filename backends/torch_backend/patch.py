"""A transformers model with some of its modules' forward passes replaced for a while."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from types import FunctionType
from typing import Any

from transformers import masking_utils

_IN_BLOCK = re.compile(r"^(.*\blayers)\.(\d+)\.")


@contextmanager
def forward_as(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """In here the module computes `forward`."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """In here transformers does not look for several sequences in a row, for which a GPU's host would wait."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def blocks_of(model: Any) -> tuple[Any, int]:
    """The model's blocks, in order, and which of them is the first in which something trains."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    matches = [match for match in map(_IN_BLOCK.match, names) if match]
    return model.get_submodule(matches[0][1]), min(int(match[2]) for match in matches)


def is_coded_as(module: Any, known: Any) -> bool:
    """Whether the module's class computes what the class `known` does, whatever its name."""
    return same_code(*(unwrap(kind.forward) for kind in (type(module), known) if hasattr(kind, "forward")))


def same_code(*functions: Any) -> bool:
    """Whether both functions are there and do the same: their own code, and that of functions which both call."""
    parts = ("co_code", "co_consts", "co_names", "co_varnames")
    codes = [getattr(function, "__code__", None) for function in functions]
    if len(codes) != 2 or None in codes:
        return False
    if codes[0] is codes[1]:
        return True
    if not all(getattr(codes[0], part) == getattr(codes[1], part) for part in parts):
        return False
    called = [[unwrap(f) if callable(f) else f for f in _globals_of(function)] for function in functions]
    pairs = [pair for pair in zip(*called, strict=True) if any(isinstance(one, FunctionType) for one in pair)]
    return all(same_code(*pair) for pair in pairs)


def _globals_of(function: Any) -> list[Any]:
    """What stands under the names that the function reads, in its module; None: no such global there."""
    return [function.__globals__.get(name) for name in function.__code__.co_names]

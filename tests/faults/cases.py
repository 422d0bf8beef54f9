"""How many cases: a few in the normal suite, all of them with `-m "slow or not slow"`."""

from __future__ import annotations

from typing import Any

import pytest


def cases(quick: int, whole: int) -> list[Any]:
    """0 .. whole - 1; those from `quick` on are slow."""
    return [*range(quick), *(pytest.param(number, marks=pytest.mark.slow) for number in range(quick, whole))]


def amounts(quick: int, whole: int) -> list[Any]:
    """So many inside one test: `quick`, and slowly `whole`."""
    return [quick, pytest.param(whole, marks=pytest.mark.slow)]

"""Errors a person can act on, each with its exit code."""

from __future__ import annotations


class FinetuneError(Exception):
    """Something the user can mend; the message names the place and the remedy."""

    exit_code = 1


class RecipeError(FinetuneError):
    exit_code = 2


class DataError(FinetuneError):
    exit_code = 3


class Diverged(FinetuneError):
    exit_code = 4


class MemoryExhausted(FinetuneError):
    exit_code = 5


class DiskError(FinetuneError):
    exit_code = 6


class EnvironmentProblem(FinetuneError):
    """The backend cannot be used, or cannot do what the recipe asks."""

    exit_code = 7


class Incompatible(FinetuneError):
    """Files that do not belong together: another base, another rank, a broken checkpoint."""

    exit_code = 8


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint of the current step is written."""

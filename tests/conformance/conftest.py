"""Which backends the suite runs on: all that the registry names, and MLX in two forms."""

from __future__ import annotations

import os

import pytest

from backends import registry
from tests.conformance.toy import registered


@pytest.fixture
def usable() -> object:
    """Skips, or fails where FINETUNE_REQUIRE_BACKENDS (comma-separated) names the backend, with the probe's reason."""
    required = {name.strip() for name in os.environ.get("FINETUNE_REQUIRE_BACKENDS", "").split(",")}

    def check(name: str) -> None:
        name = registered(name)
        reason = registry.probe(name)
        if reason is not None:
            (pytest.fail if name in required else pytest.skip)(f"{name}: {reason}")

    return check

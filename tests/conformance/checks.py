"""Every check of the contract by name, for the backends and for the planted faults alike."""

from __future__ import annotations

from collections.abc import Callable

from tests.conformance import checks_dora, checks_head, checks_inference, checks_training, checks_whole
from tests.conformance.toy import Case

CHECKS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("check_"): check
    for module in (checks_inference, checks_training, checks_head, checks_dora, checks_whole)
    for name, check in vars(module).items()
    if name.startswith("check_")
}

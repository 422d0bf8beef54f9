"""Prompts shown without their template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_EDGE = re.compile(r"\s|<\|?/?\w+\|?>|\[/?[A-Z]+\]")  # a space, or a mark of a template: <|im_end|>, </s>, [/INST]


def distinct(prompts: Sequence[str]) -> list[str]:
    """Prompts without the template around them: without what all of them begin or end with, up to a space or a mark."""
    if len(set(prompts)) < 2:
        return list(prompts)
    start = max((edge.end() for edge in _EDGE.finditer(_common(prompts))), default=0)
    rest = [prompt[start:] for prompt in prompts]
    shared = _common([prompt[::-1] for prompt in rest])[::-1]
    edge = _EDGE.search(shared)
    end = len(shared) - edge.start() if edge else 0
    return [prompt[: len(prompt) - end] for prompt in rest]


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    return "".join(chars[0] for chars in takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False)))

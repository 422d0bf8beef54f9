"""Where an assistant's turns begin and end in the text that a chat template wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.messages import THOUGHTS

_OPENS = re.compile(r"(?:<([a-zA-Z_]\w*)>|\[([A-Z_]+)\])\s*$")  # a thought that a prompt begins: <think>, [THINK]


class Rewritten(Exception):
    """The template writes an earlier turn in another way once more turns follow."""


class TurnFinder:
    def __init__(self, end: str | None, specials: Sequence[str]) -> None:
        """end: the end token of a turn as it is written, where the template has one. specials: all special tokens."""
        self.end = end
        self.specials = tuple(specials)

    def find(self, whole: str, before: str, until: str) -> tuple[int, int, int]:
        """Where an assistant turn begins, where its words end, and where its end token does.

        before: the text with the prompt for the turn; until: up to the turn's end. What a template writes after the end
        token (Phi-3: EOS after the last turn) belongs to no turn. Raises Rewritten where `whole` begins otherwise.
        """
        start = len(before)
        end = max(start, len(until.rstrip()))
        if self.end and until.endswith(self.end, start, end):
            content_end = end - len(self.end)
        elif self.end and (at := until.find(self.end, self._tail(until, start))) >= 0:
            content_end, end = at, at + len(self.end)
        else:
            content_end = end - self._special_before(until, start, end)
        if not whole.startswith(before) or not whole.startswith(until[:end]) or end <= start:
            raise Rewritten
        return start, content_end, end

    def _tail(self, text: str, start: int) -> int:
        """From where on there is nothing but special tokens and white space."""
        end = len(text)
        while end > start:
            length = 1 if text[end - 1].isspace() else self._special_before(text, start, end)
            if not length:
                break
            end -= length
        return end

    def _special_before(self, text: str, start: int, end: int) -> int:
        """The length of the special token that ends at `end`; 0 for none."""
        if not text.endswith(self.specials, start, end):
            return 0
        return max(len(special) for special in self.specials if text.endswith(special, start, end))


def with_thought(before: str, whole: str, answer: Mapping[str, Any]) -> str:
    """The finished text as a model writes it that is asked with `before`, where that opens a thought.

    The templates of some reasoning models begin a thought in the prompt and write none in a finished answer
    (R1-Distill, QwQ). The thought is that of the row, or empty as the family writes it: a line, then the closing mark.
    Where the prompt opens none, the text stays.
    """
    opening = _OPENS.search(before)
    if whole.startswith(before) or opening is None or not whole.startswith(before[: opening.start()]):
        return whole
    closing = f"</{opening[1]}>" if opening[1] else f"[/{opening[2]}]"
    mark, content = opening[0].strip(), answer["content"]
    thought = answer.get(THOUGHTS[0], "")
    if not thought and closing in content:
        thought = content.split(closing, 1)[0].split(mark, 1)[-1]
    rest = whole[opening.start() :]
    line = f"{thought.strip()}\n" if thought.strip() else "\n"
    return f"{before}{line}{closing}\n\n{rest.lstrip()}"

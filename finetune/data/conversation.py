"""Input, output and time limit of a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from finetune.errors import EnvironmentProblem

SECONDS = 0.5  # of processor time, for one conversation; honest ones take thousandths
# For each time that a message is rendered, and for each of its characters: some five times what honest ones take.
FOR_MESSAGE, FOR_CHARACTER = 50e-6, 50e-9
LONGEST = 120.0  # seconds for any conversation
TEMPLATE_LENGTH = 1_000_000  # characters; the longest in use have some ten thousand
TOGETHER, CHARACTERS = 256, 2**22  # conversations whose texts are held at a time, and characters of those texts
REMEDY = "look at it, and give the model another one, or set prompt.template: plain"
FEW, SHORT = 4, 10_000  # messages, characters


class Conversation(NamedTuple):
    """What is rendered: of the messages the first n, for each (n, answering); answering: with the prompt for an answer
    after them.
    """

    messages: Sequence[Mapping[str, Any]]
    prefixes: Sequence[tuple[int, bool]]
    tools: Sequence[Any] | None = None


class Texts(Sequence[str]):
    """The texts of a conversation's prefixes, made when they are asked for: most are the beginning of the last."""

    def __init__(self, written: Sequence[tuple[int, str]]) -> None:
        """written: of each how much of the last it begins with, and what follows; of the last all."""
        self._written, self.whole = written, written[-1][1]

    def __len__(self) -> int:
        return len(self._written)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        shared, rest = self._written[at]
        return self.whole[:shared] + rest


class Request(NamedTuple):
    """A conversation with the template that writes it, and what the template finds beside the messages."""

    template: str
    values: Mapping[str, Any]
    conversation: Conversation

    @property
    def renderings(self) -> int:
        """How often a message is written: it grows with the square of a conversation's turns."""
        return sum(count for count, _ in self.conversation.prefixes)

    def seconds(self, size: int) -> float:
        """Of processor time, the most that it may take. size: of its messages, in characters."""
        each = FOR_MESSAGE + FOR_CHARACTER * size / max(len(self.conversation.messages), 1)
        return SECONDS + self.renderings * each

    @property
    def trivial(self) -> bool:
        """A template has no excuse for what it does with so little."""
        messages = self.conversation.messages
        return len(messages) <= FEW and sum(len(str(value)) for one in messages for value in one.values()) <= SHORT


def batches(sizes: Sequence[int]) -> Iterator[range]:
    """Conversations in order, so many at a time that memory stays small. sizes: characters of each one's texts."""
    start = characters = 0
    for row, size in enumerate(sizes):
        if row > start and (characters + size > CHARACTERS or row - start == TOGETHER):
            yield range(start, row)
            start, characters = row, 0
        characters += size
    if sizes:
        yield range(start, len(sizes))


def template_text(tokenizer: Any, template: str | None, tools: bool, named: str) -> str:
    """The template, which a tokenizer may choose by whether there are tools."""
    try:
        text = tokenizer.get_chat_template(template, [{}] if tools else None)
    except (TypeError, AttributeError, KeyError):  # of what a damaged tokenizer_config.json gives as templates
        text = None
    if not isinstance(text, str):
        raise EnvironmentProblem(f"{named} is not text; {REMEDY}")
    if len(text) > TEMPLATE_LENGTH:
        raise EnvironmentProblem(f"{named} has {len(text):,} characters; {REMEDY}")
    return text

"""Records to examples: rendered, tokenised and truncated, with an account of every row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import numpy as np

from finetune.data.labels import ClassWriter, LabelWriter
from finetune.data.loss_mask import tokenise
from finetune.data.rows import Example, Prepared, Problem, Record, Rendered, Split
from finetune.data.tokenizer import Tokenizer, begin_tokens
from finetune.data.truncate import Pair, fit, overlap, windows
from finetune.data.unrendered import lost_fields, notes
from finetune.events import Progress
from finetune.recipe.schema import Recipe

_UNPAIRED = "its two answers do not both fit after the same prompt; raise train.max_length"
TOGETHER = 2000  # rows that are text and tokens at the same time; what is kept of them is smaller


class Writer:
    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, prepared: Prepared) -> None:
        assert prepared.renderer is not None
        self._settings, self._tokenizer, self._renderer = recipe.train, tokenizer, prepared.renderer
        self._splits = recipe.data.long_rows == "split"
        self._known = frozenset(re.findall(r"\w+", self._renderer.source))
        self.labels: LabelWriter | ClassWriter = (
            ClassWriter(prepared.labels) if recipe.head else LabelWriter(tokenizer, self._renderer, prepared.labels)
        )

    def write(self, split: Split) -> Generator[Progress, None, Split]:
        """The split with its rows as tokens within max_length; a pair of answers as one example with another in it."""
        written = yield from self._write(split)
        worse = [record.rejected for record in split.records if record.rejected is not None]
        if not worse:
            return written
        return _paired(written, (yield from self._write(replace(split, records=worse))))

    def _write(self, split: Split) -> Generator[Progress, None, Split]:
        """Some rows at a time, so that memory stays small."""
        fate, total = _Fate(), len(split.records)
        for start in range(0, total, TOGETHER):
            rendered = self._render(split.records[start : start + TOGETHER], fate)
            self._fit(list(zip(rendered, tokenise(self._tokenizer, rendered), strict=True)), fate)
            yield Progress(0, f"data: preparing {split.name}", min(start + TOGETHER, total), total)
        return replace(
            split,
            examples=tuple(fate.examples),
            lengths=tuple(fate.lengths),
            shortened=tuple(fate.shortened),
            dropped=tuple(fate.dropped),
            refused=tuple(fate.refused),
            too_long=tuple(fate.too_long),
            left_out_fields=dict(fate.fields.most_common()),
            lost_tokens=fate.lost,
            lost_supervised=fate.lost_supervised,
            notes=(*split.notes, *_notes(fate, self._settings.max_length)),
        )

    def _render(self, records: Sequence[Record], fate: _Fate) -> list[Rendered]:
        texts: list[Rendered] = []
        for record, written in zip(records, self._renderer.render_all(records), strict=True):
            if isinstance(written, ValueError):
                fate.refused.append((record.location, str(written)))
                continue
            fate.rendered += 1
            fate.unrolled += len(written) > 1
            if lost := lost_fields(record, written, self._known):
                fate.fields.update(lost)
            texts += written
        return texts

    def _fit(self, pairs: Sequence[Pair], fate: _Fate) -> None:
        max_length, policy = self._settings.max_length, self._settings.truncation
        fate.lengths += [len(whole) for _, whole in pairs]
        if self._splits:
            pairs = [pair for pair in pairs if not self._split_up(pair, fate)]
        fitted = fit(self._tokenizer, self._renderer, pairs, max_length, policy)
        for (_, whole), row in zip(pairs, fitted, strict=True):
            long = len(whole) > max_length
            if isinstance(row, str):
                (fate.too_long if long and policy == "error" else fate.dropped).append((whole.location, row))
                fate.lose(whole, None)
                continue
            text, example = row
            try:
                written = self.labels.write(text.record, example)
            except ValueError as error:
                fate.refused.append((whole.location, str(error)))
                continue
            if long:
                fate.shortened.append(whole.location)
                fate.lose(whole, example)
            fate.examples.append(written)

    def _split_up(self, pair: Pair, fate: _Fate) -> bool:
        """Whether the row was too long, and so has become windows."""
        _, whole = pair
        if len(whole) <= self._settings.max_length:
            return False
        parts = windows(whole, self._settings.max_length, begin_tokens(self._tokenizer))
        fate.examples += parts
        fate.split, fate.windows = fate.split + 1, fate.windows + len(parts)
        return True


def _paired(better: Split, worse: Split) -> Split:
    """Both answers of each row in one example; a row that lost one, or whose prompts differ now, is left out."""
    others = {example.location: example for example in worse.examples}
    pairs, dropped = [], [*better.dropped]
    for example in better.examples:
        other = others.get(example.location)
        if other is not None and np.array_equal(example.prompt_tokens, other.prompt_tokens):
            pairs.append(replace(example, rejected=other))
        else:
            dropped.append((example.location, _UNPAIRED))
    return replace(better, examples=tuple(pairs), dropped=tuple(dropped))


@dataclass
class _Fate:
    """What becomes of a split's rows, as in `Split`."""

    examples: list[Example] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)
    dropped: list[Problem] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    too_long: list[Problem] = field(default_factory=list)
    unrolled: int = 0  # conversations
    rendered: int = 0  # records
    fields: Counter[str] = field(default_factory=Counter)  # that stand in no text -> rows
    split: int = 0  # rows of text
    windows: int = 0  # that they became
    lost: int = 0  # tokens
    lost_supervised: int = 0

    def lose(self, whole: Example, rest: Example | None) -> None:
        """Counts what is missing of a row."""
        self.lost += len(whole) - (len(rest) if rest else 0)
        self.lost_supervised += int(whole.weights.sum()) - (int(rest.weights.sum()) if rest else 0)


def _notes(fate: _Fate, max_length: int) -> Iterator[str]:
    yield from notes(fate.fields, fate.rendered)
    apart, cut = (sum(map(attrgetter(name), fate.examples)) for name in ("apart", "cut"))
    if fate.unrolled:
        yield f"{fate.unrolled} conversations unrolled: the chat template rewrites earlier turns"
    if apart:
        yield f"{apart} rows: a token lay across the border of an answer; prompt and answer were encoded apart"
    if fate.split:
        again = f"{overlap(max_length)} of them again and not learned twice"
        yield f"{fate.split} rows of text split into {fate.windows} of at most {max_length} tokens, {again}"
    if cut:
        yield f"{cut} rows lost their end, and with it their end token"
    if fate.lost:
        supervised = fate.lost_supervised + int(sum(example.weights.sum() for example in fate.examples))
        yield (
            f"{fate.lost / sum(fate.lengths):.1%} of all tokens ({fate.lost:,}) and "
            f"{fate.lost_supervised / max(supervised, 1):.1%} of the supervised ones are lost at train.max_length"
        )

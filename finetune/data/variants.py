"""Held-out questions rephrased, or with names and pronouns swapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.examples import Writer
from finetune.data.rows import Example, Prepared, Record, Split
from finetune.data.tokenizer import Tokenizer
from finetune.events import result_of
from finetune.recipe.schema import Recipe

Change = Callable[[Mapping[str, str]], Mapping[str, str]]  # the texts of a prompt by name -> those that change


@dataclass(frozen=True)
class Variants:
    """Examples that each ask another form of a held-out row."""

    rows: tuple[int, ...] = ()  # the number of that row
    examples: tuple[Example, ...] = ()


def variants(recipe: Recipe, tokenizer: Tokenizer, prepared: Prepared, change: Change, most: int) -> Variants:
    """At most so many, drawn with the recipe's seed, of the rows that `change` changes; in the rows' order.

    Needs the records of `prepared`. Rows that were cut, and conversations of several examples, are passed over.
    """
    split, renderer = prepared.held_out, prepared.renderer
    if renderer is None or not split.records or not most:
        return Variants()
    times = Counter(example.location for example in split.examples)
    number = {example.location: i for i, example in enumerate(split.examples)}
    whole = {location for location, count in times.items() if count == 1} - {*split.shortened}
    changed: dict[int, Record] = {}
    for i in np.random.default_rng(recipe.seed).permutation(len(split.records)).tolist():
        record = split.records[i]
        new = change(renderer.parts(record)) if record.location in whole else {}
        for part, text in new.items():
            record = renderer.shorten(record, part, text)
        if new:
            changed[i] = record
        if len(changed) == most:
            break
    asked = Split("variants", len(changed), records=[changed[i] for i in sorted(changed)])
    written = result_of(Writer(recipe, tokenizer, prepared).write(asked))
    kept = [example for example in written.examples if example.location not in written.shortened]
    return Variants(tuple(number[example.location] for example in kept), tuple(kept))


def held_out_with(prepared: Prepared, examples: tuple[Example, ...]) -> Prepared:
    """The same data, with these examples as the rows that are measured."""
    return replace(prepared, test=replace(prepared.held_out, rows=len(examples), examples=examples, records=[]))

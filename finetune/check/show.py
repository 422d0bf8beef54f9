"""Findings for people: tables, a histogram in text, and the first rows of every list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from finetune.check.balance import Balance
from finetune.check.duplicates import Duplicates
from finetune.check.lengths import Lengths
from finetune.check.personal import Personal
from finetune.check.survey import Findings
from finetune.check.tokens import REMEDIES, Specials, TokenCheck
from finetune.data.problems import listed
from finetune.data.tokenizer import Tokenizer
from finetune.report.tables import highlighted
from finetune.text import harmless, plain_page, shorten

SHOWN = 10  # rows of a list
LABELS_SHOWN = 20
BAR = 40  # characters


def show(console: Console, found: Findings, tokenizer: Tokenizer) -> None:
    """Every section in turn; the bad rows come first."""
    for title, parts in sections(found, tokenizer):
        console.rule(title, align="left")
        for part in parts:
            if isinstance(part, Text):
                part.plain = harmless(part.plain)
            console.print(part, soft_wrap=isinstance(part, Text))


def as_text(found: Findings, tokenizer: Tokenizer) -> str:
    return plain_page(lambda console: show(console, found, tokenizer))


def sections(found: Findings, tokenizer: Tokenizer) -> Iterator[tuple[str, Sequence[RenderableType]]]:
    yield "rows", _rows(found)
    yield "how they will be trained on", _training(found, tokenizer)
    yield "lengths, in tokens of the training rows", _lengths(found.lengths)
    yield "duplicates and leaks", _duplicates(found.duplicates)
    if found.balance.labels or found.balance.groups:
        yield "balance", _balance(found.balance, found.label_lengths)
    yield "enough data?", [Text(f"{found.enough.level}: " + "\n".join(found.enough.reasons))]
    yield "personal data and secrets", _personal(found.personal)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    return table


def _rows(found: Findings) -> list[RenderableType]:
    table = _table("split", "rows", "whole", "trained on")
    for name, split in found.splits.items():
        table.add_row(name, f"{split.rows:,}", f"{split.good:,}", f"{split.used:,}")
    notes = dict.fromkeys(note for split in found.splits.values() for note in split.notes)
    parts: list[RenderableType] = [
        Text(f"read as {found.format}, task {found.task}, template {found.template!r}"),
        table,
        *map(Text, notes),
    ]
    if found.bad:
        verdict = "left out, as data.on_error says" if found.skipped else "to be mended"
        parts.append(Text(f"{len(found.bad):,} bad row{'s' * (len(found.bad) > 1)}, {verdict}:", "bold red"))
        parts.append(Text(listed(found.bad)))
    if found.broken:
        parts.append(Text(f"to be mended before training:\n{listed(found.broken)}", "bold red"))
    return parts


def _training(found: Findings, tokenizer: Tokenizer) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for example in found.samples:
        last = example.tokens[example.weights > 0][-1:].tolist()
        parts.append(
            Text(f"{example.place}; learned tokens in brackets, the last is {tokenizer.decode(last)!r}", "bold")
        )
        parts.append(highlighted(example, tokenizer))
    return [*parts, _verdict(found.tokens), *_specials(found.specials)]


def _verdict(checked: TokenCheck) -> Text:
    faults = {kind: places for kind, places in checked.faults.items() if places}
    apart = f" ({checked.apart:,} with prompt and answer encoded apart)" if checked.apart else ""
    end = "learned tokens, an end token" if checked.end_token else "learned tokens (no end token, as the recipe says)"
    if not faults:
        return Text(
            f"checked {_counted(checked.rows)}: all have {end}, one begin token and a true prompt{apart}", "green"
        )
    lines = [
        f"{len(places):,} of {checked.rows:,} rows: {kind}; {REMEDIES[kind]}\n{_places(places)}"
        for kind, places in faults.items()
    ]
    return Text("\n".join(lines), "bold red")


def _specials(found: Specials) -> list[RenderableType]:
    if not found.places:
        return []
    commonest = sorted(found.tokens.items(), key=lambda one: (-one[1], one[0]))
    tokens = ", ".join(f"{token} ({_counted(rows)})" for token, rows in commonest[:SHOWN])
    said = f"special tokens written out in {_rows_of(found.places)}: {tokens}; the tokenizer reads them as special"
    if found.meant:
        return [Text(f"{said}, as plain text may want it\n{_places(found.places)}")]
    return [Text(f"{said}, not as words: take them out, or write them otherwise\n{_places(found.places)}", "yellow")]


def _rows_of(rows: Sequence[object]) -> str:
    return _counted(len(rows))


def _counted(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


def _places(places: Sequence[str]) -> str:
    more = f", and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
    return "  " + ", ".join(places[:SHOWN]) + more


def _lengths(found: Lengths) -> list[RenderableType]:
    table = _table("tokens", "rows", "")
    most = max(count for _, _, count in found.histogram)
    for low, high, count in found.histogram:
        label = f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        table.add_row(label, f"{count:,}", Text("█" * round(BAR * count / most), "cyan"))
    table.columns[2].justify = "left"
    ranks = ", ".join(f"{rank} %: {length:,}" for rank, length in found.percentiles.items() if rank < 100)
    parts: list[RenderableType] = [table, Text(f"{ranks}, longest: {found.percentiles[100]:,}")]
    for what, places in (
        ("with a shortened prompt", found.shortened),
        ("without their end", found.cut),
        ("dropped", [f"{place} ({reason})" for place, reason in found.dropped]),
    ):
        if places:
            parts.append(Text(f"{_rows_of(places)} {what} at train.max_length {found.max_length}\n{_places(places)}"))
    said = f"padding: {found.padding:.1%} of the positions; {found.padding_naive:.1%} in batches in the file's order"
    return [*parts, Text(said)]


def _duplicates(found: Duplicates) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for what, pairs in (("the same as", found.exact), ("nearly the same as", found.near)):
        if pairs:
            rows = [
                f"{one.place} and {one.other}" + (f" ({one.similarity:.0%})" if one.similarity < 1 else "")
                for one in pairs
            ]
            parts.append(Text(f"repeated: {_rows_of(pairs)} of train {what} an earlier one\n{_places(rows)}"))
    if found.leaks:
        rows = [
            f"{split} {one.place} is in {other}: {one.other} ({one.similarity:.0%})"
            for split, other, one in found.leaks
        ]
        said = f"leaked: {_rows_of(found.leaks)} held out; take them out of one side, or the figures flatter"
        parts.append(Text(f"{said}\n{_places(rows)}", "bold red"))
    return parts or [Text("none", "green")]


def _balance(found: Balance, lengths: dict[str, float]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if found.labels:
        splits = list(found.labels)
        table = _table("label", *splits, "median tokens", "telling words (rows with it here / elsewhere; ! = alone)")
        table.columns[-1].justify = "left"
        for label in sorted(found.labels["train"], key=lambda label: -found.labels["train"][label])[:LABELS_SHOWN]:
            words = (f"{'!' * one.alone}{one.word} {one.rows}/{one.elsewhere}" for one in found.words.get(label, ()))
            counts = (f"{found.labels[split].get(label, 0):,}" for split in splits)
            table.add_row(Text(shorten(label, 40)), *counts, f"{lengths.get(label, 0):g}", Text(", ".join(words)))
        if len(found.labels["train"]) > LABELS_SHOWN:
            table.caption = f"the {LABELS_SHOWN} commonest of {len(found.labels['train'])} labels"
        parts.append(table)
    if found.contradictions:
        rows = [" and ".join(f"{place} {label}" for place, label in same[:4]) for same in found.contradictions]
        said = f"contradictory: {len(rows):,} text{'s' * (len(rows) > 1)} under different labels; decide which is right"
        text = f"{said}\n{_places(rows)}"
        parts.append(Text(text, "bold red"))
    if found.groups:
        parts.append(_groups(found))
    return parts


def _groups(found: Balance) -> Table:
    labels = list(found.labels.get("train", {}))[:LABELS_SHOWN]
    table = _table("group", "rows", "share", *(Text(shorten(label, 20)).plain for label in labels))
    for name, group in found.groups.items():
        shares = (f"{group.labels.get(label, 0) / max(group.rows, 1):.0%}" for label in labels)
        table.add_row(Text(shorten(name, 40)), f"{group.rows:,}", f"{group.share:.1%}", *shares)
    return table


def _personal(found: Personal) -> list[RenderableType]:
    if not found.kinds:
        return [
            Text("none of the kinds looked for: e-mail addresses, phone and card numbers, keys and tokens", "green")
        ]
    lines = []
    for kind, one in found.kinds.items():
        shown = [f"{place} {value}" for place, value in one.shown]
        lines.append(f"{kind}: {one.count:,} in {_counted(one.rows)}\n{_places(shown)}")
    return [Text("\n".join(lines), "yellow")]


def headline(found: dict[str, Any]) -> str:
    """One line of what `as_json` gave, for the end of a run."""
    pairs = found["duplicates"]
    personal = sum(one["rows"] for one in found["personal"].values())
    specials = found["special_tokens"]
    counts = {
        "repeated": len(pairs["exact"]) + len(pairs["near"]),
        "leaked from one split to another": len(pairs["leaks"]),
        "with personal data": personal,
        "with special tokens written out": 0 if specials["meant"] else len(specials["places"]),
        "faulty": found["faults"],
    }
    said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    enough = found["enough"]
    return f"rows: {said or 'none repeated, leaked or faulty'}; {enough['level']}: {enough['reasons'][0]}"

"""Shows findings: tables, a text histogram, and the first rows of each list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from finetune.check.balance import Balance
from finetune.check.duplicates import Duplicates
from finetune.check.lengths import Lengths
from finetune.check.personal import Personal
from finetune.check.survey import Findings, as_json
from finetune.check.tokens import REMEDIES, Specials, TokenCheck
from finetune.check.verdict import verdict
from finetune.console import Console, lines, plain_page
from finetune.data.problems import listed
from finetune.data.tokenizer import Tokenizer
from finetune.report.row_tokens import highlighted
from finetune.report.tables import account_notes, account_table, figures_table
from finetune.text import from_here, shorten

SHOWN = 10  # rows of a list
LABELS_SHOWN = 20
BAR = 40  # characters
WIDTH = 70  # of a line of rows


def show(console: Console, findings: Findings, tokenizer: Tokenizer) -> None:
    """The verdict, then every section in turn; the bad rows come first."""
    for part in verdict(findings, as_json(findings, tokenizer)):
        console.print(part)
    for title, parts in sections(findings, tokenizer):
        console.rule(title, align="left")
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))


def as_text(findings: Findings, tokenizer: Tokenizer) -> str:
    return plain_page(lambda console: show(console, findings, tokenizer))


def sections(findings: Findings, tokenizer: Tokenizer) -> Iterator[tuple[str, Sequence[RenderableType]]]:
    yield "rows", _rows(findings)
    yield "how they will be trained on", _training(findings, tokenizer)
    yield "lengths, in tokens of the training rows", _lengths(findings.lengths, findings.beyond)
    yield "duplicates and leaks", _duplicates(findings.duplicates)
    if findings.balance.labels or findings.balance.groups:
        yield "balance", _balance(findings.balance, findings.label_lengths)
    yield "enough data?", [lines(*_judgement(findings.enough.level, findings.enough.reasons))]
    yield "personal data and secrets", _personal(findings.personal)


def _rows(findings: Findings) -> list[RenderableType]:
    prepared = findings.prepared
    parts: list[RenderableType] = [
        lines(f"read as {prepared.format}, task {prepared.task}, template {prepared.template!r}"),
        account_table(prepared),
        *map(lines, account_notes(prepared)),
    ]
    if findings.bad:
        count = len(findings.bad)
        verdict = "left out, as data.on_error says" if findings.skipped else "to be fixed"
        parts.append(Text(f"{count:,} bad row{'s' * (count > 1)}, {verdict}:", "bold red"))
        parts.append(lines(*listed(findings.bad)))
    if findings.broken:
        parts.append(lines("to be fixed before training:", *listed(findings.broken), style="bold red"))
    return parts


def _training(findings: Findings, tokenizer: Tokenizer) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for sample in findings.samples:
        last = sample.tokens[sample.weights > 0][-1:].tolist()
        title = f"{from_here(sample.location)}; supervised tokens in brackets, the last is {tokenizer.decode(last)!r}"
        parts += [lines(title, style="bold"), highlighted(sample, tokenizer)]
    return [*parts, _verdict(findings.tokens), *_specials(findings.specials)]


def _verdict(checked: TokenCheck) -> Text:
    faults = {kind: locations for kind, locations in checked.faults.items() if locations}
    if not faults:
        apart = f" ({checked.apart:,} with prompt and answer encoded apart)" if checked.apart else ""
        end = "one end token" if checked.end_token else "no end token, as the recipe says"
        rows = _counted(checked.rows)
        text = f"checked {rows}: every row has a supervised answer, {end}, one begin token, and its prompt matches"
        return Text(text + apart, "green")
    texts: list[str] = []
    for kind, locations in faults.items():
        texts += [f"{len(locations):,} of {checked.rows:,} rows: {kind}; {REMEDIES[kind]}", *_first(locations)]
    return lines(*texts, style="bold red")


def _specials(specials: Specials) -> list[RenderableType]:
    if not specials.locations:
        return []
    commonest = sorted(specials.tokens.items(), key=lambda pair: (-pair[1], pair[0]))
    tokens = ", ".join(f"{token} ({_counted(rows)})" for token, rows in commonest[:SHOWN])
    rows, where = _counted(len(specials.locations)), _first(specials.locations)
    text = f"special tokens written out in {rows}: {tokens}; the tokenizer reads them as special"
    if specials.meant:
        return [lines(f"{text}, as plain text may want it", *where)]
    return [lines(f"{text}, not as words: take them out, or write them otherwise", *where, style="yellow")]


def _rows_of(rows: Sequence[object]) -> str:
    return _counted(len(rows))


def _counted(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


def _judgement(level: str, reasons: Sequence[str]) -> list[str]:
    return [f"{level}: {reasons[0]}", *reasons[1:]]


def _first(rows: Sequence[str]) -> list[str]:
    """Lines: locations side by side; what is longer, a line each."""
    shown = [from_here(row) for row in rows[:SHOWN]]
    shown += [f"and {len(rows) - SHOWN:,} more"] * (len(rows) > SHOWN)
    if sum(map(len, shown)) < WIDTH:
        return ["  " + ", ".join(shown)]
    return [f"  {row}" for row in shown]


def _lengths(lengths: Lengths, beyond: str | None) -> list[RenderableType]:
    table = figures_table("tokens", "rows", "")
    most = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        label = f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        table.add_row(label, f"{count:,}", Text("█" * round(BAR * count / most), "cyan"))
    table.columns[2].justify = "left"
    ranks = figures_table("share of rows", "tokens, at most")
    for rank, length in lengths.percentiles.items():
        ranks.add_row(f"{rank} %" if rank < 100 else "longest row", f"{length:,}")
    padding = figures_table("padding", "share of positions")
    padding.add_row("in the batches of training", f"{lengths.padding:.1%}")
    padding.add_row("in batches in the file's order", f"{lengths.padding_naive:.1%}")
    parts: list[RenderableType] = [table, Text(), ranks, Text(), padding]
    for what, rows in (
        ("with a shortened prompt", lengths.shortened),
        ("without their end", lengths.cut),
        ("dropped", [f"{location} ({reason})" for location, reason in lengths.dropped]),
    ):
        if rows:
            text = f"{_counted(len(rows))} {what} at train.max_length {lengths.max_length}"
            parts.append(lines(text, *_first(rows)))
    return [*parts, *([lines(beyond, style="yellow")] if beyond else [])]


def _duplicates(duplicates: Duplicates) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for what, pairs in (("the same as", duplicates.exact), ("nearly the same as", duplicates.near)):
        if pairs:
            rows = [
                f"{pair.location} and {pair.other}" + (f" ({pair.similarity:.0%})" if pair.similarity < 1 else "")
                for pair in pairs
            ]
            parts.append(lines(f"repeated: {_counted(len(rows))} of train {what} an earlier one", *_first(rows)))
    if duplicates.leaks:
        rows = [
            f"{split} {pair.location} is in {other}: {pair.other} ({pair.similarity:.0%})"
            for split, other, pair in duplicates.leaks
        ]
        text = f"leaked: {_counted(len(rows))} held out; take them out of one side, or the figures flatter"
        parts.append(lines(text, *_first(rows), style="bold red"))
    return parts or [Text("none", "green")]


def _balance(balance: Balance, lengths: dict[str, float]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if balance.labels:
        parts.append(_labels(balance, lengths))
        if len(balance.labels["train"]) > LABELS_SHOWN:
            parts.append(Text(f"the {LABELS_SHOWN} commonest of {len(balance.labels['train'])} labels", "dim"))
        if any(balance.words.values()):
            parts.append(Text("n/m: rows with the word under this label / others; !: the word alone tells it", "dim"))
    if balance.alike:
        train = balance.labels["train"]
        shown = [
            "  " + ", ".join(f"{label!r} ({train.get(label, 0):,})" for label in group)
            for group in balance.alike[:SHOWN]
        ]
        text = "labels that look alike: where they mean one, write them in one way; now each is a label of its own"
        parts.append(lines(text, *shown, style="yellow"))
    if balance.contradictions:
        rows = [" and ".join(f"{location} {label}" for location, label in same[:4]) for same in balance.contradictions]
        texts = f"{len(rows):,} text{'s' * (len(rows) > 1)}"
        text = f"contradictory: {texts} under different labels; decide which is right"
        parts.append(lines(text, *_first(rows), style="bold red"))
    if balance.groups:
        parts.append(_groups(balance))
    return parts


def _labels(balance: Balance, lengths: dict[str, float]) -> Table:
    splits, train = list(balance.labels), balance.labels["train"]
    table = figures_table("label", *splits, "median tokens", "words that predict it")
    table.columns[0].no_wrap = True  # a label that folds could begin a line of its own
    table.columns[-1].justify = "left"
    for label in sorted(train, key=lambda label: -train[label])[:LABELS_SHOWN]:
        telling = (
            f"{'!' * word.alone}{word.word} {word.rows}/{word.elsewhere}" for word in balance.words.get(label, ())
        )
        counts = (f"{balance.labels[split].get(label, 0):,}" for split in splits)
        table.add_row(lines(shorten(label, 40)), *counts, f"{lengths.get(label, 0):g}", lines(", ".join(telling)))
    return table


def _groups(balance: Balance) -> Table:
    labels = list(balance.labels.get("train", {}))[:LABELS_SHOWN]
    table = figures_table("group", "rows", "share", *(Text(shorten(label, 20)).plain for label in labels))
    table.columns[0].no_wrap = True
    for name, group in balance.groups.items():
        shares = (f"{group.labels.get(label, 0) / max(group.rows, 1):.0%}" for label in labels)
        table.add_row(lines(shorten(name, 40)), f"{group.rows:,}", f"{group.share:.1%}", *shares)
    return table


def _personal(personal: Personal) -> list[RenderableType]:
    if not personal.kinds:
        return [
            Text("none of the kinds looked for: e-mail addresses, phone and card numbers, keys and tokens", "green")
        ]
    texts: list[str] = []
    for kind, finding in personal.kinds.items():
        shown = [f"{location} {value}" for location, value in finding.shown]
        texts += [f"{kind}: {finding.count:,} in {_counted(finding.rows)}", *_first(shown)]
    return [lines(*texts, style="yellow")]

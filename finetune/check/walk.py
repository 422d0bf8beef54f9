"""One walk over the rows as tokens; of a row its length, its faults and its place are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from finetune.check.tokens import TokenChecker
from finetune.data.labels import LabelTokens, label_tokens, same_label_tokens
from finetune.data.prepare import TOGETHER, Chunk, Gathered, Source, example, tokenised
from finetune.data.problems import Problem
from finetune.data.rows import Example
from finetune.data.tokenizer import Tokenizer
from finetune.data.truncate import Fitted, fit
from finetune.events import Progress
from finetune.recipe.schema import Recipe

SAMPLES = 3


class Walk:
    """What is gathered on the way."""

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, rows: Gathered, hidden: Collection[str], vocabulary: int | None
    ) -> None:
        """hidden: places of rows that must not be shown. vocabulary: how many tokens the model knows."""
        self.settings = recipe.train
        self.skips = recipe.data.on_error == "skip"
        self.tokenizer = tokenizer
        self.rows = rows
        self.hidden = hidden
        self.checker = TokenChecker(tokenizer, recipe.prompt.end_token, vocabulary)
        self.label_tokens: LabelTokens = ()
        self.before: list[int] = []  # lengths of the training rows in tokens
        self.after: list[int] = []  # of those that are trained on
        self.by_label: dict[str, list[int]] = defaultdict(list)
        self.supervised = 0  # tokens in the training rows
        self.used: dict[str, int] = defaultdict(int)  # split -> rows that fit
        self.left_out: dict[str, list[Problem]] = defaultdict(list)  # split -> rows that the recipe leaves out
        self.samples: list[Example] = []
        self.shortened: list[str] = []
        self.cut: list[str] = []
        self.dropped: list[Problem] = []
        self.refused: list[Problem] = []  # too long, where the recipe allows none
        self.bad: list[Problem] = []

    def through(self, source: Source) -> Iterator[Progress]:
        """One split, a chunk at a time."""
        strict = self.settings.truncation == "error"
        policy = "drop" if self.settings.truncation == "error" else self.settings.truncation
        self.left_out[source.name] += source.bad if self.skips else []
        for number, chunk in enumerate(tokenised(self.tokenizer, self.rows.renderer, source), start=1):
            fitted = fit(self.tokenizer, self.rows.renderer, chunk.rows, self.settings.max_length, policy)
            self._write_labels(fitted)
            supervised = self.checker.look(fitted.kept)
            self.used[source.name] += len(fitted.kept)
            self.bad += chunk.bad
            (self.refused if strict else self.dropped).extend(fitted.dropped)
            self.left_out[source.name] += [*(chunk.bad if self.skips else ()), *(() if strict else fitted.dropped)]
            self.shortened += fitted.shortened
            self.cut += [row.rendered.record.place for row in fitted.kept if row.cut]
            if source.name == "train":
                self.supervised += supervised
                self._keep(chunk, fitted)
            total = len(source.records)
            yield Progress(0, f"data: preparing {source.name}", min(number * TOGETHER, total), total)

    def _write_labels(self, fitted: Fitted) -> None:
        """Labels in the tokens that are scored, as training writes them."""
        labels = self.rows.labels
        if not labels or not fitted.kept:
            return
        if not self.label_tokens:
            first = fitted.kept[0].rendered.record
            _, self.label_tokens = label_tokens(self.tokenizer, self.rows.renderer, first, labels)
        tokens = dict(zip(labels, self.label_tokens, strict=True))
        fitted.kept = [same_label_tokens(row, tokens[row.rendered.record.answer or ""]) for row in fitted.kept]

    def _keep(self, chunk: Chunk, fitted: Fitted) -> None:
        self.before += map(len, chunk.rows)
        self.after += map(len, fitted.kept)
        for row in fitted.kept:
            record = row.rendered.record
            if self.rows.labels:
                self.by_label[record.answer or ""].append(len(row))
            if len(self.samples) < SAMPLES and record.place not in self.hidden:
                self.samples.append(example(row))

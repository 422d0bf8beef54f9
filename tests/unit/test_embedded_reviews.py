"""The embedded reviews: made as their script says, balanced, and nothing of train in the other splits."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "finetune" / "assets" / "reviews"
SIZES = {"train": 600, "valid": 100, "test": 200}
PAIRS = list(combinations(SIZES, 2))


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reviews", ROOT / "tests" / "assets" / "make_reviews.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()
seeds = generator.read_seeds()
data: dict[str, list[dict[str, str]]] = {
    split: [json.loads(line) for line in (SHIPPED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in SIZES
}


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def templates(split: str) -> set[str]:
    return {template for (owner, _, _), group in seeds.items() if owner == split for template in group}


def fillers(split: str) -> set[str]:
    return {filler for template in templates(split) for choice in generator.choices(template) for filler in choice}


def test_the_script_makes_the_shipped_files(tmp_path):
    generator.main(tmp_path)
    for split in SIZES:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (SHIPPED / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize("split", SIZES)
def test_rows_are_balanced_short_and_clean(split):
    rows = data[split]
    assert Counter(row["label"] for row in rows) == {"positive": SIZES[split] // 2, "negative": SIZES[split] // 2}
    for row in rows:
        assert list(row) == ["text", "label"]
        assert 7 <= len(row["text"].split()) <= 40
        assert not re.search(r"[\[\]|]|  |\s[,.;:!?]|[,;:]$", row["text"]), row["text"]
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|\b(\w+) \1\b", row["text"], re.IGNORECASE), row["text"]
        assert row["text"][0].isupper() and row["text"][-1] in ".!?"


def test_no_text_occurs_twice():
    texts = [tuple(words(row["text"])) for rows in data.values() for row in rows]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", SIZES)
def test_choices_are_real_and_balanced_brackets(split):
    for template in templates(split):
        assert template.count("[") == template.count("]") == len(generator.choices(template))
        for choice in generator.choices(template):
            assert len(set(choice)) == len(choice) > 1 and all(choice)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_template_and_no_long_filler(one, other):
    assert not templates(one) & templates(other)
    assert not {filler for filler in fillers(one) & fillers(other) if len(filler.split()) > 2}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_run_of_six_words(one, other):
    first, second = (set().union(*(ngrams(row["text"], 6) for row in data[split])) for split in (one, other))
    assert not first & second


def word_counts(label: str) -> Counter[str]:
    return Counter(word for row in data["train"] if row["label"] == label for word in set(words(row["text"])))


def test_no_single_word_gives_the_label_away():
    """The best rule of the form "this word is there, so ..." stays close to chance on train."""
    positive, negative = word_counts("positive"), word_counts("negative")
    best = max(abs(positive[word] - negative[word]) for word in positive | negative)
    assert 0.5 + best / SIZES["train"] < 0.6


def naive_bayes_accuracy(split: str) -> float:
    """Multinomial naive Bayes on the words of train, add-one smoothing (Manning et al., 2008, chapter 13)."""
    counts = {label: word_counts(label) for label in generator.LABELS}
    vocabulary = set().union(*counts.values())

    def score(text: str, label: str) -> float:
        total = sum(counts[label].values()) + len(vocabulary)
        return sum(math.log((counts[label][word] + 1) / total) for word in set(words(text)) & vocabulary)

    rows = data[split]
    right = sum(max(generator.LABELS, key=lambda label: score(row["text"], label)) == row["label"] for row in rows)
    return right / len(rows)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_counting_words_helps_and_is_not_enough(split):
    assert 0.75 <= naive_bayes_accuracy(split) <= 0.92

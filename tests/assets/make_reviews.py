"""Make the embedded data set of short reviews from hand-written seeds, in one seeded command.

    python tests/assets/make_reviews.py [OUT]

The seeds are in review_seeds.txt beside this file: under each heading (split, label, part) one
template a line, in which [a|b|c] is a choice. A review is one template, some of them with an
opening that says nothing of the label or with a closing that agrees with it. Every template is
used about as often as the others, no template serves two splits, and no text occurs twice.
The same seeds give the same bytes on every machine.
"""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import cycle, islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "finetune" / "assets" / "reviews"
SEEDS = HERE / "review_seeds.txt"
ROWS = {"train": 600, "valid": 100, "test": 200}
LABELS = ("positive", "negative")
MOST_WORDS = 40
OPENING, CLOSING = 0.2, 0.4  # the share of reviews that have one, where there is room
SEED = 20

Seeds = dict[tuple[str, str, str], list[str]]  # (split, label or either, part) -> templates
Row = dict[str, str]


def read_seeds(path: Path = SEEDS) -> Seeds:
    """The templates by (split, label, part); part is opening, review or closing."""
    seeds: Seeds = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            split, label, part = line[2:].split()
            current = seeds.setdefault((split, label, part), [])
        elif line:
            current.append(line)
    return seeds


def choices(template: str) -> list[list[str]]:
    """The fillers of each choice in a template, in order."""
    return [inner.split("|") for inner in re.findall(r"\[(.*?)\]", template)]


def expand(template: str, rng: random.Random) -> str:
    """The template with one filler taken for each of its choices."""
    return re.sub(r"\[(.*?)\]", lambda match: rng.choice(match[1].split("|")), template)


def dress(review: str, openings: list[str], closings: list[str], rng: random.Random) -> str:
    """The review, now and then with a sentence before or after it while that leaves it short enough."""
    opening = expand(rng.choice(openings), rng) + " " if rng.random() < OPENING else ""
    closing = " " + expand(rng.choice(closings), rng) if rng.random() < CLOSING else ""
    for text in (opening + review + closing, review + closing):
        if len(text.split()) <= MOST_WORDS:
            return text
    return review


def reviews(seeds: Seeds, split: str, label: str, rng: random.Random) -> list[Row]:
    """Half of a split: distinct reviews of one label, drawn evenly from its templates."""
    templates = rng.sample(seeds[split, label, "review"], len(seeds[split, label, "review"]))
    seen: set[str] = set()
    rows: list[Row] = []
    for template in islice(cycle(templates), ROWS[split] // len(LABELS)):
        while (review := expand(template, rng)) in seen:
            pass
        seen.add(review)
        text = dress(review, seeds[split, "either", "opening"], seeds[split, label, "closing"], rng)
        rows.append({"text": text, "label": label})
    return rows


def make(seeds: Seeds, split: str) -> list[Row]:
    """One split, in random order."""
    rng = random.Random(f"{SEED} {split}")
    rows = [row for label in LABELS for row in reviews(seeds, split, label, rng)]
    rng.shuffle(rows)
    return rows


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    seeds = read_seeds()
    for split in ROWS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make(seeds, split)]
        (out / f"{split}.jsonl").write_bytes("".join(lines).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)

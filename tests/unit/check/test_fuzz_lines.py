"""Damaged lines among good ones: the damaged are named, the good are kept, and nothing else is raised."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from finetune.data.formats import recognise
from finetune.data.read import read
from finetune.data.records import read_records
from tests.unit.check.messes import DAMAGES, good_row, line_of

ROWS = 40  # lines of a file, half of them damaged at most
BLANK = 2


def one_file(path: Path, draw: random.Random, kinds: list[str]) -> None:
    lines = [line_of(good_row(draw)) for _ in range(ROWS)]
    chosen = draw.sample(range(ROWS), len(kinds) + BLANK)
    damaged, blank = dict(zip(chosen, kinds, strict=False)), chosen[len(kinds) :]
    for number, kind in damaged.items():
        lines[number] = DAMAGES[kind](lines[number], draw)
    for number in blank:
        lines[number] = draw.choice([b"", b" \t"])
    end = draw.choice([b"\n", b"\r\n"])
    path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines) + draw.choice([b"", end]))

    found = read(path.name, path.parent)
    records, bad = read_records(found.rows, recognise(found.rows))
    named = dict([*found.bad, *bad])
    wanted = {f"{path.name}:{number + 1}": kind for number, kind in damaged.items()}
    assert named.keys() == wanted.keys(), {wanted.get(place, place) for place in named.keys() ^ wanted.keys()}
    assert Counter(record.location for record in records) == Counter(
        f"{path.name}:{number + 1}" for number in range(ROWS) if number not in chosen
    )
    assert all(len(reason) > 20 for reason in named.values()), named


def fuzz(path: Path, lines: int, seed: int) -> None:
    draw = random.Random(seed)
    kinds = sorted(DAMAGES)
    done = 0
    while done < lines:
        chosen = [kinds[(done + i) % len(kinds)] for i in range(draw.randint(1, ROWS // 2))]
        one_file(path, draw, chosen)
        done += len(chosen)


def test_there_are_thirty_kinds_of_damage():
    assert len(DAMAGES) >= 30


@pytest.mark.parametrize("seed", range(4))
def test_damaged_lines_are_named_and_good_ones_kept(tmp_path, seed):
    fuzz(tmp_path / f"f{seed}.jsonl", 500, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_damaged_lines_are_named_and_good_ones_kept(tmp_path, seed):
    fuzz(tmp_path / f"f{seed}.jsonl", 10_000, seed)


@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_a_damaged_first_line_does_not_change_what_the_file_is(tmp_path, kind):
    draw = random.Random(7)
    lines = [line_of(good_row(draw)) for _ in range(4)]
    lines[0] = DAMAGES[kind](lines[0], draw)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read("a.jsonl", tmp_path)
    records, bad = read_records(found.rows, recognise(found.rows))
    assert [place for place, _ in [*found.bad, *bad]] == ["a.jsonl:1"]
    assert len(records) == 3

"""Collation and masking, on ten families of chat models: what reaches a backend against what was written by hand.

From a file of made-up conversations through the real preparation to micro-batches. What must be learned comes from
`chat_families`, and where each token stands in the text from the tokens' own bytes; neither asks the code under test.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.interface import Batch
from backends.micro_batches import joined
from finetune.check.tokens import check_tokens
from finetune.data import chat_template as chat
from finetune.data import collate as batches
from finetune.data import loss_mask as tokenise
from finetune.data.assistant_turns import TurnFinder
from finetune.data.prepare import prepare
from finetune.data.rows import Example
from finetune.recipe.load import check_recipe
from finetune.recipe.schema import Recipe
from tests.faults.cases import amounts
from tests.unit.chat_families import FAMILIES, Family, Piece, tokenizer_of
from tests.unit.toy_run import result_of

WORDS = [
    "What", "is", "Paris", "good", "film", "the", "capital", "of", "bad", "1", "42", "né", "電影", "\U0001f3ac", "{",
    "]", "\n", "\n\n", "  ", "### Answer:", "user", "assistant", "<think>", "a", ".", "?", "\t", "return x", "&", "''",
]  # fmt: skip
SYSTEM = "You answer in one word, in the language of the question, and you never say more than was asked for. " * 2
Spans = list[tuple[int, int]]


def talks(family: Family, rows: int, seed: int, begin: str) -> Iterator[list[dict[str, Any]]]:
    """Made-up conversations: repeated turns, odd white space, system messages and turns that are not learned.

    begin: with what each begins.
    """
    rng = random.Random(seed)

    def said() -> str:
        while not (text := rng.choice(["", " "]).join(rng.choices(WORDS, k=rng.randint(1, 9)))).strip():
            pass
        return text

    for _ in range(rows):
        talk: list[dict[str, Any]] = []
        if family.system and (begin or rng.random() < 0.5):
            talk.append({"role": "system", "content": begin or rng.choice([SYSTEM, said()])})
        last = rng.randint(1, 4)
        for turn in range(1, last + 1):
            question = begin * (not talk) + said()
            talk.append({"role": "user", "content": question})
            talk.append({"role": "assistant", "content": question if rng.random() < 0.1 else said()})
            if turn < last and rng.random() < 0.2:
                talk[-1]["weight"] = 0
        yield talk


def recipe_of(folder: Path, found: list[list[dict[str, Any]]]) -> Recipe:
    text = "".join(json.dumps({"messages": talk}) + "\n" for talk in found)
    (folder / "rows.jsonl").write_text(text)
    data = {"train": "rows.jsonl", "valid": "rows.jsonl"}
    return check_recipe({"model": {"path": "."}, "data": data, "train": {"max_length": 100_000}})


def prepared(
    name: str, folder: Path, rows: int, seed: int = 0, begin: str = ""
) -> tuple[list[list[Piece]], list[Example]]:
    """What each row says by hand, and what it became; both in order."""
    family = FAMILIES[name]
    found = list(talks(family, rows, seed, begin))
    made = result_of(prepare(recipe_of(folder, found), tokenizer_of(name), base=folder)).train
    assert made.rows == rows and not made.dropped and not made.shortened
    return [pieces for talk in found for pieces in family.written(talk)], list(made.examples)


def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in GPT-2's vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = byte_letters()


def bytes_of(token: str, family: Family, specials: Sequence[str]) -> bytes:
    if token in specials:
        return token.encode()
    if not family.sentencepiece:
        return bytes(LETTERS[letter] for letter in token)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def places(tokens: Sequence[bytes], text: bytes, family: Family, specials: Sequence[str]) -> Spans:
    """Where in the text each token stands. Fails unless the tokens are the whole text, once and in order.

    All ways are followed in which a tokenizer may put a space before a text, or swallow white space.
    """
    ways: dict[int, Any] = {0: None}  # where the next token begins -> the tokens before it, the last one first
    for token in tokens:
        forms = {token, token.removeprefix(b" ")} if family.spaced else {token}
        longer: dict[int, Any] = {}
        for at, way in ways.items():
            for form in forms:
                if text.startswith(form, at):
                    longer[at + len(form)] = ((at, at + len(form)), way)
        if family.swallows and token.decode("latin-1") in specials:
            for at, way in list(longer.items()):
                blank = len(text) - at - len(text[at:].lstrip())
                longer |= {at + more: way for more in range(1, blank + 1)}
        assert longer, f"{token!r} does not stand at {[text[at : at + 20] for at in ways]}"
        ways = longer
    way, found = ways.get(len(text)), []
    assert way is not None, f"{text[max(ways) :]!r} is missing"
    while way is not None:
        found.append(way[0])
        way = way[1]
    return found[::-1]


def check_row(name: str, pieces: list[Piece], example: Example) -> int:
    """One row against what was written by hand. Returns its supervised tokens, counted by hand."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    specials = tokenizer.all_special_tokens + [str(one) for one in tokenizer.added_tokens_decoder.values()]
    text = "".join(piece for piece, _ in pieces)
    written = [str(token) for token in tokenizer.convert_ids_to_tokens(example.tokens.tolist())]
    if family.bos:
        begins = text.count(family.bos) or int(family.adds_bos)
        assert written.count(family.bos) == begins, "BOS is not there as often as in the template"
        written = written[1:] if begins and not text.startswith(family.bos) else written
    last = max(number for number, (_, learn) in enumerate(pieces) if learn)
    raw = "".join(piece for piece, _ in pieces[: last + 1]).encode()  # nothing is kept after the last learned turn
    found = places([bytes_of(one, family, specials) for one in written], raw, family, specials)
    weights = example.weights[len(example.tokens) - len(found) :]
    assert not example.weights[: len(example.tokens) - len(found)].any(), "the begin token is learned"
    count, at = 0, 0
    for piece, learn in pieces[: last + 1]:
        end = at + len(piece.encode())
        mine = [i for i, (a, b) in enumerate(found) if at <= a and b <= end and a < b]
        assert set(weights[mine]) <= {float(learn)}, f"{piece!r} is {'not ' * learn}learned"
        if learn:
            assert written[mine[-1]] == family.end, "an answer does not end with its end token"
            count += len(mine)
        at = end
    answer = pieces[last][0].removesuffix(family.end).strip()
    assert example.answer == answer, "the expected answer is not what was said"
    empty = {i for i, (a, b) in enumerate(found) if a == b}  # a space that the tokenizer puts before a text
    inside = sum(1 for i in empty if weights[i])
    within = sum(weights[i] for i, (a, b) in enumerate(found) if a < b)
    assert within == count, "a token lies across the border of an answer"
    assert weights.sum() == count + inside and example.weights.dtype == np.float32
    return count + inside


def row_key(tokens: Any, weights: Any) -> tuple[bytes, bytes]:
    return np.asarray(tokens, np.int32).tobytes(), np.asarray(weights, np.float32).tobytes()


def check_batch(batch: Batch, rows: Counter[tuple[bytes, bytes]]) -> int:
    """Takes the batch's rows out of `rows`. Returns its supervised positions."""
    whole = joined(batch)
    assert (whole.inputs.dtype, whole.targets.dtype, whole.weights.dtype) == (np.int32, np.int32, np.float32)
    for inputs, targets, weights in zip(whole.inputs, whole.targets, whole.weights, strict=True):
        keys = [row_key([*inputs[:n], targets[n - 1]], [0, *weights[:n]]) for n in range(1, len(inputs) + 1)]
        end = max((n for n, key in enumerate(keys, 1) if rows[key]), default=0)  # a row may begin as another ends
        assert end, "a row that no example became, or one that was there before"
        rows[keys[end - 1]] -= 1
        assert (inputs[1:end] == targets[: end - 1]).all(), "targets are not the inputs shifted by one"
        assert not weights[end:].any(), "padding has a weight"
    return int((whole.weights > 0).sum())


def check_family(name: str, folder: Path, rows: int, share: bool = True) -> int:
    """Everything, for one family. Returns how many examples there were."""
    hand, made = prepared(name, folder, rows)
    assert len(hand) == len(made)
    count = sum(check_row(name, pieces, example) for pieces, example in zip(hand, made, strict=True))
    for epoch, micro_tokens in ((0, 4096), (1, 200)):
        left = Counter(row_key(one.tokens, one.weights) for one in made)
        seen = 0
        for step in batches.order(len(made), 16, 7, epoch):
            for batch in batches.micro_batches([made[i] for i in step], micro_tokens, share):
                seen += check_batch(batch, left)
        assert seen == count, f"{seen} supervised tokens in an epoch, and {count} by hand"
        assert not left.total(), f"{left.total()} examples were in no batch of the epoch"
    return len(made)


@pytest.mark.parametrize("rows", amounts(50, 2000))
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned_is_what_was_written_by_hand(name: str, rows: int, tmp_path: Path) -> None:
    assert check_family(name, tmp_path, rows) >= rows


@pytest.mark.parametrize("name", FAMILIES)
def test_without_shared_prefixes_it_is_the_same(name: str, tmp_path: Path) -> None:
    check_family(name, tmp_path, 20, share=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_one_beginning_share_it(name: str, tmp_path: Path) -> None:
    """What a batch says only once is how its rows begin, and nothing of it is learned."""
    hand, made = prepared(name, tmp_path, 12, begin=SYSTEM * 2)
    count = sum(check_row(name, pieces, example) for pieces, example in zip(hand, made, strict=True))
    batch = batches.collate(made)
    assert [len(one) >= batches.SHARED_AT_LEAST for one in batch.prefixes] == [True]
    left = Counter(row_key(one.tokens, one.weights) for one in made)
    assert check_batch(batch, left) == count and not left.total()


@pytest.mark.parametrize("name", FAMILIES)
def test_check_finds_no_fault_in_them(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name)
    recipe = recipe_of(tmp_path, list(talks(FAMILIES[name], 50, 3, "")))
    found = result_of(prepare(recipe, tokenizer, tmp_path))
    checked = result_of(check_tokens(found, tokenizer, True, len(tokenizer)))
    assert checked.rows >= 50 and not checked.total, checked.faults


real = {
    "_collated": batches._collated,
    "order": batches.order,
    "groups": batches.groups,
    "find": TurnFinder.find,
    "_supervised": chat.ChatRenderer._supervised,
    "_mask": tokenise._mask,
    "_example": tokenise._example,
}


def _masked(rendered: Any, row: Any, begin: int, eos: int) -> Example:
    made = real["_example"](rendered, row, begin, eos)
    return replace(made, weights=made.weights * (made.tokens != eos).astype(np.float32))


def _without_end(self: Any, *texts: str) -> tuple[int, int, int]:
    start, content_end, _ = real["find"](self, *texts)
    return start, content_end, content_end


def _unshifted(examples: Sequence[Example], prefix: int) -> Batch:
    moved = [replace(one, weights=np.roll(one.weights, 1)) for one in examples]
    return real["_collated"](moved, prefix)


def _padding_learned(examples: Sequence[Example], prefix: int) -> Batch:
    batch = real["_collated"](examples, prefix)
    return replace(batch, weights=np.where(batch.targets == 0, np.float32(1), batch.weights))


def _everything(count: int, *borders: Any) -> Any:
    return np.ones(count, np.float32)


def _one_late(*borders: Any) -> Any:
    return np.array([0.0, *real["_mask"](*borders)[:-1]], np.float32)


FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "the begin token twice": ("llama 3", tokenise, "with_begin", lambda tokens, prefix: prefix + tokens),
    "no begin token": ("zephyr", tokenise, "with_begin", lambda tokens, prefix: tokens),
    "no end token": ("qwen 2", TurnFinder, "find", _without_end),
    "the last special token ends a turn": ("phi 3", chat, "end_of_turn", lambda tokenizer: None),
    "turns of weight 0 learned": ("gemma", chat.ChatRenderer, "_supervised", lambda self, record: [
        i for i, message in enumerate(record.messages) if message["role"] == "assistant"
    ]),
    "only the last turn learned": ("mistral", chat.ChatRenderer, "_supervised", lambda self, record: [
        len(record.messages) - 1
    ]),
    "the prompt learned": ("llama 2", tokenise, "_mask", _everything),
    "the mask one token late": ("command r", tokenise, "_mask", _one_late),
    "pad is EOS, and EOS is masked": ("zephyr", tokenise, "_example", _masked),
    "weights not shifted": ("gemma", batches, "_collated", _unshifted),
    "padding learned": ("qwen 3", batches, "_collated", _padding_learned),
    "the short step dropped": ("granite", batches, "order", lambda n, size, *rest: [
        step for step in real["order"](n, size, *rest) if len(step) == size
    ]),
    "a row of each group dropped": ("llama 3", batches, "groups", lambda *given: (
        rows[1:] or rows for rows in real["groups"](*given)
    )),
    "a row of each group twice": ("mistral", batches, "groups", lambda *given: (
        [*rows, rows[0]] for rows in real["groups"](*given)
    )),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, attribute, planted = FAULTS[fault]
    monkeypatch.setattr(module, attribute, planted)
    with pytest.raises(AssertionError):
        check_family(name, tmp_path, 20)

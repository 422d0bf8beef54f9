"""Text to tokens, the same in training, evaluation and chat."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentProblem

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, which is not imported here
TOGETHER = 2000  # texts in one call of the tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; neither network nor code of the folder is used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, ImportError and bare Exception here.
        raise EnvironmentProblem(
            f"{folder}: the tokenizer cannot be loaded ({error}); the folder needs tokenizer.json "
            "and tokenizer_config.json"
        ) from None
    if not tokenizer.is_fast:
        raise EnvironmentProblem(f"{folder}: the tokenizer has no tokenizer.json; convert it with transformers first")
    return tokenizer


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text without added ones, and the characters each stands for."""

    tokens: list[int]
    spans: list[tuple[int, int]]  # (start, end) in characters


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoded]:
    """Every text's tokens, nothing added; special tokens written in the text are read as such."""
    for start in range(0, len(texts), TOGETHER):
        found = _call(tokenizer, list(texts[start : start + TOGETHER]), True)
        yield from map(Encoded, found["input_ids"], found["offset_mapping"])


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """What a model is given before it answers: the text's tokens, its begin token first exactly once."""
    prefix = begin_tokens(tokenizer)
    for start in range(0, len(texts), TOGETHER):
        for tokens in _call(tokenizer, list(texts[start : start + TOGETHER]), False)["input_ids"]:
            yield with_begin(tokens, prefix)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    return next(encode_prompts(tokenizer, [text]))


def _call(tokenizer: Tokenizer, texts: list[str], offsets: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing."""
    alone: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    fits = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
    return whole[: next(fits, 0)]


def with_begin(tokens: list[int], prefix: list[int]) -> list[int]:
    return tokens if tokens[: len(prefix)] == prefix else prefix + tokens


def special_texts(tokenizer: Tokenizer) -> frozenset[str]:
    """How the special tokens are written."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(str(token) for token in added if token.special) | frozenset(tokenizer.all_special_tokens)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes after an assistant's words."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zyx"}]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may refuse anything; then it has no turn to end
        return None
    tail = text[text.rfind("zyx") + 3 :].strip()
    known = [token for token in special_texts(tokenizer) if tail.startswith(token)]
    return int(tokenizer.convert_tokens_to_ids(max(known, key=len))) if known else None


def stop_tokens(tokenizer: Tokenizer, folder: Path | None = None) -> frozenset[int]:
    """Tokens that end an answer: EOS, those of generation_config.json, and the chat template's end of turn."""
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    path = (folder or Path(tokenizer.name_or_path or "")) / "generation_config.json"
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(told if isinstance(told, list) else [told])
    return frozenset(token for token in found if token is not None)

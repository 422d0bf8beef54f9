"""Text to tokens, the same in training, evaluation and chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.model_folder import ModelFolder
from backends.untrusted import read_object
from finetune.data import template_sandbox
from finetune.errors import EnvironmentProblem

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, which is not imported here
TOGETHER = 2000  # texts in one call of the tokenizer


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The tokenizer of a model folder; the network is not used, nor code of the folder where that may not run.

    Raises EnvironmentProblem, or BackendError for code that may not run.
    """
    from transformers import AutoTokenizer

    try:
        path, code = str(folder.path), folder.remote_code
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=code)
        tokenizer.decode(tokenizer("a trial", verbose=False)["input_ids"])
    except BaseException as error:
        # transformers raises OSError, ValueError, KeyError, ImportError and bare Exception here, and tokenizers a
        # PanicException, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise folder.needs_code("auto_map in tokenizer_config.json") from None
        raise EnvironmentProblem(
            f"{folder.path}: the tokenizer cannot be loaded ({error!s:.200}); the folder needs tokenizer.json "
            "and tokenizer_config.json"
        ) from None
    if not tokenizer.is_fast:
        raise EnvironmentProblem(
            f"{folder.path}: the tokenizer has no tokenizer.json; convert it with transformers first"
        )
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
    try:
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
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a pattern in tokenizer.json that backtracks without end
            raise
        raise EnvironmentProblem(f"{tokenizer.name_or_path}: the tokenizer fails on a text ({error!s:.200})") from None


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
        text = template_sandbox.render(tokenizer, turns, [(2, False)])[0]
    except ValueError:  # a template may refuse anything; then it has no turn to end
        return None
    tail = text[text.rfind("zyx") + 3 :].strip()
    known = [token for token in special_texts(tokenizer) if tail.startswith(token)]
    return int(tokenizer.convert_tokens_to_ids(max(known, key=len))) if known else None


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: EOS, those of generation_config.json, and the chat template's end of turn."""
    tokens = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    path = Path(tokenizer.name_or_path or "") / "generation_config.json"
    if path.is_file():
        try:
            listed = read_object(path).get("eos_token_id")
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(f"{path}: cannot be read ({error}); remove it, or download it again") from None
        tokens.update(token for token in (listed if isinstance(listed, list) else [listed]) if isinstance(token, int))
    return frozenset(token for token in tokens if token is not None)

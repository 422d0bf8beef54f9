"""The tokenizer, used in the same way by training, evaluation and chat."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from backends.model_folder import ModelFolder, read_object
from finetune.data.conversation import Conversation
from finetune.data.rows import Span
from finetune.data.template_sandbox import render, start_ahead
from finetune.data.tokenizer_bounds import check_tokenizer
from finetune.data.tokenizer_trial import try_tokenizer
from finetune.errors import EnvironmentProblem

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, which is not imported here
_TRIAL = "The quick brown fox abcabc: 12,345 jumps! \u00dcber den faulen Hund; \u72d7\u3002 " * 8
TOGETHER = 2000  # texts in one call of the tokenizer


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The tokenizer of a model folder; the network is not used, nor code of the folder where that may not run.

    Raises EnvironmentProblem, or BackendError for code that may not run.
    """
    if _has_template(folder.path):
        start_ahead()
    if not folder.remote_code and not check_tokenizer(folder.path):
        try_tokenizer(folder.path / "tokenizer.json")
    from transformers import AutoTokenizer

    try:
        path, code = str(folder.path), folder.remote_code
        with _native(path):
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=code)
            tokenizer.decode(tokenizer("a trial", verbose=False)["input_ids"])
            made = tokenizer([_TRIAL] * 8, verbose=False)["input_ids"]
    except EnvironmentProblem:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and bare Exception here
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
    if any(tokens != made[0] for tokens in made):  # rows, prefixes and prompts must meet the same tokens again
        raise EnvironmentProblem(
            f"{folder.path}: the tokenizer gives one text other tokens each time; switch its sampling off, or use "
            "another model"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_beside(folder.path)
    return tokenizer


def _has_template(folder: Path) -> bool:
    """Whether a file says so, before the tokenizer is loaded."""
    with suppress(OSError):
        if b'"chat_template"' in (folder / "tokenizer_config.json").read_bytes():
            return True
    return any((folder / f"chat_template.{end}").is_file() for end in ("jinja", "json"))


def _template_beside(folder: Path) -> str | dict[str, str] | None:
    """The template of chat_template.json, where models of images and text keep it; tokenizers do not look there."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    try:
        template = read_object(file).get("chat_template")
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{file}: cannot be read ({error}); remove it, or download it again") from None
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise EnvironmentProblem(f"{file}: holds no text under chat_template; remove it, or download it again")
    return template


class Encoded:
    """Tokens of a text, none added, and the characters that each stands for."""

    def __init__(self, tokens: list[int], spans: list[Span] | None = None, encoding: Any = None) -> None:
        """encoding: the library's own object, which is asked where `spans` is not given: a list of all is slow."""
        self.tokens = tokens
        self._spans = spans
        self._encoding = encoding

    @property
    def spans(self) -> list[Span]:
        """(start, end) of every token, in characters."""
        if self._spans is None:
            self._spans = self._encoding.offsets
        return self._spans

    def start(self, token: int) -> int:
        """The character that the token begins with."""
        return int(self.spans[token][0] if self._encoding is None else self._encoding.token_to_chars(token)[0])

    def border(self, character: int) -> int | None:
        """The first token that ends after this character; None where it begins before, and so lies across."""
        if self._encoding is not None:  # its own answers, where it has one: most borders are of tokens
            if self.tokens and self._encoding.token_to_chars(len(self.tokens) - 1)[1] <= character:
                return len(self.tokens)
            if (token := self._encoding.char_to_token(character)) is not None:
                return None if self.start(token) < character else int(token)
        ends = list(itertools.accumulate((end for _, end in self.spans), max))
        token = bisect_right(ends, character)
        return None if token < len(ends) and self.spans[token][0] < character else token


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoded]:
    """Every text's tokens, nothing added; special tokens written in the text are read as such."""
    for start in range(0, len(texts), TOGETHER):
        batch = _call(tokenizer, list(texts[start : start + TOGETHER]))
        for tokens, encoding in zip(batch["input_ids"], batch.encodings, strict=True):
            yield Encoded(tokens, encoding=encoding)


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """What a model is given before it answers: the text's tokens, its begin token first exactly once."""
    begin = begin_tokens(tokenizer)
    for encoded in encode(tokenizer, texts):
        yield with_begin(encoded.tokens, begin)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    return next(encode_prompts(tokenizer, [text]))


def _call(tokenizer: Tokenizer, texts: list[str]) -> Any:
    with _native(tokenizer.name_or_path):
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )


@contextmanager
def _native(folder: str) -> Iterator[None]:
    """Around a call of the tokenizers library, whose failures in native code are no exceptions but panics: a pattern
    that backtracks without end, a table of garbage. Raises EnvironmentProblem for one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        file = Path(folder or "") / "tokenizer.json"
        raise EnvironmentProblem(f"{file}: the tokenizer fails on a text ({error!s:.200}); use another") from None


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing."""
    with _native(tokenizer.name_or_path):
        alone: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = tokenizer("a")["input_ids"]
    fits = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
    return whole[: next(fits, 0)]


def with_begin(tokens: list[int], prefix: list[int]) -> list[int]:
    return tokens if tokens[: len(prefix)] == prefix else prefix + tokens


def fixed_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens that are looked for in a text before anything else is done with it, and so part it."""
    if tokenizer.split_special_tokens:  # then they are read as ordinary text
        return frozenset()
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.special and not token.normalized)


def special_texts(tokenizer: Tokenizer) -> frozenset[str]:
    """How the special tokens are written."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(str(token) for token in added if token.special) | frozenset(tokenizer.all_special_tokens)


def answer_text(tokenizer: Tokenizer, tokens: Sequence[int], stop: Collection[int]) -> str:
    """An answer as text, with all its marks but those that end it: stop tokens and padding. The one way to read both
    what a row expects and what a model has written.
    """
    ends = {*stop, tokenizer.pad_token_id}
    kept = [int(token) for token in tokens if int(token) not in ends]
    with _native(tokenizer.name_or_path):
        return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes after an assistant's words."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zyx"}]
    try:
        text = render(tokenizer, Conversation(turns, [(2, False)]))[0]
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
        numbers = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
            raise EnvironmentProblem(
                f"{path}: eos_token_id holds what is not the number of a token; fix it, or remove the file"
            )
        tokens.update(numbers)
    return frozenset(token for token in tokens if token is not None)

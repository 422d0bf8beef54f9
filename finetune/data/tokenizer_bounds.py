"""Limits on a tokenizer's files (sizes, numbers, growth of text), checked before a library reads them.

The tokenizers library is native code. A text that it makes too long for memory, or a number that it makes a table of,
ends the whole process without a word. So each claim has a bound here that no published tokenizer comes near.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.model_folder import read_object
from finetune.errors import EnvironmentProblem

LARGEST_FILE = 64 * 2**20  # bytes of tokenizer.json
GROWTH = 100  # times that a text may grow; U+FDFA has 18 characters in NFKC, and a pattern may double each
LONGEST = 10_000  # characters of one token
BEFORE = 100  # characters that are put before a text; published tokenizers put one there
TOGETHER = 5_000_000  # characters of all added tokens, as long as the normalizer may make them
GAP = 100_000  # numbers that a vocabulary may leave out
ADDED = 100_000  # added tokens; models of speech have 65,000
NAMED = 20_000  # entries of a list in tokenizer_config.json
PARTS = 100  # steps of a chain, pieces of a template, numbers of one special token
WORD = 10_000  # characters of a word that WordPiece looks at, in quadratic time
_CHAINS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
           "decoder": "decoders"}  # fmt: skip
_NESTED = 20  # chains within chains
# What can do no harm within these bounds. Others, such as Precompiled, are tried in a process of their own first.
_KNOWN = {
    "BPE", "WordPiece", "WordLevel", "Unigram", "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace",
    "Prepend", "Strip", "StripAccents", "BertNormalizer", "ByteLevel", "Metaspace", "Split", "Whitespace", "Digits",
    "WhitespaceSplit", "Punctuation", "BertPreTokenizer", "TemplateProcessing", "RobertaProcessing", "BertProcessing",
    "ByteFallback", "Fuse", "BPEDecoder",
}  # fmt: skip
_PATTERN = 2000  # characters of a pattern that needs no trial
_COUNTED = re.compile(r"\{\d*,?\d{3,}")  # a count of hundreds: {1000} within {1000} takes memory without end


class _Beyond(ValueError):
    """A bound that a file breaks; the message says which."""


def check_tokenizer(folder: Path) -> bool:
    """Whether every part of the folder's tokenizer is of a kind that needs no trial.

    Raises EnvironmentProblem, with the file's name, where one breaks a bound. A file that is not there, or not of the
    shape that it must have, is left to the library, which says so.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        _checked(folder / name, _check_config, 16 * 2**20)
    return bool(_checked(folder / "tokenizer.json", _check_whole, LARGEST_FILE))


def _checked(file: Path, check: Any, most: int) -> Any:
    if not file.exists():
        return True
    try:
        return check(read_object(file, most))
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, _Beyond) else f"the tokenizer cannot be loaded ({error!s:.200})"
        raise EnvironmentProblem(f"{file}: {reason}; download the model again, or use another") from None


def _check_config(config: Mapping[str, Any]) -> None:
    for key in ("extra_ids", "offset"):  # tokens that T5, ByT5 and Pegasus make
        count = config.get(key)
        if isinstance(count, int) and not 0 <= count <= NAMED:
            raise _Beyond(f"{key}: {_number(count)}, and {NAMED:,} are the most")
    if len(config) > ADDED:  # added_tokens.json: a number for each token
        raise _Beyond(f"it has {len(config):,} entries, and {ADDED:,} are the most")
    for key, value in config.items():
        most = ADDED if key == "added_tokens_decoder" else NAMED
        if isinstance(value, list | dict) and len(value) > most:
            raise _Beyond(f"{key} has {len(value):,} entries, and {most:,} are the most")
        longest = max((len(text) for text in _texts(value)), default=0)
        if longest > LONGEST and (isinstance(value, list | dict) or key.endswith("_token")) and key != "chat_template":
            raise _Beyond(f"{key} holds {longest:,} characters, and {LONGEST:,} are the most for a token")


def _texts(value: Any) -> Iterator[str]:
    """The texts of a value: its own, those of a list, and the contents of tokens."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for one in values:
        text = one.get("content") if isinstance(one, dict) else one
        if isinstance(text, str):
            yield text


def _check_whole(whole: Mapping[str, Any]) -> bool:
    _check_vocabulary(whole)
    known = True
    for key in _CHAINS:
        parts = list(_parts(whole.get(key)))
        if len(parts) > PARTS:
            raise _Beyond(f"its {key} has {len(parts):,} parts, and {PARTS} are the most")
        known &= all(map(_plain, parts))
        if key in ("normalizer", "decoder"):
            _check_growth(key, parts, whole.get("added_tokens"))
        if key == "post_processor":
            _check_pieces(parts)
    return known and whole.get("truncation") is None and whole.get("padding") is None


def _check_vocabulary(whole: Mapping[str, Any]) -> None:
    model, added = whole.get("model"), whole.get("added_tokens")
    settings = model if isinstance(model, dict) else {}
    vocabulary, tokens = settings.get("vocab"), added if isinstance(added, list) else []
    if len(tokens) > ADDED:
        raise _Beyond(f"it has {len(tokens):,} added tokens, and {ADDED:,} are the most")
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    texts = list(vocabulary) if isinstance(vocabulary, dict | list) else []
    texts = [one[0] if isinstance(one, list) and one else one for one in texts]  # Unigram: [text, score]
    numbers += [token.get("id") for token in tokens if isinstance(token, dict)]
    texts += [token.get("content") for token in tokens if isinstance(token, dict)]
    highest = max((number for number in numbers if isinstance(number, int)), default=0)
    most = 2 * len(texts) + GAP
    if highest > most:
        raise _Beyond(f"its highest token has the number {_number(highest)}, and there are {len(texts):,} tokens")
    fixed = [settings.get(key) for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")]
    longest = max((len(text) for text in (*texts, *fixed) if isinstance(text, str)), default=0)
    if longest > LONGEST:
        raise _Beyond(f"a token of it has {longest:,} characters, and {LONGEST:,} are the most")
    if settings.get("dropout"):
        raise _Beyond(
            f'"dropout": {settings["dropout"]!s:.20} gives a text other tokens each time; set it to null there'
        )
    word = settings.get("max_input_chars_per_word", 0)
    if isinstance(word, int) and word > WORD:
        raise _Beyond(f"max_input_chars_per_word: {_number(word)}, and {WORD:,} are the most")


def _parts(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, decoder or the like, those of its sequences too, in their order."""
    if not isinstance(value, dict):
        return
    if depth > _NESTED:
        raise _Beyond("its sequences are nested too deep")
    lists = [value[name] for name in _CHAINS.values() if isinstance(value.get(name), list)]
    if not lists:
        yield value
    for steps in lists:
        for step in steps:
            yield from _parts(step, depth + 1)


def _plain(part: Mapping[str, Any]) -> bool:
    """Whether a step is of a known kind, with numbers and a pattern as they are usual."""
    if str(part.get("type")) not in _KNOWN or any(type(n) is int and not 0 <= n <= LONGEST for n in part.values()):
        return False
    pattern = part.get("pattern")
    texts = list(pattern.values()) if isinstance(pattern, dict) else []
    return all(isinstance(t, str) and 0 < len(t) <= _PATTERN and not _COUNTED.search(t) for t in texts)


def _check_growth(key: str, parts: list[dict[str, Any]], added: Any) -> None:
    times, before = 1.0, 0.0
    for part in parts:
        grows, more = _growth(part)
        times, before = times * grows, before * grows + more
        if times > GROWTH:
            raise _Beyond(f"its {key} makes a text {times:,.0f} times as long, and {GROWTH} times are the most")
        if before > BEFORE:
            raise _Beyond(f"its {key} puts {before:,.0f} characters before a text, and {BEFORE} are the most")
    tokens = added if isinstance(added, list) else []
    texts = [token["content"] for token in tokens if isinstance(token, dict) and "content" in token]
    together = sum(times * len(text) + before for text in texts if isinstance(text, str))
    if together > TOGETHER:
        raise _Beyond(f"its added tokens have {together:,.0f} characters, normalized, and {TOGETHER:,} are the most")


def _growth(part: Mapping[str, Any]) -> tuple[float, float]:
    """How many times as long a step makes a text at most, and how many characters it adds. A step need not name its
    type: the library tells it by its keys.
    """
    pattern, content = part.get("pattern"), part.get("content")
    if isinstance(pattern, dict) and isinstance(content, str):
        written = len(unicodedata.normalize("NFKD", content)) if len(content) <= LONGEST else len(content)
        given = pattern.get("String")
        shortest = len(given) if isinstance(given, str) else 0
        return max(written / shortest, 1.0) if shortest else 1.0 + written, 0.0
    if isinstance(start := part.get("prepend"), str):
        return 1.0, float(len(start))
    if isinstance(packed := part.get("precompiled_charsmap"), str):
        return max(_longest_replacement(packed), 1.0), 0.0
    return 1.0, 0.0


def _longest_replacement(packed: str) -> float:
    """Of a table of sentencepiece: the size of its trie in 4 bytes, the trie, and texts that each end with a zero."""
    try:
        table = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return float(max(len(text.decode("utf-8", errors="replace")) for text in texts))


def _check_pieces(parts: list[dict[str, Any]]) -> None:
    """The tokens around a text: not without number, and the text itself once."""
    for part in parts:
        special = part.get("special_tokens")
        tokens = list(special.values()) if isinstance(special, dict) else special
        for token in tokens if isinstance(tokens, list) else []:
            ids = token.get("ids") if isinstance(token, dict) else None
            if isinstance(ids, list) and len(ids) > PARTS:
                raise _Beyond(f"a special token of its post_processor has {len(ids):,} ids, and {PARTS} are the most")
        for key, most in (("single", 1), ("pair", 2)):
            pieces = part.get(key)
            if not isinstance(pieces, list):
                continue
            if len(pieces) > PARTS:
                raise _Beyond(f"its post_processor puts {len(pieces):,} pieces together, and {PARTS} are the most")
            texts = [piece for piece in pieces if isinstance(piece, dict) and "Sequence" in piece]
            if len(texts) > most:
                raise _Beyond(f"its post_processor writes a text {len(texts)} times")


def _number(value: int) -> str:
    """As it can be shown: Python writes no integer of thousands of digits."""
    return f"{value:,}" if abs(value) < 10**30 else f"{'-' * (value < 0)}10^{int(value.bit_length() * 0.30103)}"

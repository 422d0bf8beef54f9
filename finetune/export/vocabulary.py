"""The tokenizer in GGUF: tokens, pre-tokeniser, special tokens, scores.

Named from the tokenizer's structure; what llama.cpp would cut otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from backends.model_folder import ModelFolder
from finetune.data.tokenizer import Tokenizer, begin_tokens, end_of_turn, load_tokenizer, special_texts
from finetune.export.families import Keys, Refused
from finetune.export.prompt import PROBES, prompt_of

_Merges = Sequence[tuple[str, ...]]
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # GGUF's token types
_SPACE = "▁"  # U+2581, SentencePiece's space
_DIGITS3, _DIGIT = r"\p{N}{1,3}", r"\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT, _WORD = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (f"{_WORD}{_UPPER}*{_LOWER}+", f"{_WORD}{_UPPER}+{_LOWER}*")
_CASED_REST = _REST.replace("[\\r\\n]*", "[\\r\\n/]*", 1)
# (pattern of tokenizer.json, whether a whole word in the vocabulary is not merged) -> llama.cpp's name
_PATTERNS = {
    (f"{_SHORT}|{_WORD}\\p{{L}}+|{_DIGITS3}{_REST}", True): "llama-bpe",
    (f"{_SHORT}|{_WORD}\\p{{L}}+|{_DIGITS3}{_REST}", False): "dbrx",
    (f"{_SHORT}|{_WORD}\\p{{L}}+|{_DIGIT}{_REST}", False): "qwen2",
    (f"{_CASED[0]}|{_CASED[1]}|{_DIGIT}{_CASED_REST}", True): "tekken",
    (f"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|{_DIGITS3}{_CASED_REST}", False): "gpt-4o",
}


@lru_cache(1)
def vocabulary(folder: ModelFolder, template: str) -> Keys:
    """GGUF keys of the tokenizer with this chat template. Raises Refused for one that differs there."""
    tokenizer = load_tokenizer(folder)
    given, tokenizer.chat_template = tokenizer.chat_template, template or None
    chat = isinstance(given, str) and given in template  # else prompts are plain texts
    keys = _vocabulary(tokenizer, folder.vocabulary, chat and _begins_special(tokenizer))
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _begins_special(tokenizer: Tokenizer) -> bool:
    """Whether every prompt of the chat template begins with a special token."""
    try:
        return prompt_of(tokenizer, PROBES[0]).startswith(tuple(special_texts(tokenizer)))
    except ValueError:  # a template may refuse anything
        return False


def _vocabulary(tokenizer: Tokenizer, size: int | None, begins_special: bool) -> Keys:
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # what our own texts are read by
    model, added = state["model"], state["added_tokens"]
    if model["type"] != "BPE":
        raise Refused(f"its tokenizer is {model['type']}, and only BPE is written")
    words: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in added}
    count = size or 1 + max(words.values())
    words = {text: number for text, number in words.items() if number < count}  # the model knows no others
    added = [token for token in added if token["id"] < count]
    texts, types = [f"[PAD{number}]" for number in range(count)], [_UNUSED] * count
    for text, number in words.items():
        texts[number], types[number] = text, _NORMAL
    for token in added:
        types[token["id"]] = _CONTROL if token["special"] else _USER
    if len(set(texts)) < count:
        raise Refused("two of its tokens are written the same")
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    if model.get("byte_fallback") or (model.get("unk_token") and not _cuts(state)):
        keys = _sentencepiece(model, words, merges, texts, types)
        keys["tokenizer.ggml.add_space_prefix"] = _space_prefix(state, begins_special)
    else:
        keys = _bytes(state, merges)
    keys |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    return keys | _special(tokenizer, count) | _stripping(added, texts, types)


def _bytes(state: Mapping[str, Any], merges: _Merges) -> Keys:
    """Letters are bytes, as in GPT-2; the text is cut by a pattern before."""
    model, normalizer = state["model"], (state["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):  # NFC is not applied there, and differs in few texts: rows are compared
        raise Refused(f"its texts are normalised ({normalizer})")
    if any(" " in part for pair in merges for part in pair):
        raise Refused("its merges hold spaces")
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    name = _pre_tokenizer(_cuts(state), bool(model.get("ignore_merges")))
    if odd or name is None:
        raise Refused(f"its pre-tokenizer is not one that llama.cpp has{f' ({odd[0]})' if odd else ''}")
    pairs = [" ".join(pair) for pair in merges]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": pairs}


def _cuts(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizers, one after the other."""
    whole = state["pre_tokenizer"] or {}
    return list(whole.get("pretokenizers", [whole] if whole else []))


def _pre_tokenizer(cuts: Sequence[Mapping[str, Any]], whole_words: bool) -> str | None:
    """llama.cpp's name for what these do; None: it has none."""
    if not cuts or cuts[-1]["type"] != "ByteLevel" or cuts[-1].get("add_prefix_space"):
        return None
    before, by_itself = cuts[:-1], bool(cuts[-1].get("use_regex", True))
    kinds = [cut["type"] for cut in before]
    if by_itself and not whole_words:  # the pattern of GPT-2
        digits = kinds == ["Digits"] and bool(before[0].get("individual_digits"))
        return "smollm" if digits else None if kinds else "gpt-2"
    if kinds != ["Split"] or by_itself or before[0]["behavior"] != "Isolated" or before[0].get("invert"):
        return None
    return _PATTERNS.get((before[0]["pattern"].get("Regex", ""), whole_words))


def _sentencepiece(
    model: Mapping[str, Any], words: Mapping[str, int], merges: _Merges, texts: list[str], types: list[int]
) -> Keys:
    """Letters are letters, spaces are written as ▁, and bytes stand for letters that are not known.

    llama.cpp merges by the score of the result, and any two pieces that make a token: so the scores are the ranks of
    the merges, and a tokenizer whose merges leave out such a pair is refused.
    """
    if not model.get("byte_fallback") or any(f"<0x{byte:02X}>" not in words for byte in range(256)):
        raise Refused("its tokenizer has no bytes for letters that it does not know")
    scores, merged = [-1e9] * len(texts), set(merges)
    for rank, pair in reversed(list(enumerate(merges))):  # the first merge that makes a token counts
        if (number := words.get("".join(pair))) is not None:
            scores[number] = float(-rank)
    for text, number in model["vocab"].items():
        if types[number] != _NORMAL:
            continue
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = _BYTE
            continue
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        if any(a in words and b in words and (a, b) not in merged for a, b in pairs):
            raise Refused(f"its merges do not reach the token {text!r:.40} in every way that SentencePiece does")
    for number, text in enumerate(texts):  # whole runs of spaces are merged from single ones
        if types[number] == _USER and _SPACE in text:
            types[number] = _NORMAL
    if (unknown := words.get(str(model.get("unk_token")))) is not None:
        types[unknown] = _UNKNOWN
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}


def _space_prefix(state: Mapping[str, Any], begins_special: bool) -> bool:
    """Whether a space is put before each text, and after each special token, as llama.cpp does it or does not.

    begins_special: the prompts do, so that a space before the first text alone is put nowhere.
    """
    whole = state["normalizer"] or {}
    steps = [(step.get("type"), step.get("prepend"), step.get("content")) for step in whole.get("normalizers", [whole])]
    space = ("Replace", None, _SPACE)
    cuts = [cut for cut in _cuts(state) if cut["type"] != "Split" or cut.get("pattern") != {"String": " "}]
    if steps in ([space], [("Prepend", _SPACE, None), space]) and not cuts:
        return len(steps) == 2
    known = [(cut["type"], cut.get("replacement"), bool(cut.get("split"))) for cut in cuts]
    if whole or known != [("Metaspace", _SPACE, False)]:
        raise Refused("it puts spaces before texts otherwise than llama.cpp does")
    scheme = cuts[0].get("prepend_scheme", "always")  # which spares a text that begins with a space: rows are compared
    return bool(scheme == "always" or (scheme == "first" and not begins_special))


def _special(tokenizer: Tokenizer, count: int) -> Keys:
    """What begins and ends a text. `add_bos_token` is written also where it is false: llama.cpp would guess."""
    begin, bos, turn = begin_tokens(tokenizer), tokenizer.bos_token_id, end_of_turn(tokenizer)
    if begin not in ([], [bos]):
        raise Refused(f"it puts the tokens {begin} before a text, and not its BOS alone")
    eos = turn if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if eos is None or eos >= count:
        raise Refused("it has no token that ends a text")
    named = {"bos": bos, "eos": eos, "eot": turn, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ids = {
        f"tokenizer.ggml.{name}_token_id": int(number)
        for name, number in named.items()
        if number is not None and number < count
    }
    return ids | {"tokenizer.ggml.add_bos_token": bool(begin), "tokenizer.ggml.add_eos_token": False}


def _stripping(added: Sequence[Mapping[str, Any]], texts: Sequence[str], types: Sequence[int]) -> Keys:
    """Special tokens that take white space with them: llama.cpp knows those of Phi-3, by the model's name."""
    right = {token["content"] for token in added if token["rstrip"]}
    if any(token["lstrip"] or token["single_word"] for token in added):
        raise Refused("a special token takes the white space before it, or stands only as a word")
    if not right:
        return {}
    looked_for = {text for text, kind in zip(texts, types, strict=True) if kind in (_CONTROL, _USER, _UNKNOWN)}
    phi, never = {*looked_for, "</s>"} - {"<unk>", "<s>", "<|endoftext|>"}, {"<unk>", "<s>", "<|endoftext|>", "</s>"}
    if right != phi or not never <= set(texts):
        raise Refused("special tokens take the white space after them")
    return {"general.name": "phi-3"}

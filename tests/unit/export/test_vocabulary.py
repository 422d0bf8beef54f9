"""llama.cpp reads every text as our tokenizer does, or the tokenizer is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from backends.model_folder import ModelFolder
from finetune.data.tokenizer import begin_tokens, encode, load_tokenizer
from finetune.errors import EnvironmentProblem
from finetune.export.vocabulary import vocabulary
from tests.tiny_models import TEXT, tiny_llama
from tests.unit.chat_families import CORPUS, FAMILIES, tokenizer_of
from tests.unit.export.gguf_models import engine, write

BUILT_IN = Path(__file__).parents[3] / "finetune/assets"
HARD = [
    "a", " a", "a ", "  two  spaces  ", "\n\n\nlines\r\n\r\n and\ttabs\t\t", "don't WON'T i'LL we'd 'tis '",
    "12345 1,234.5 ٣٤٥ ²", "naïve café Ångström", "日本語と中文 mixed with English", "🙂👩\u200d👩\u200d👧 flags 🇫🇷",
    "a\u00a0b\u2003c\u200bd", "\ufb01ne \ufb00 K", "▁ underscore ▁▁", "<s> </s> <unk> <|im_end|> <|eos|> <pad>",
    "x<|eot_id|>y<|user|> z", "def f(x):\n    return x**2  # ok\n", "مرحبا بالعالم", "हिन्दी में",
    "!!!??? ... --- ___ ###", "A" * 70, "\x00\x01\x7f", "e\u0301 combining", "\U0001d49c astral 𐍈", "https://a.b/c?d=e&f=%20#g",
]  # fmt: skip


def kept(tokenizer: PreTrainedTokenizerFast, folder: Path, size: int | None = None) -> Path:
    """A tiny model with that tokenizer."""
    tokenizer.save_pretrained(folder)
    return tiny_llama(folder, vocab_size=size or len(tokenizer))


def differing(folder: Path, file: Path, texts: list[str], template: str = "") -> list[str]:
    """The texts that llama.cpp reads otherwise."""
    write(folder, file, template=template)
    reader, tokenizer = engine(file), load_tokenizer(ModelFolder.open(folder))
    begin = begin_tokens(tokenizer)
    assert reader.tokenise("<s>") == begin + reader.tokenise("<s>", special=False)
    own = (encoded.tokens for encoded in encode(tokenizer, texts))
    return [text for text, tokens in zip(texts, own, strict=True) if reader.tokenise(text, special=False) != tokens]


def test_the_built_in_model_reads_its_reviews_and_hard_texts_alike(tmp_path: Path) -> None:
    lines = (BUILT_IN / "reviews/test.jsonl").read_text(encoding="utf-8").splitlines()
    reviews = [" ".join(str(value) for value in json.loads(line).values()) for line in lines[:100]]
    tokenizer = load_tokenizer(ModelFolder.open(BUILT_IN / "reviews-base"))
    folder = kept(tokenizer, tmp_path / "model")
    assert differing(folder, tmp_path / "model.gguf", [*reviews, *HARD]) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_families_are_read_alike_or_refused(name: str, tmp_path: Path) -> None:
    folder = kept(tokenizer_of(name), tmp_path / "model")
    marks = "".join([FAMILIES[name].end, *FAMILIES[name].marks, " a ", FAMILIES[name].eos])
    if FAMILIES[name].swallows:  # special tokens that take white space with them, but not all that Phi-3's do
        with pytest.raises(EnvironmentProblem, match="--to merged"):
            write(folder, tmp_path / "model.gguf")
    else:
        assert differing(folder, tmp_path / "model.gguf", [CORPUS, marks, *HARD]) == []


SPLIT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
CASED = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+%s|[^\\r\\n\\p{L}\\p{N}]?"
    "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*%s|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def cut(pattern: str) -> Any:
    from tokenizers import Regex

    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), by_bytes])


def whole(add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)


def learned(
    pre: Any, normalizer: Any = None, ignore_merges: bool = False, bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these cuts, learned from a paragraph."""
    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.pre_tokenizer, raw.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator([TEXT, CORPUS, "don't WON'T we'll 2024 12345 /// FooBar HTTPServer\n\n" * 3], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


DIGITS = pre_tokenizers.Digits(individual_digits=True)
NAMED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: learned(whole()),
    "smollm": lambda: learned(pre_tokenizers.Sequence([DIGITS, whole()])),
    "llama-bpe": lambda: learned(cut(SPLIT + "\\p{N}{1,3}" + REST), ignore_merges=True, bos=True),
    "dbrx": lambda: learned(cut(SPLIT + "\\p{N}{1,3}" + REST)),
    "qwen2": lambda: learned(cut(SPLIT + "\\p{N}" + REST)),
    "tekken": lambda: learned(cut(CASED % ("", "", "")), ignore_merges=True),
    "gpt-4o": lambda: learned(cut(CASED % (SHORT, SHORT, "{1,3}"))),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_pattern_is_named_and_read_alike(name: str, tmp_path: Path) -> None:
    folder = kept(NAMED[name](), tmp_path / "model")
    assert vocabulary(ModelFolder.open(folder), "")["tokenizer.ggml.pre"] == name
    assert differing(folder, tmp_path / "model.gguf", [CORPUS, "FooBar HTTPServer ///x", *HARD]) == []


REFUSED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "a space before every text": lambda: learned(whole(add_prefix_space=True)),
    "another pattern": lambda: learned(cut("\\p{L}+|\\p{N}|\\s+|[^\\s]")),
    "digits in pairs": lambda: learned(cut(SPLIT + "\\p{N}{1,2}" + REST)),
    "a known pattern, whole words not merged": lambda: learned(cut(SPLIT + "\\p{N}" + REST), ignore_merges=True),
    "white space alone": lambda: learned(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), whole()])),
    "small letters": lambda: learned(whole(), normalizer=normalizers.Lowercase()),
    "compatibility forms": lambda: learned(whole(), normalizer=normalizers.NFKC()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_cut_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    folder = ModelFolder.open(kept(REFUSED[name](), tmp_path))
    with pytest.raises(EnvironmentProblem, match="--to merged"):
        vocabulary(folder, "")


def pieces(spaced: bool, scheme: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's: letters, spaces as ▁, all bytes, and every merge that reaches a token."""
    words: dict[str, int] = {}
    for token in ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set(TEXT) - {" "})]:
        words.setdefault(token, len(words))
    parts = ["th", "▁t", "is", "▁a", "at", "▁th", "▁f", "in", "▁g", "oo", "▁is", "▁goo", "▁thi", "▁this", "▁▁", "▁good"]
    for token in parts:
        words.setdefault(token, len(words))
    merges = [(t[:c], t[c:]) for t in parts for c in range(1, len(t)) if t[:c] in words and t[c:] in words]
    raw = Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if spaced else space
    if scheme:
        raw.normalizer = None
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("spaced", [True, False], ids=["as Llama 2", "as Gemma"])
def test_sentencepiece_is_read_alike(spaced: bool, tmp_path: Path) -> None:
    tokenizer = pieces(spaced)
    if not spaced:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("▁▁", "\n\n", "<table>")])
    folder = kept(tokenizer, tmp_path / "model")
    more = ["this is good  at</s>this", "a  b   c    d", "\n\n\n\nx <table> y</table>"]
    hard = [text for text in HARD if spaced or "▁▁" not in text]  # looked for before spaces are written as ▁
    assert differing(folder, tmp_path / "model.gguf", [TEXT, *more, *hard]) == []


def swallowing(*right: str) -> PreTrainedTokenizerFast:
    """Special tokens as Phi-3 has them; those of `right` take the white space after them."""
    tokenizer = pieces(True)
    marks = [AddedToken(text, special=True, normalized=False, rstrip=text in right) for text in ("<|end|>", "<|user|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": "<|endoftext|>"})
    tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=False, rstrip="</s>" in right)])
    return tokenizer


def test_special_tokens_that_take_white_space_are_those_of_phi3(tmp_path: Path) -> None:
    folder = kept(swallowing("<|end|>", "<|user|>", "</s>"), tmp_path / "model")
    texts = ["<|user|>\n this<|end|>\n<|user|>   is good <|endoftext|> a", "a</s>  b <s>  c", *HARD]
    assert differing(folder, tmp_path / "model.gguf", texts) == []
    with pytest.raises(EnvironmentProblem, match="white space after them"):
        vocabulary(ModelFolder.open(kept(swallowing("<|end|>"), tmp_path / "other")), "")


INST = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
TALK = ["<s>[INST] this is good [/INST]", "<s>[INST]  at [/INST] good</s>[INST] is [/INST]", "<s> a", "<s>a"]


@pytest.mark.parametrize(
    ("scheme", "own", "template", "texts"),
    [
        ("never", None, "", [*HARD, *TALK]),
        ("first", INST, INST, TALK),  # a conversation begins with a special token, and so no text is the first
        ("first", INST, f"{{# of a run #}}{INST}", TALK),
        ("first", INST, "{{ messages[0].content }}", ["this is good", "a", "two  spaces"]),  # of plain prompts
        ("first", None, "", ["this is good", "a", "two  spaces"]),
        ("always", INST, INST, [TEXT, "a", "this</s>is", "two  spaces"]),
    ],
)
def test_spaces_are_put_where_the_runs_prompts_have_them(
    scheme: str, own: str | None, template: str, texts: list[str], tmp_path: Path
) -> None:
    tokenizer = pieces(False, scheme)
    tokenizer.chat_template = own
    folder = kept(tokenizer, tmp_path / "model")
    assert differing(folder, tmp_path / "model.gguf", texts, template) == []


def test_merges_that_sentencepiece_would_not_take_are_refused(tmp_path: Path) -> None:
    whole = pieces(True)
    state = json.loads(whole.backend_tokenizer.to_str())
    state["model"]["merges"].remove(["▁t", "h"])  # "▁th" can be made of "▁" and "th" alone
    whole._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(EnvironmentProblem, match="SentencePiece"):
        vocabulary(ModelFolder.open(kept(whole, tmp_path)), "")


def test_types_special_tokens_and_padding_are_said(tmp_path: Path) -> None:
    tokenizer = learned(whole())
    tokenizer.add_tokens(["<mine>"])
    keys = vocabulary(ModelFolder.open(kept(tokenizer, tmp_path, len(tokenizer) + 3)), "")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert [types[tokens.index(text)] for text in ("<s>", "</s>", "<mine>", "a")] == [3, 3, 4, 1]
    assert tokens[-3:] == [f"[PAD{len(tokens) - 3 + i}]" for i in range(3)] and types[-3:] == [5, 5, 5]
    assert keys["tokenizer.ggml.add_bos_token"] is False  # written: llama.cpp would take its own default
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)


def test_the_end_of_turn_is_that_of_the_template_that_travels(tmp_path: Path) -> None:
    family = FAMILIES["llama 3"]
    folder = ModelFolder.open(kept(tokenizer_of("llama 3"), tmp_path))
    keys = vocabulary(folder, family.template)
    tokens = keys["tokenizer.ggml.tokens"]
    assert tokens[keys["tokenizer.ggml.eot_token_id"]] == family.end
    assert tokens[keys["tokenizer.ggml.eos_token_id"]] == family.eos
    assert keys["tokenizer.ggml.add_bos_token"] is True and begin_tokens(load_tokenizer(folder))
    assert keys["tokenizer.chat_template"] == family.template
    assert "tokenizer.ggml.eot_token_id" not in vocabulary(folder, "{{ messages[0].content }}")

"""Ten families of chat models: a small tokenizer, a chat template, and the same conversation written by hand.

The template is what the code under test renders. `written` is plain Python that knows nothing of it: the text piece
by piece, with what must be learned of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Talk = Sequence[dict[str, Any]]  # messages: role, content, and weight 0 where a turn is not learned
Piece = tuple[str, bool]  # text, and whether it is learned
Texts = list[list[Piece]]  # one of them for each row that the conversation becomes

CORPUS = (
    "What is the capital of France? The capital is Paris. A fine film, warm and sad; 100% good or 2 hours too long! "
    'user assistant system model Answer: {"a": [1, 2]} ### return x + 1 <think> </think> <|user|> <|assistant|> \n\n\n'
) * 4


@dataclass(frozen=True)
class Family:
    template: str
    written: Callable[[Talk], Texts]
    eos: str
    end: str  # the token that ends an answer
    bos: str | None = None
    adds_bos: bool = False  # the tokenizer puts BOS before a text by itself
    system: bool = True  # the template takes a system message
    marks: tuple[str, ...] = ()  # its other special tokens
    sentencepiece: bool = False  # else bytes, as GPT-2 has them
    spaced: bool = False  # a space is put before every text and after every special token
    swallows: bool = False  # special tokens take the white space after them


def learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


def _llama3(talk: Talk) -> Texts:
    pieces = [("<|begin_of_text|>", False)]
    for one in talk:
        pieces.append((f"<|start_header_id|>{one['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{one['content'].strip()}<|eot_id|>", learned(one)))
    return [pieces]


def _chatml(talk: Talk) -> Iterator[Piece]:
    for one in talk:
        yield f"<|im_start|>{one['role']}\n", False
        yield f"{one['content']}<|im_end|>", learned(one)
        yield "\n", False


def _qwen2(talk: Talk) -> Texts:
    given = talk[0]["role"] == "system"
    return [[*_chatml(talk if given else [{"role": "system", "content": "You are helpful."}, *talk])]]


def _qwen3(talk: Talk) -> Texts:
    """Only the last answer has its (empty) thoughts, so that each answer is a row with what came before it."""
    rows = []
    for number, one in enumerate(talk):
        if learned(one):
            answer = f"<think>\n\n</think>\n\n{one['content']}<|im_end|>"
            before = [(text, False) for text, _ in _chatml(talk[:number])]
            rows.append([*before, ("<|im_start|>assistant\n", False), (answer, True), ("\n", False)])
    only = [one for one in talk if one["role"] == "assistant"]
    return rows if len(only) > 1 else rows[:1]


def _gemma(talk: Talk) -> Texts:
    pieces = [("<bos>", False)]
    for one in talk:
        role = "model" if one["role"] == "assistant" else "user"
        pieces.append((f"<start_of_turn>{role}\n", False))
        pieces += [(f"{one['content'].strip()}<end_of_turn>", learned(one)), ("\n", False)]
    return [pieces]


def _mistral(talk: Talk) -> Texts:
    pieces = [("<s>", False)]
    for one in talk:
        asked = one["role"] == "user"
        pieces.append((f"[INST] {one['content']} [/INST]" if asked else f" {one['content']}</s>", learned(one)))
    return [pieces]


def _llama2(talk: Talk) -> Texts:
    pieces, system = [], ""
    for one in talk:
        text = one["content"].strip()
        if one["role"] == "system":
            system = f"<<SYS>>\n{one['content']}\n<</SYS>>\n\n"
        elif one["role"] == "user":
            pieces.append((f"<s>[INST] {system}{text} [/INST]", False))
            system = ""
        else:
            pieces.append((f" {text} </s>", learned(one)))
    return [pieces]


def _phi3(talk: Talk) -> Texts:
    pieces = []
    for one in talk:
        pieces += [(f"<|{one['role']}|>\n", False), (f"{one['content']}<|end|>", learned(one)), ("\n", False)]
    return [[*pieces, ("<|endoftext|>", False)]]


def _zephyr(talk: Talk) -> Texts:
    pieces = []
    for one in talk:
        pieces += [(f"<|{one['role']}|>\n", False), (f"{one['content']}</s>", learned(one)), ("\n", False)]
    return [pieces]


def _command_r(talk: Talk) -> Texts:
    names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}
    pieces = [("<BOS_TOKEN>", False)]
    for one in talk:
        pieces.append((f"<|START_OF_TURN_TOKEN|><|{names[one['role']]}_TOKEN|>", False))
        pieces.append((f"{one['content'].strip()}<|END_OF_TURN_TOKEN|>", learned(one)))
    return [pieces]


def _granite(talk: Talk) -> Texts:
    """Answers are found though the prompt for one ends before the turn's own line does."""
    pieces = []
    for one in talk:
        pieces += [(f"<|role|>{one['role']}<|/role|>", False), (f"\n{one['content']}<|done|>", learned(one))]
        pieces.append(("\n", False))
    return [pieces]


_BEFORE = "{% for m in messages %}"
_ASKS = "{% endfor %}{% if add_generation_prompt %}"
FAMILIES = {
    "llama 3": Family(
        "{{ bos_token }}" + _BEFORE + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}"
        + _ASKS + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        _llama3, "<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>", adds_bos=True,
        marks=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "qwen 2": Family(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        + _BEFORE + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
        + _ASKS + "{{ '<|im_start|>assistant\\n' }}{% endif %}",
        _qwen2, "<|im_end|>", "<|im_end|>", marks=("<|im_start|>", "<|endoftext|>"),
    ),
    "qwen 3": Family(
        _BEFORE + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}"
        + _ASKS + "{{ '<|im_start|>assistant\\n' }}{% endif %}",
        _qwen3, "<|im_end|>", "<|im_end|>", marks=("<|im_start|>", "<|endoftext|>"),
    ),
    "gemma": Family(
        "{{ bos_token }}" + _BEFORE + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ m.content | trim + '<end_of_turn>\\n' }}" + _ASKS + "{{ '<start_of_turn>model\\n' }}{% endif %}",
        _gemma, "<eos>", "<end_of_turn>", "<bos>", adds_bos=True, system=False,
        marks=("<start_of_turn>",), sentencepiece=True,
    ),
    "mistral": Family(
        "{{ bos_token }}" + _BEFORE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
        _mistral, "</s>", "</s>", "<s>", adds_bos=True, system=False,
        marks=("[INST]", "[/INST]"), sentencepiece=True, spaced=True,
    ),
    "llama 2": Family(
        "{% set ns = namespace(system='') %}" + _BEFORE + "{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}{% elif m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        _llama2, "</s>", "</s>", "<s>", adds_bos=True, sentencepiece=True, spaced=True,
    ),
    "phi 3": Family(
        _BEFORE + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}"
        + _ASKS + "{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        _phi3, "<|endoftext|>", "<|end|>", "<s>", sentencepiece=True, spaced=True, swallows=True,
        marks=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "zephyr": Family(
        _BEFORE + "{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
        + _ASKS + "{{ '<|assistant|>\\n' }}{% endif %}",
        _zephyr, "</s>", "</s>", "<s>", adds_bos=True, sentencepiece=True, spaced=True,
    ),
    "command r": Family(
        "{{ bos_token }}" + _BEFORE + "{{ '<|START_OF_TURN_TOKEN|>' + "
        "{'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}"
        "{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        + _ASKS + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        _command_r, "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", adds_bos=True,
        marks=("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "granite": Family(
        _BEFORE + "{{ '<|role|>' + m.role + '<|/role|>' + '\\n' + m.content + '<|done|>\\n' }}"
        + _ASKS + "{{ '<|role|>assistant<|/role|>' }}{% endif %}",
        _granite, "<|endoftext|>", "<|done|>", marks=("<|role|>", "<|/role|>"),
    ),
}  # fmt: skip


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer, learned from a paragraph."""
    family = FAMILIES[name]
    named = dict.fromkeys([family.bos or family.eos, family.eos, family.end, *family.marks, "<unk>"])
    marks = [AddedToken(one, special=True, normalized=False, rstrip=family.swallows) for one in named]
    raw = _sentencepiece(marks, family.spaced) if family.sentencepiece else _bytes(marks)
    if family.adds_bos and family.bos:
        first = [(family.bos, raw.token_to_id(family.bos))]
        raw.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=first)
    names = {"bos_token": family.bos} if family.bos else {}
    whole = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=family.eos, pad_token=family.eos, **names)
    whole.chat_template = family.template
    return whole


def _bytes(marks: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS, *["\n\n"] * 9], trainer)
    return tokenizer


def _sentencepiece(marks: list[AddedToken], spaced: bool) -> Tokenizer:
    """Spaces as letters, bytes for letters that were not seen, as in Llama 2 (`spaced`) and in Gemma."""
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*marks, *every_byte], show_progress=False)
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator([f"▁{word}" for word in CORPUS.split()] + ["\n", "\n\n"], trainer)
    state = json.loads(Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)).to_str())
    found = json.loads(learner.to_str())
    state["model"]["vocab"], state["model"]["merges"] = found["model"]["vocab"], found["model"]["merges"]
    state["added_tokens"] = found["added_tokens"][: len(marks)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if spaced else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer

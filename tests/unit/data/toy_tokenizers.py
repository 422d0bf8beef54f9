"""Small tokenizers of the kinds models come with, trained on one paragraph, and chat templates of their families."""

from __future__ import annotations

import functools
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "A fine film: the cast is warm, the story is sad and the ending is 100% good. I did not like it at all; bad, "
    "dull, 2 hours too long! User: what is this? Assistant: it is a label. ### Instruction: name it ### Response: yes "
    'positive negative system user assistant capital of France is Paris\n\nInput:\nOutput: {"a": 1}\nLabel: good bad '
) * 3
MARKS = [
    "<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}"
    "{{ '<|header|>' + m.role + '<|/header|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Only the last answer keeps its (empty) thoughts; earlier ones are written without.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The prompt it writes before an answer is not how a finished conversation begins.
BROKEN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'now answer: ' }}{% endif %}"
)
# No token ends a turn.
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "qwen3": QWEN3, "bare": BARE,
}  # fmt: skip


def _begins(tokenizer: Tokenizer, ends: bool = False) -> None:
    """BOS before every text, and EOS after it where asked, as Llama's and T5's post-processors do."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))],
    )


@functools.cache
def byte_level(
    template: str | None = None, bos: bool = False, ends: bool = False, pad: str | None = "<pad>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, *["\n\n"] * 9], trainer)  # two newlines are one token where a text ends
    if bos:
        _begins(tokenizer, ends)
    return _wrapped(tokenizer, template, pad)


@functools.cache
def metaspace(template: str | None = None, bos: bool = True, pad: str | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece's way, as Llama 2 and Mistral have it: a space before the text, BOS first, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"▁{word}" for word in TEXT.split()] + ["\n", "\n\n"]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=specials, show_progress=False)
    raw = Tokenizer(models.BPE())
    raw.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    learned = json.loads(raw.to_str())
    state["model"]["vocab"], state["model"]["merges"] = learned["model"]["vocab"], learned["model"]["merges"]
    state["added_tokens"] = learned["added_tokens"][: len(MARKS)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if bos:
        _begins(tokenizer)
    return _wrapped(tokenizer, template, pad)


def _wrapped(tokenizer: Tokenizer, template: str | None, pad: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad)
    wrapped.chat_template = template
    return wrapped


def all_kinds(template: str | None = None) -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bytes": byte_level(template),
        "bytes with bos": byte_level(template, bos=True),
        "bytes with bos and eos": byte_level(template, bos=True, ends=True),
        "no pad": byte_level(template, bos=True, pad=None),
        "pad is eos": byte_level(template, pad="</s>"),
        "metaspace": metaspace(template),
        "metaspace without bos": metaspace(template, bos=False),
    }

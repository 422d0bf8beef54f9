"""Tiny random model folders, seeded, as transformers writes them: float32 safetensors and a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite")

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    # six blocks: five with a sliding window and one without, as mlx-lm takes every Gemma 3 to be
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "num_hidden_layers": 6},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
}


def family(name: str, folder: Path, vocab_size: int = 128, seed: int = 0, **settings: Any) -> Path:
    """A model of that `model_type`, two blocks (Gemma 3: six); `settings` go over the family's own."""
    config = AutoConfig.for_model(name, **(_COMMON | _OWN.get(name, {}) | {"vocab_size": vocab_size} | settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:  # activations keep about unit size, so that every layer matters to the logits
                    weight.normal_(std=weight.shape[1] ** -0.5)
                else:  # norms and biases: away from the 0 or 1 that would hide a misreading
                    weight.add_(torch.randn_like(weight) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, vocab_size: int = 128, tie: bool = False, seed: int = 0, **settings: Any) -> Path:
    """A two-block Llama of hidden size 64 (a multiple of every 4-bit group size)."""
    return family("llama", folder, vocab_size=vocab_size, seed=seed, tie_word_embeddings=tie, **settings)


TEXT = "a fine good warm film, a dull bad cold film: it is positive or negative. user assistant what is this " * 3
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def model_with_tokenizer(folder: Path, **settings: Any) -> Path:
    """A tiny Llama and, beside it, a byte-level BPE tokenizer of its 320 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    whole.chat_template = CHAT
    whole.save_pretrained(folder)
    return tiny_llama(folder, vocab_size=320, **settings)

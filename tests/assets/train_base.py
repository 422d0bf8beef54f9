"""Train the embedded base model from nothing, on plain text, in one seeded command.

    python tests/assets/train_base.py TEXT OUT [--steps N]

TEXT has one document a line (`.xz` is read as it is). OUT becomes a model folder: a byte-level BPE
tokenizer, a small Llama in bfloat16, and a chat template whose role tokens the text never showed.
Needs torch and transformers. An interrupted run goes on from OUT/training_state.safetensors.

The method, with its sources: bfloat16 weights with float32 master copies under `torch.compile`;
Muon for the matrices of the blocks (Jordan et al., 2024) and AdamW for the embedding and the norms;
a learning rate that is warmed up, held, and led linearly to zero over the last 40 % of the steps
(Hägele et al., 2024). A seeded quarter of the documents is shown in lower case with its punctuation
set apart, as old corpora have it, so that both ways of writing are known.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 4096
WIDTH = 256  # tokens in a training window
BATCH = 24  # windows in a step
HELD_OUT = 500  # documents kept apart for the validation loss
WARMUP, DECAY = 100, 0.4  # steps; share of the run
MUON_RATE, ADAM_RATE = 0.02, 4e-3

CARD = """\
---
license: apache-2.0
language: en
---
# reviews-base

A Llama of {parameters:,} parameters (hidden 256, 5 layers, 4 heads of 64 with 2 key/value heads, intermediate 704,
context 1,024, tied embeddings, bfloat16) with a byte-level BPE tokenizer of 4,096 pieces, shipped with `finetune` so
that everything can be tried offline.

**How it was made.** From nothing, by `tests/assets/train_base.py` (one seeded command), on 75,000 unlabelled English
film reviews of the Large Movie Review Dataset's training part (Maas et al., 2011), white space collapsed, a quarter of
them in lower case with the punctuation set apart: {steps:,} steps of {batch} windows of {width} tokens, {tokens:,}
tokens in all. Validation loss {validation_loss} nats a token on {held} reviews kept apart.

**What it is for.** A base for trying LoRA on short English texts about films: grammar in short stretches, and the
words in which reviews praise and blame.

**What it cannot do.** It knows no facts, follows no instructions, holds no conversation, and knows no other
language. Its role tokens (`<|system|>`, `<|user|>`, `<|assistant|>`) never occurred in training; the chat template
exists so that chat data can be tried. It repeats what anonymous reviewers wrote, their prejudices too. Not for use
on people.
"""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def documents(path: Path) -> list[str]:
    """Every non-empty line, its white space collapsed."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        return [text for line in file if (text := " ".join(line.replace("<br />", " ").split()))]


def restyle(text: str, rng: random.Random) -> str:
    """A quarter of the documents as old corpora write them: lower case, punctuation set apart."""
    if rng.random() >= 0.25:
        return text
    text = re.sub(r"([.,!?;:()\"])", r" \1 ", text.lower())
    text = re.sub(r"(n't|'s|'re|'ve|'ll|'d|'m)\b", r" \1", text)
    return " ".join(text.split())


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:30_000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Documents as one row of tokens, each between `<|bos|>` and `<|eos|>`: uint16 [tokens]."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([BOS, *one.ids, EOS], dtype=np.uint16) for one in encoded])


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def windows(stream: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """int64 [BATCH, WIDTH + 1] for ever: each epoch cuts the stream at another offset and shuffles."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        offset = int(rng.integers(WIDTH))
        starts = rng.permutation(np.arange(offset, len(stream) - WIDTH - 1, WIDTH))
        for first in range(0, len(starts) - BATCH + 1, BATCH):
            rows = [stream[start : start + WIDTH + 1] for start in starts[first : first + BATCH]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
        epoch += 1


def rate_at(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step`: warmed up, held, then linear to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


class Masters:
    """Float32 copies of the bfloat16 weights, and the optimisers that move them."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.live = list(model.parameters())
        self.copies = [p.detach().float().clone().requires_grad_() for p in self.live]
        matrices = [c for (n, _), c in zip(model.named_parameters(), self.copies, strict=True) if "proj" in n]
        others = [c for (n, _), c in zip(model.named_parameters(), self.copies, strict=True) if "proj" not in n]
        self.muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.02, momentum=0.95)
        self.adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, share: float) -> None:
        for live, copy in zip(self.live, self.copies, strict=True):
            copy.grad = live.grad.float() if live.grad is not None else None
            live.grad = None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        for optimiser, peak in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            optimiser.param_groups[0]["lr"] = peak * share
            optimiser.step()
        with torch.no_grad():
            for live, copy in zip(self.live, self.copies, strict=True):
                live.copy_(copy)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a later start needs, by name; moments appear after the first step."""
        found = {f"master.{i}": c.detach() for i, c in enumerate(self.copies)}
        for name, optimiser in (("muon", self.muon), ("adam", self.adam)):
            for i, state in optimiser.state_dict()["state"].items():
                found |= {f"{name}.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
        return found

    def restore(self, found: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for i, (live, copy) in enumerate(zip(self.live, self.copies, strict=True)):
                copy.copy_(found[f"master.{i}"])
                live.copy_(copy)
        for name, optimiser in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Any]] = {}
            for key, value in found.items():
                if key.startswith(name + "."):
                    _, index, field = key.split(".")
                    state.setdefault(int(index), {})[field] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # [B, T, V] bfloat16
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: Any, stream: np.ndarray) -> float:
    """Mean negative log-likelihood a token over the held-out stream, in windows of WIDTH."""
    count = (len(stream) - 1) // WIDTH
    rows = np.stack([stream[i * WIDTH : i * WIDTH + WIDTH + 1] for i in range(count)]).astype(np.int64)
    full = torch.from_numpy(rows[: count // BATCH * BATCH]).split(BATCH)
    return float(np.mean([loss_of(model, batch).item() for batch in full]))


def train(texts: list[str], out: Path, steps: int, save_every: int) -> None:
    random.seed(0)
    torch.manual_seed(0)
    rng = random.Random(0)
    texts = [restyle(text, rng) for text in texts]
    rng.shuffle(texts)
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out)
    held = token_stream(tokenizer, texts[:HELD_OUT])
    stream = token_stream(tokenizer, texts[HELD_OUT:])
    print(f"{len(texts)} documents, {len(stream):,} tokens, {len(held):,} held out", flush=True)

    model = build_model().to(torch.bfloat16)
    print(f"{model.num_parameters():,} parameters", flush=True)
    masters, state, done = Masters(model), out / "training_state.safetensors", 0
    if state.exists():
        saved = load_file(state)
        done = int(saved.pop("done"))
        masters.step(0.0)  # makes the optimisers' state, which restore then fills
        masters.restore(saved)
    compiled = torch.compile(model)
    started, batches, recent = time.monotonic(), windows(stream, seed=0), []
    for step in range(steps):
        rows = next(batches)
        if step < done:
            continue
        loss = loss_of(compiled, rows)
        loss.backward()
        masters.step(rate_at(step, steps))
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            speed = (step + 1 - done) * BATCH * WIDTH / (time.monotonic() - started)
            print(f"step {step + 1} loss {np.mean(recent):.4f} {speed:,.0f} tokens/s", flush=True)
            recent = []
        if (step + 1) % save_every == 0:
            save_file({**masters.tensors(), "done": torch.tensor(step + 1)}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            print(f"step {step + 1} validation loss {validation_loss(compiled, held):.4f}", flush=True)
    final = validation_loss(compiled, held)
    print(f"validation loss {final:.4f} after {steps} steps, {steps * BATCH * WIDTH:,} tokens", flush=True)
    model.save_pretrained(out)
    state.unlink(missing_ok=True)
    facts = {"steps": steps, "tokens": steps * BATCH * WIDTH, "validation_loss": round(final, 4)}
    (out / "training.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    shape = {"parameters": model.num_parameters(), "batch": BATCH, "width": WIDTH, "held": HELD_OUT}
    (out / "README.md").write_text(CARD.format(**facts, **shape), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded base model from nothing.")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--save-every", type=int, default=500)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    train(documents(given.text), given.out, given.steps, given.save_every)


if __name__ == "__main__":
    main()

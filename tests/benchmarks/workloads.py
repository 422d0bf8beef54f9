"""What is trained in a side-by-side run: random models, a tokenizer, and rows, all made here from a seed.

As a script it writes one workload's folder: `python workloads.py NAME FOLDER [blocks]`.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELS = 4
SYSTEM = 300  # tokens of the shared beginning in (d)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
Row = dict[str, str]
TRAIN, HELD, SHORT = "train.jsonl", "others/held.jsonl", "others/short.jsonl"  # below a workload's data folder
# Contents one after the other, and the end token after an answer: what every contender makes of prompt + completion.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Workload:
    """One set of rows on one model, and so many steps on them: the first of an epoch, or several whole epochs."""

    title: str
    vocabulary: int
    rows: Callable[[random.Random, int], Row]  # (generator, vocabulary) -> one row
    batch_size: int
    steps: int  # in the whole run; of an epoch where there are several
    epochs: int = 1
    layers: int | None = None  # adapt only so many of the last blocks
    quantize: str = "none"

    @property
    def count(self) -> int:
        """Rows. Grouping by length needs many to choose from: transformers sorts 50 batches at a time."""
        return self.batch_size * (self.steps if self.epochs > 1 else 50)

    @property
    def held(self) -> int:
        """Rows that measure the loss reached and are not trained on."""
        return self.batch_size * 2


def words(draw: random.Random, vocabulary: int, size: int) -> str:
    """`size` tokens, frequent ones far more often than rare ones (about Zipf's law)."""
    usable = vocabulary - len(SPECIAL)
    return " ".join(f"w{int(usable ** draw.random()) - 1}" for _ in range(size))


def classification(draw: random.Random, vocabulary: int) -> Row:
    """150 to 250 tokens of prompt; an answer of 1 to 3 tokens that its first word decides."""
    prompt = words(draw, vocabulary, draw.randint(150, 250))
    label = int(prompt.split(maxsplit=1)[0][1:]) % LABELS
    answer = [f"w{10 * label + place}" for place in range(1 + label % 3)]
    return {"prompt": prompt, "completion": " " + " ".join(answer)}


def chat(draw: random.Random, vocabulary: int) -> Row:
    """20 to 600 tokens, short ones more often; the second half or so is the answer."""
    size = round(math.exp(draw.uniform(math.log(20), math.log(600))))
    asked = max(round(size * draw.uniform(0.25, 0.75)), 1)
    answer = words(draw, vocabulary, max(size - asked - 1, 1))
    return {"prompt": words(draw, vocabulary, asked), "completion": " " + answer}


def long_text(draw: random.Random, vocabulary: int) -> Row:
    return {"text": words(draw, vocabulary, draw.randint(1900, 2040))}


def shared_prefix(draw: random.Random, vocabulary: int) -> Row:
    """The same 300 tokens, then 20 to 50 of an own prompt and as many of an answer."""
    system = words(random.Random("system"), vocabulary, SYSTEM)
    own, answer = (words(draw, vocabulary, draw.randint(20, 50)) for _ in range(2))
    return {"prompt": f"{system} {own}", "completion": f" {answer}"}


SMALL, MIDDLE, LARGE = 8192, 49152, 151936
WORKLOADS = {
    "a-8k": Workload("(a) classification, 8 k vocabulary", SMALL, classification, 8, 8),
    "a-49k": Workload("(a) classification, 49 k vocabulary", MIDDLE, classification, 8, 8),
    "a-150k": Workload("(a) classification, 150 k vocabulary", LARGE, classification, 8, 5),
    "b-8k": Workload("(b) chat, 8 k vocabulary", SMALL, chat, 8, 8),
    "b-49k": Workload("(b) chat, 49 k vocabulary", MIDDLE, chat, 8, 6),
    "c": Workload("(c) long text, 8 k vocabulary", SMALL, long_text, 1, 6),
    "c-49k": Workload("(c) long text, 49 k vocabulary", MIDDLE, long_text, 1, 6),
    "d": Workload("(d) a shared prompt of 300 tokens, 8 k vocabulary", SMALL, shared_prefix, 16, 5),
    "layers": Workload("(a), 8 k, the top 2 of 8 layers, 6 epochs", SMALL, classification, 8, 4, epochs=6, layers=2),
    "nf4": Workload("(a), 8 k, 4-bit NF4 weights", SMALL, classification, 8, 6, quantize="4bit"),
}


def write_model(folder: Path, vocabulary: int, blocks: int) -> None:
    """A Llama of 3.4 M weights a block with a tokenizer of `vocabulary` words; float32, random, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    parameters = written.get("rope_parameters") or {}
    written["rope_theta"] = parameters.get("rope_theta", 10000.0)  # as readers older than transformers 5 spell it
    (folder / "config.json").write_text(json.dumps(written, indent=1))
    write_tokenizer(folder, vocabulary)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"w{number}" for number in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)


def write_rows(folder: Path, workload: Workload) -> None:
    """train.jsonl; in others/ the held-out rows, and two short rows for who cannot do without a validation."""
    draw = random.Random(f"{workload.title} 0")
    (folder / "others").mkdir(parents=True, exist_ok=True)
    rows = [workload.rows(draw, workload.vocabulary) for _ in range(workload.count + workload.held)]
    short = [{name: " ".join(text.split()[:4]) for name, text in row.items()} for row in rows[:2]]
    parts = {TRAIN: rows[: workload.count], HELD: rows[workload.count :], SHORT: short}
    for name, part in parts.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def folders(root: Path, name: str, blocks: int) -> tuple[Path, Path]:
    """(model, data) of a workload below `root`."""
    return root / f"model-{WORKLOADS[name].vocabulary}-{blocks}", root / f"data-{name}"


def main() -> None:
    name, root, blocks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    model, data = folders(root, name, blocks)
    if not (model / "tokenizer.json").exists():
        write_model(model, WORKLOADS[name].vocabulary, blocks)
    write_rows(data, WORKLOADS[name])


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()

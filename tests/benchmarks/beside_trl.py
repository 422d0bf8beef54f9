"""DPO or ORPO here and by TRL's own trainer: the same pairs in the same order, float32, one process each.

python -m tests.benchmarks.beside_trl FOLDER ours && python -m tests.benchmarks.beside_trl FOLDER trl

The same with `orpo` at the end for ORPO. FOLDER gets a random Llama and what ours did; the second command prints both,
in seconds of the processor. Needs trl.

TRL's ORPO imitates the prompt too, and takes the mean over all tokens of a batch; the paper's formula, and this
trainer, have the answer alone and a mean for each pair. So its pairs here have prompts of one token, which nothing
predicts, and better answers of one length in each batch: then both are the same sum.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.rows import Example

STEPS, PAIRS, DISTINCT, PROMPT, ANSWERS = 20, 2, 8, 256, (24, 32)  # the last two in tokens
RATE, BETA, EPS = 4e-4, 0.1, 1e-6
LORA = {"r": 8, "lora_alpha": 16}


def examples(loss: str) -> list[Example]:
    """Each pair several times, so that the loss falls; for DPO long prompts and short answers, as in a chat."""
    rng, made = np.random.default_rng(0), []
    for row in range(DISTINCT):
        prompt = rng.integers(3, 8000, PROMPT if loss == "dpo" else 1)
        turned = row % 2 if loss == "dpo" else row // PAIRS % 2
        both = []
        for count in ANSWERS[:: 1 if turned else -1]:
            tokens = np.array([*prompt, *rng.integers(3, 8000, count)], np.int32)
            weights = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
            both.append(Example(tokens, weights, f"row {row}", "", "", len(prompt), len(tokens)))
        made.append(replace(both[0], rejected=both[1]))
    return [made[i % DISTINCT] for i in range(STEPS * PAIRS)]


def model(folder: Path) -> Path:
    from tests.tiny_models import tiny_llama

    size = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    path = folder / "model"
    more = {"num_key_value_heads": 6, "vocab_size": 8000, "max_position_embeddings": 1024}
    return path if path.exists() else tiny_llama(path, **size, **more)


def ours(folder: Path, loss: str) -> dict[str, Any]:
    from backends import registry
    from backends.interface import LoraSpec, ModelSpec, OptimSpec
    from finetune.evaluation.evaluate import base_weights
    from finetune.evaluation.pair_losses import DPO, ORPO
    from finetune.evaluation.pairs import referred, scored_pairs
    from finetune.events import result_of
    from finetune.training.objective import Preference

    spec = ModelSpec(model(folder), dtype="float32", device="cpu")
    live = registry.open_session("torch", spec, LoraSpec(LORA["r"], LORA["lora_alpha"]), OptimSpec(eps=EPS), 0)
    np.savez(folder / "start.npz", **live.get_state().adapter)
    rows, objective, told = examples(loss), Preference((DPO if loss == "dpo" else ORPO)(BETA)), []
    began = time.process_time()
    if loss == "dpo":
        with base_weights(live):
            rows = list(referred(rows, result_of(scored_pairs(live, rows, 4096, ""))))
    referring, began = time.process_time() - began, time.process_time()
    for first in range(0, len(rows), PAIRS):
        chosen = rows[first : first + PAIRS]
        micro = objective.batches(chosen, 4096, live.shares_prefixes)
        told.append(objective.step(live, chosen, micro, RATE).loss)
    return {"losses": told, "referring": referring, "training": time.process_time() - began}


def trl(folder: Path, loss: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    if loss == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

    class InOrder(Trainer):  # type: ignore[misc, valid-type]
        """Of rows that are tokens already, not shuffled."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return as_orpo_has_them(feature)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *rest: Any, **more: Any) -> None:
            self.began = time.process_time()

        def on_train_end(self, *rest: Any, **more: Any) -> None:
            self.seconds = time.process_time() - self.began

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    start = np.load(folder / "start.npz")
    leaves = sorted({name.rsplit(".", 2)[-2] for name in start})
    tuned = get_peft_model(base, LoraConfig(**LORA, target_modules=leaves))
    named = dict(tuned.named_parameters())
    with torch.no_grad():
        for name in start:
            named[f"base_model.model.{name}.default.weight"].copy_(torch.from_numpy(start[name]))
    of_dpo = {"precompute_ref_log_probs": True} if loss == "dpo" else {}
    config = Config(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=RATE,
        beta=BETA, lr_scheduler_type="constant", optim="adamw_torch", adam_epsilon=EPS, weight_decay=0.0,
        max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no",
        report_to="none", max_length=None if loss == "dpo" else 1024, disable_tqdm=True, **of_dpo,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    clock, began = Clock(), time.process_time()
    trainer = InOrder(
        model=tuned,
        args=config,
        train_dataset=Dataset.from_list(rows_of(loss)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    referring = time.process_time() - began
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    return {"losses": losses, "referring": referring, "training": clock.seconds}


def rows_of(loss: str) -> list[dict[str, Any]]:
    """The pairs as TRL takes them, in tokens."""
    rows = []
    for one in examples(loss):
        assert one.rejected is not None
        count = len(one.prompt_tokens)
        sides = {"prompt": one.tokens[:count], "chosen": one.tokens[count:], "rejected": one.rejected.tokens[count:]}
        texts = {} if loss == "dpo" else dict.fromkeys(sides, "tokens already")
        rows.append(texts | {f"{side}_ids": tokens.tolist() for side, tokens in sides.items()})
    return rows


def as_orpo_has_them(row: dict[str, Any]) -> dict[str, list[int]]:
    made = {}
    for side in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        labels = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
        made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}
    return made


def main(folder: Path, which: str, loss: str = "dpo") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if which == "ours":
        from tests.tiny_models import model_with_tokenizer

        model_with_tokenizer(folder / "tokenizer")
    told = {"ours": ours, "trl": trl}[which](folder, loss)
    told["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    file = folder / "ours.json"
    if which == "ours":
        file.write_text(json.dumps(told))
        return
    mine = json.loads(file.read_text())
    gap = max(abs(a - b) for a, b in zip(mine["losses"], told["losses"], strict=True))
    for name, one in (("ours", mine), ("TRL", told)):
        print(
            f"{name}: {one['training']:.1f} s, references {one['referring']:.1f} s, {one['peak_mib']:,.0f} MiB at most"
        )
    print(f"losses {mine['losses'][0]:.6f} to {mine['losses'][-1]:.6f}; at most {gap:.1e} apart")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""transformers' Trainer and TRL's SFTTrainer with PEFT, measured: `python worker_trainer.py TASK.json RESULT.json`.

settings: library (transformers or trl), dtype (float32 or bfloat16), quantize, and arguments for its configuration.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from meter import Meter, Task, mean_loss
from workloads import HELD, TRAIN, read_rows

IGNORED = -100


def arguments(task: Task, bf16: bool) -> dict[str, Any]:
    """TrainingArguments of both libraries: AdamW without decay, constant rate, no clipping, as everywhere."""
    values: dict[str, Any] = {
        "output_dir": task.scratch,
        "per_device_train_batch_size": task.batch_size,
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "bf16": bf16,
        "seed": task.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not _cuda(),
    }
    return values | dict(task.settings.get("arguments", {}))


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def load_model(task: Task) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, task.settings["dtype"])
    settings: dict[str, Any] = {"dtype": dtype}
    if task.settings.get("quantize") == "4bit":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(task.model, **settings)


def lora_config(task: Task) -> Any:
    from peft import LoraConfig

    top = list(range(task.blocks - task.layers, task.blocks)) if task.layers else None
    return LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        layers_to_transform=top,
        task_type="CAUSAL_LM",
    )


def encoded(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """input_ids and labels of every row, the prompt masked."""
    found = []
    for row in read_rows(path):
        prompt = tokenizer(row.get("prompt", ""), add_special_tokens=False)["input_ids"]
        answer = tokenizer(row.get("completion", row.get("text")), add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return found


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The plain collator: on the right, to the longest row."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def stacked(values: list[list[int]], filler: int) -> Any:
        return torch.tensor([one + [filler] * (width - len(one)) for one in values])

    return {
        "input_ids": stacked([row["input_ids"] for row in rows], 0),
        "attention_mask": stacked([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": stacked([row["labels"] for row in rows], IGNORED),
    }


def plain_trainer(task: Task, tokenizer: Any) -> Any:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(load_model(task), lora_config(task))
    chosen = TrainingArguments(**arguments(task, task.settings["dtype"] == "bfloat16"))
    return Trainer(
        model=model, args=chosen, data_collator=padded, train_dataset=encoded(Path(task.data) / TRAIN, tokenizer)
    )


def trl_trainer(task: Task, tokenizer: Any) -> Any:
    from datasets import Dataset

    trl = import_module("trl")
    chosen = trl.SFTConfig(
        **arguments(task, task.settings["dtype"] == "bfloat16") | {"max_length": task.longest, "dataset_num_proc": None}
    )
    return trl.SFTTrainer(
        model=load_model(task),
        args=chosen,
        train_dataset=Dataset.from_list(read_rows(Path(task.data) / TRAIN)),
        processing_class=tokenizer,
        peft_config=lora_config(task),
    )


def measured(trainer: Any, meter: Meter) -> None:
    """Train with a lap after every step; what is in a step's batch is read as the collator makes it."""
    from transformers import TrainerCallback

    batches: list[dict[str, int]] = []
    collate = trainer.data_collator

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        labels, mask = batch["labels"], batch["attention_mask"]
        batches.append(
            {
                "useful": int(mask.sum()),
                "supervised": int((labels[:, 1:] != IGNORED).sum()),
                "positions": mask.numel(),
            }
        )
        return batch

    class Laps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            meter.lap(**batches[state.global_step - 1])

        def on_log(self, _args: Any, state: Any, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                meter.steps[state.global_step - 1].loss = float(logs["loss"])

    trainer.data_collator = counting
    trainer.add_callback(Laps())
    trainer.train()
    meter.end()


def held_loss(trainer: Any, rows: list[dict[str, list[int]]]) -> float:
    """Computed as in training, one row at a time."""
    import torch

    model, found = trainer.model.eval(), []
    with torch.no_grad(), trainer.accelerator.autocast():
        for row in rows:
            batch = {name: values.to(model.device) for name, values in padded([row]).items()}
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1].float()
            targets = batch["labels"][0, 1:]
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
            found.append((float(loss), int((targets != IGNORED).sum())))
    return mean_loss(found)


def main() -> None:
    task = Task.read()
    meter = Meter(task)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    build = {"transformers": plain_trainer, "trl": trl_trainer}[task.settings["library"]]
    trainer = build(task, tokenizer)
    measured(trainer, meter)
    if lost := len(read_rows(Path(task.data) / TRAIN)) - len(trainer.train_dataset):
        meter.notes.append(f"{lost} rows were dropped")
    meter.write(held_loss=held_loss(trainer, encoded(Path(task.data) / HELD, tokenizer)))


if __name__ == "__main__":
    main()

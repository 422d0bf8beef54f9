"""mlx_lm.lora, measured: `python worker_mlx_lm.py TASK.json RESULT.json`. Its command's own path, defaults and all."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meter import Meter, Task, mean_loss
from workloads import HELD, TRAIN, read_rows


def options(task: Task) -> dict[str, Any]:
    """What the command line and its YAML file would say; AdamW corrected and without decay, as everywhere."""
    return {
        "model": task.model,
        "train": True,
        "data": task.data,
        "num_layers": task.layers or task.blocks,
        "batch_size": task.batch_size,
        "iters": task.steps,
        "seed": task.seed,
        "learning_rate": task.learning_rate,
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"weight_decay": 0.0, "bias_correction": True}},
        "lora_parameters": {"rank": task.rank, "dropout": 0.0, "scale": task.alpha / task.rank},
        "mask_prompt": "prompt" in read_rows(Path(task.data) / TRAIN)[0],
        "max_seq_length": task.longest + 1,
        "adapter_path": task.scratch,
        "steps_per_report": 1,  # the loss of every step; the value is computed in any case
        "grad_checkpoint": task.settings.get("grad_checkpoint", False),
    }


def _facts(batch: Any, lengths: Any) -> dict[str, int]:
    import numpy as np

    spans, width = np.array(lengths), batch.shape[1] - 1
    steps = np.arange(1, width + 1)
    trained = (steps >= spans[:, :1]) & (steps <= spans[:, 1:])  # the loss's own mask
    return {
        "useful": int(spans[:, 1].sum()),
        "supervised": int(trained.sum()),
        "padding": int((trained & (steps >= spans[:, 1:])).sum()),
        "positions": width * batch.shape[0],
    }


def held_loss(model: Any, rows: list[tuple[list[int], int]]) -> float:
    """One row at a time, so that no padding is in it."""
    import mlx.core as mx
    from mlx_lm.tuner.trainer import default_loss

    model.eval()
    found = (default_loss(model, mx.array([ids]), mx.array([[offset, len(ids)]])) for ids, offset in rows)
    return mean_loss((loss.item(), count.item()) for loss, count in found)


def main() -> None:
    task = Task.read()
    meter = Meter(task)
    from mlx_lm import lora
    from mlx_lm.tuner import trainer

    losses: list[float] = []
    trained: dict[str, Any] = {}
    last: dict[str, int] = {}

    class Losses(trainer.TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            losses.append(float(train_info["train_loss"]))

    def batches(**settings: Any) -> Iterator[Any]:
        for batch in trainer.iterate_batches(**settings):
            if last:
                meter.lap(**last)
            last.update(_facts(*batch))
            yield batch

    def train(**settings: Any) -> None:
        meter.begin()
        trainer.train(**settings | {"iterate_batches": batches, "training_callback": Losses()})
        meter.lap(**last)  # with the last step its adapter's file, a few MB
        meter.end()
        trained.update(model=settings["model"], data=settings["train_dataset"])

    lora.train = train
    lora.run(types.SimpleNamespace(**lora.CONFIG_DEFAULTS | options(task)))
    rows = [trained["data"]._data.process(row) for row in read_rows(Path(task.data) / HELD)]
    for step, loss in zip(meter.steps, losses, strict=True):
        step.loss = loss
    meter.write(held_loss=held_loss(trained["model"], rows))


if __name__ == "__main__":
    main()

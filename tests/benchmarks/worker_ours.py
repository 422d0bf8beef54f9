"""Ourselves, measured: `python worker_ours.py TASK.json RESULT.json`. A recipe, and the product's own trainer."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from meter import Meter, Task
from workloads import HELD, SHORT, TRAIN


def recipe_of(task: Task) -> Any:
    """No validation but of two short rows before the first step and after the last, outside the timed steps."""
    from finetune.recipe.schema import Recipe

    train, test, valid = (str(Path(task.data) / name) for name in (TRAIN, HELD, SHORT))
    settings = task.settings
    never = 10**9
    values: dict[str, Any] = {
        "model": {"path": task.model, "dtype": settings.get("dtype", "auto")},
        "data": {"train": train, "valid": valid, "test": test},
        "lora": {"rank": task.rank, "alpha": task.alpha, "layers": task.layers or "all"},
        "quantize": settings.get("quantize", "none"),
        "train": {
            "steps": task.steps,
            "batch_size": task.batch_size,
            "learning_rate": task.learning_rate,
            "schedule": "constant",
            "warmup": 0.0,
            "clip_norm": None,
            "max_length": task.longest,
            "checkpoint_every": never,
        }
        | settings.get("train", {}),
        "evaluate": {"every": never, "generate": False, "base": False},
        "seed": task.seed,
        "backend": settings["backend"],
        "output": task.scratch,
    }
    return Recipe.model_validate(values)


def use_mlx_products() -> None:
    """MLX's own matrix products in place of numpy's BLAS, which a CPU without Accelerate gets."""
    from backends.mlx_backend import blas_bridge

    _replace(blas_bridge, "ENABLED", False)


def keep_nothing_torch() -> None:
    """Every block computed in every step, also those below the first adapted one."""
    from backends.torch_backend.forward import Forward

    _replace(Forward, "keep_frozen_blocks", lambda *_: False)


def keep_nothing_mlx() -> None:
    from backends.mlx_backend import forward as mlx_forward

    _replace(mlx_forward, "frozen_blocks", lambda *_: 0)


def _replace(place: Any, name: str, value: Any) -> None:
    getattr(place, name)  # one that is no longer there is not silently left as it is
    setattr(place, name, value)


PATCHES = {
    "mlx-products": use_mlx_products,
    "keep-nothing-torch": keep_nothing_torch,
    "keep-nothing-mlx": keep_nothing_mlx,
}


def count_positions(session: Any) -> list[int]:
    """Tokens, padding counted, of every step from here on."""
    inner, found = session.step, []

    def step(micro: Any, lr: float) -> Any:
        found.append(sum(int(batch.inputs.size) for batch in micro))
        return inner(micro, lr)

    session.step = step
    return found


def main() -> None:
    task = Task.read()
    meter = Meter(task)
    for name in task.settings.get("patches", ()):
        PATCHES[name]()
    from finetune.disk.checkpoint import Checkpoints
    from finetune.evaluation.evaluate import evaluate
    from finetune.events import StepDone, Work
    from finetune.report.live_screen import with_progress
    from finetune.training.job import making_ready
    from finetune.training.loop import Trainer

    job = with_progress(making_ready(recipe_of(task)))
    session = job.open()
    positions = count_positions(session)
    trainer = Trainer(
        session=session,
        prepared=job.prepared,
        recipe=job.recipe,
        checkpoints=Checkpoints(Path(task.scratch), {}),
    )
    events = trainer.events()
    meter.begin()
    for event in events:
        if isinstance(event, StepDone):
            meter.lap(loss=event.loss, useful=event.useful_tokens, supervised=event.tokens, positions=positions[-1])
        else:
            meter.mark()
        if event.step == task.steps and isinstance(event, StepDone):
            break
    meter.end()
    work = Work(evaluate(session, job.prepared, job.prepared.held_out, name="held out", micro_tokens=4096))
    deque(work, maxlen=0)
    meter.write(held_loss=work.result.loss, scheme=session.scheme, device=session.device)


if __name__ == "__main__":
    main()

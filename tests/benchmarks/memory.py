"""Peak memory, predicted and measured, on random models: `python tests/benchmarks/memory.py [backend ...] [case ...]`.

Every case is a process of its own that loads a model, trains, evaluates and writes a checkpoint, as `finetune train`
does. What is counted is the resident set, forgotten between phases (Linux); what is predicted is its peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Case:
    """One configuration: a Llama, how it is held, and the rows of a step."""

    name: str
    vocab: int = 8192
    hidden: int = 512
    inner: int = 1408
    blocks: int = 8
    heads: int = 8
    keys: int = 4
    kept: str = "float32"  # the type of the file
    dtype: str = "float32"
    quantize: str = "none"
    checkpointing: bool = False
    rank: int = 8
    targets: tuple[str, ...] = ()
    layers: int | None = None
    whole: bool = False
    rows: int = 8
    length: int = 256
    steps: int = 2  # with rows of other lengths in each, if there are more than two: half of `length` and more
    supervised: int = 8  # tokens at the end of each row
    classes: int = 0  # of a head, which learns alone first
    answers: tuple[int, ...] = ()  # tokens of both answers to a prompt of `length`, learned by `loss`
    loss: str = "dpo"
    micro_tokens: int = 4096


BASE = Case("plain")
CASES = (
    BASE,
    replace(BASE, name="bfloat16", kept="bfloat16", dtype="bfloat16", rows=2, length=128, steps=8),
    replace(BASE, name="4-bit", quantize="4bit"),
    replace(BASE, name="large vocabulary, all supervised", vocab=49152, rows=4, supervised=255),
    replace(BASE, name="long rows", rows=2, length=2048, supervised=512),
    replace(BASE, name="checkpointing", checkpointing=True, rows=8),
    replace(BASE, name="wide and shallow", hidden=1024, inner=4096, blocks=6, heads=16, keys=16),
    replace(BASE, name="16 blocks, rank 64", blocks=16, rank=64),
    replace(BASE, name="top 2 blocks of 12", blocks=12, layers=2, rows=8),
    replace(BASE, name="queries and values only", targets=("q_proj", "v_proj"), rows=8),
    replace(BASE, name="full: plain", whole=True),
    replace(BASE, name="full: large vocabulary, all supervised", vocab=49152, rows=4, supervised=255, whole=True),
    replace(BASE, name="full: long rows", rows=2, length=2048, supervised=512, whole=True),
    replace(BASE, name="full: checkpointing", checkpointing=True, whole=True),
    replace(BASE, name="full: wide and shallow", hidden=1024, inner=4096, blocks=6, heads=16, keys=16, whole=True),
    replace(BASE, name="head: two labels", classes=2, supervised=1),
    replace(BASE, name="head: 77 labels, short rows", classes=77, supervised=1, rows=16, length=48),
    replace(BASE, name="head: large vocabulary", classes=2, supervised=1, vocab=49152),
    replace(BASE, name="pairs: DPO", answers=(64, 96)),
    replace(BASE, name="pairs: ORPO", answers=(64, 96), loss="orpo"),
    replace(BASE, name="pairs: short prompts", length=24, answers=(160, 200)),
    replace(BASE, name="pairs: large vocabulary", answers=(64, 96), vocab=49152, rows=4),
)
BACKENDS = ("torch", "mlx")
PHASES = ("start", "load", "read first", "first step", "steps", "evaluation", "checkpoint")


def write_model(case: Case, folder: Path) -> None:
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=case.inner, num_hidden_layers=case.blocks,
        num_attention_heads=case.heads, num_key_value_heads=case.keys, tie_word_embeddings=True,
        max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, case.kept)).save_pretrained(folder)


def examples(case: Case, step: int) -> Any:
    """Rows, or pairs whose better answer is now the longer and now the shorter one."""
    import numpy as np

    from finetune.data.rows import Example

    random = np.random.default_rng(step)
    if case.answers:
        return tuple(_pair(case, random, row) for row in range(case.rows))
    shortest = case.length if case.steps == 2 else case.length // 2
    lengths = (case.length, *random.integers(shortest, case.length, case.rows - 1, endpoint=True))
    made = tuple(
        Example(
            random.integers(0, case.vocab, length, np.int32),
            (np.arange(length) >= length - case.supervised).astype(np.float32),
            f"row {row}",
        )
        for row, length in enumerate(lengths)
    )
    for example in made if case.classes else ():
        example.tokens[-1] %= case.classes
    return made


def _pair(case: Case, random: Any, row: int) -> Any:
    import numpy as np

    from finetune.data.rows import Example

    prompt, both = random.integers(3, case.vocab, case.length), []
    for count in case.answers[:: 1 if row % 2 else -1]:
        tokens = np.array([*prompt, *random.integers(3, case.vocab, count)], np.int32)
        weights = (np.arange(len(tokens)) >= case.length).astype(np.float32)
        both.append(Example(tokens, weights, f"row {row}", "", "", case.length, len(tokens)))
    return replace(both[0], rejected=both[1])


def specs(case: Case, folder: Path) -> tuple[Any, Any]:
    from backends.interface import LoraSpec, ModelSpec

    model = ModelSpec(folder, case.quantize, case.dtype, case.checkpointing, "cpu")  # type: ignore[arg-type]
    return model, LoraSpec(
        case.rank, 16.0, targets=case.targets, layers=case.layers, classes=case.classes, whole=case.whole
    )


class Peaks:
    """The largest resident set of each phase, in bytes."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def end(self, phase: str) -> None:
        status = Path("/proc/self/status").read_text().splitlines()
        self.found[phase] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")


def child(case: Case, backend: str, folder: Path) -> dict[str, int]:
    """One run in this process."""
    import finetune.run  # noqa: F401  (all that `finetune train` has loaded by then)
    from backends import registry
    from backends.interface import OptimSpec
    from backends.model_folder import ModelFolder
    from finetune.data.tokenizer import load_tokenizer
    from finetune.disk import checkpoint
    from finetune.evaluation.pairs import scored_pairs
    from finetune.evaluation.scoring import row_losses
    from finetune.recipe.locate import builtin

    load_tokenizer(ModelFolder.open(builtin("builtin:reviews-base")))
    peaks, steps = Peaks(), [examples(case, step) for step in range(case.steps)]
    registry.choose(backend)
    peaks.end("start")
    session = registry.open_session(backend, *specs(case, folder), OptimSpec(), 0)
    peaks.end("load")
    objective, steps = read_first(case, session, steps)
    peaks.end("read first")
    for number, rows in enumerate(steps):
        objective.step(session, rows, objective.batches(rows, case.micro_tokens, session.shares_prefixes), 1e-3)
        if not number:
            peaks.end("first step")
    best = session.trained()
    peaks.end("steps")
    read = scored_pairs if case.answers else row_losses
    deque(read(session, steps[-1], case.micro_tokens, "loss"), maxlen=0)
    peaks.end("evaluation")
    with tempfile.TemporaryDirectory() as place:
        checkpoint.save(Path(place), checkpoint.Checkpoint(session.get_state(), {}, best, {}))
    peaks.end("checkpoint")
    return peaks.found


def read_first(case: Case, session: Any, steps: list[Any]) -> tuple[Any, list[Any]]:
    """What a step learns, and its rows, once all of them were read: for a head's states, or for references."""
    from finetune.evaluation.evaluate import base_weights
    from finetune.evaluation.pair_losses import DPO, ORPO
    from finetune.evaluation.pairs import referred, scored_pairs
    from finetune.evaluation.scoring import row_states
    from finetune.events import result_of
    from finetune.training.objective import Imitation, Preference

    if case.classes:
        result_of(row_states(session, [row for rows in steps for row in rows], case.micro_tokens, ""))
    if not case.answers:
        return Imitation(), steps
    if case.loss == "orpo":
        return Preference(ORPO(0.1)), steps
    with base_weights(session):
        scores = (result_of(scored_pairs(session, rows, case.micro_tokens, "")) for rows in steps)
        return Preference(DPO(0.1)), [referred(rows, found) for rows, found in zip(steps, scores, strict=True)]


def measured(case: Case, backend: str, folder: Path) -> dict[str, int]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), backend, str(folder)]
    done = subprocess.run(command, env=os.environ, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}, {backend}:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def predicted(case: Case, backend: str, folder: Path) -> float:
    """The peak in bytes, as `finetune plan` has it: nothing is loaded."""
    from backends import registry
    from backends.memory_plan import footprint, read_architecture
    from backends.model_folder import ModelFolder
    from finetune.data.pair_batches import as_one
    from finetune.training.sampled_steps import largest_micro

    model, lora = specs(case, folder)
    micro = largest_micro([*map(as_one, examples(case, 0))], case.rows, 0, case.micro_tokens)
    opened, costs = ModelFolder.open(folder), registry.costs(backend, "cpu")
    return footprint(read_architecture(opened), model, lora, opened.lora_modules(lora), micro, costs).peak


def main(backends: list[str]) -> None:
    """A table of megabytes: the predicted peak and the measured one, and each phase's.

    After the backends may stand what the names of the cases begin with.
    """
    named = [name for name in backends if name not in BACKENDS]
    backends = [name for name in backends if name in BACKENDS] or [*BACKENDS]
    print(f"{'':43}{'predicted':>10}{'measured':>10}{'ratio':>7} |" + "".join(f"{phase:>11}" for phase in PHASES))
    for case in (case for case in CASES if not named or case.name.startswith(tuple(named))):
        with tempfile.TemporaryDirectory() as place:
            write_model(case, Path(place))
            for backend in backends:
                expected, found = predicted(case, backend, Path(place)), measured(case, backend, Path(place))
                most = max(found.values())
                phases = "".join(f"{found[phase] / 1e6:11.0f}" for phase in PHASES)
                figures = f"{expected / 1e6:10.0f}{most / 1e6:10.0f}{expected / most:7.2f}"
                print(f"{backend:6} {case.name:36}{figures} |{phases}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        values = json.loads(sys.argv[2])
        values |= {name: tuple(values[name]) for name in ("targets", "answers")}
        print(json.dumps(child(Case(**values), sys.argv[3], Path(sys.argv[4]))))
    else:
        main(sys.argv[1:])

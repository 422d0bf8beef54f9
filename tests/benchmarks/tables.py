"""Figures of runs as tables: what each contender did, and ratios between ours and its rivals of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from contenders import ALL, Contender
from workloads import WORKLOADS

Run = dict[str, Any]


def timed(run: Run) -> list[dict[str, float]]:
    """The steps that count: all but the first, which the time to first step holds; of several epochs all steps."""
    steps: list[dict[str, float]] = run["steps"]
    return steps if WORKLOADS[run["workload"]].epochs > 1 else steps[1:]


def settled(run: Run) -> float:
    """CPU seconds for each token of the examples from the second epoch on."""
    steps = run["steps"][WORKLOADS[run["workload"]].steps :]
    return total(steps, "cpu") / total(steps, "useful")


def total(steps: Iterable[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps)


def cpu_per_token(run: Run) -> float:
    """CPU seconds for each token of the examples; over several epochs with what was done between the steps."""
    steps = timed(run)
    between = run["outside_cpu"] if WORKLOADS[run["workload"]].epochs > 1 else 0.0
    return (total(steps, "cpu") + between) / total(steps, "useful")


def tokens_per_second(run: Run) -> float:
    return total(timed(run), "useful") / total(timed(run), "wall")


def report(kept: dict[str, Any]) -> str:
    runs: list[Run] = kept["runs"]
    names = [name for name in WORKLOADS if any(run["workload"] == name for run in runs)]
    parts = [
        f"{kept['machine']}. Llama of {kept['blocks']} blocks, hidden size 512, random weights; LoRA of rank 8 on "
        "every linear layer. Medians, in brackets the least and the greatest. On Linux MLX's wheel computes with the "
        "reference BLAS, which no Mac does: there mlx_lm.lora and ours with its own products run with OpenBLAS.\n",
        ratios(runs, names),
        *(details(name, [run for run in runs if run["workload"] == name]) for name in names),
    ]
    return "\n".join(parts)


def ratios(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Ours against every rival of the same kind: speed as CPU seconds per useful token, and peak memory."""
    lines = [
        "| work | rival | ours | useful tokens per CPU second | peak memory | CPU seconds to the first step | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        done = [run for run in runs if run["workload"] == name and "failed" not in run]
        present = [one for one in ALL.values() if any(run["contender"] == one.key for run in done)]
        for rival in (one for one in present if not one.ours):
            for ours in (one for one in present if one.ours and one.kind == rival.kind):
                lines.append(_ratio_row(name, rival, ours, done))
                if WORKLOADS[name].epochs > 1:
                    lines.append(_ratio_row(name, rival, ours, done, settled))
    return "\n".join(lines) + "\n"


def _ratio_row(
    name: str, rival: Contender, ours: Contender, done: Sequence[Run], cost: Callable[[Run], float] = cpu_per_token
) -> str:
    pairs = [
        (a, b)
        for a in done
        for b in done
        if a["contender"] == ours.key and b["contender"] == rival.key and a["round"] == b["round"]
    ]
    cells = [
        _spread([cost(b) / cost(a) for a, b in pairs], "{:.2f}x"),
        _spread([a["peak"] / b["peak"] for a, b in pairs], "{:.2f}x"),
        _spread([a["first_step_cpu"] / b["first_step_cpu"] for a, b in pairs], "{:.2f}x"),
    ]
    place = f"{name}, after the first epoch" if cost is settled else name
    return f"| {place} | {rival.title} | {ours.title} | {' | '.join(cells)} | {len(pairs)} |"


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    middle, least, most = (form.format(value) for value in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


COLUMNS: tuple[tuple[str, str, Callable[[Run], float]], ...] = (
    ("CPU s / 1,000 tokens", "{:.2f}", lambda run: 1000 * cpu_per_token(run)),
    ("tokens / CPU s", "{:.0f}", lambda run: 1 / cpu_per_token(run)),
    ("tokens / s", "{:.0f}", tokens_per_second),
    ("peak MB", "{:.0f}", lambda run: run["peak"] / 1e6),
    ("in training MB", "{:.0f}", lambda run: run["training_peak"] / 1e6),
    ("first step s", "{:.1f}", lambda run: run["first_step_seconds"]),
    ("first step CPU s", "{:.1f}", lambda run: run["first_step_cpu"]),
    ("first loss", "{:.3f}", lambda run: run["steps"][0]["loss"]),
    ("loss reached", "{:.3f}", lambda run: run["held_loss"]),
    ("useful tokens / step", "{:.1f}", lambda run: total(run["steps"], "useful") / len(run["steps"])),
    ("supervised / step", "{:.1f}", lambda run: total(run["steps"], "supervised") / len(run["steps"])),
    ("computed / step", "{:.1f}", lambda run: total(run["steps"], "positions") / len(run["steps"])),
)


def details(name: str, runs: Sequence[Run]) -> str:
    """Medians of every contender on one workload, and who could not run."""
    workload = WORKLOADS[name]
    size = f"{workload.epochs * workload.steps} steps of {workload.batch_size} of {workload.count} rows"
    titles = " | ".join(title for title, _, _ in COLUMNS)
    lines = [f"### {workload.title}: {size}\n", f"| contender | {titles} |", "|---" * (1 + len(COLUMNS)) + "|"]
    notes = []
    for contender in ALL.values():
        own = [run for run in runs if run["contender"] == contender.key]
        done = [run for run in own if "failed" not in run]
        if done:
            cells = (form.format(median(map(value, done))) for _, form, value in COLUMNS)
            lines.append(f"| {contender.title} | {' | '.join(cells)} |")
        said = {run["failed"] for run in own if "failed" in run} | {note for run in done for note in run["notes"]}
        if padding := sum(total(run["steps"], "padding") for run in done):
            share = padding / sum(total(run["steps"], "supervised") for run in done)
            said.add(f"{share:.0%} of the positions that it trains are padding")
        notes += [f"{contender.title}: {one}" for one in sorted(said)]
    return "\n".join([*lines, *(f"\n{note}." for note in notes)]) + "\n"

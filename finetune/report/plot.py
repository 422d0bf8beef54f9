"""Loss curve and confusion pictures, and a sparkline for the terminal.

Colours are from Okabe and Ito (2008): people with any common colour blindness can tell them apart.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finetune.disk.atomic import write_file
from finetune.evaluation.intervals import worst_confusions
from finetune.evaluation.verdict import overfitting_verdict
from finetune.events import StepDone, Validated
from finetune.text import shorten

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
BLOCKS = "▁▂▃▄▅▆▇█"
MOST_LABELS = 20  # in a matrix with its numbers; with more labels only the most frequent confusions are shown
LONGEST_LABEL = 31  # characters
LONGEST_TITLE = 90
SMOOTHING = 0.1  # the running mean's window, as a share of all steps
WIDE = 20  # times; losses further apart are drawn on a logarithmic scale, where the end is not a flat line


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks, each the mean of its share of the values; a gap where no value is finite."""
    n = len(values)
    columns = min(n, width)
    means = []
    for i in range(columns):
        finite = [v for v in values[i * n // columns : (i + 1) * n // columns] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    heights = [mean for mean in means if math.isfinite(mean)]
    low, span = (min(heights), max(heights) - min(heights)) if heights else (0.0, 0.0)
    top = len(BLOCKS) - 1
    return "".join(
        " " if math.isnan(mean) else BLOCKS[min(round((mean - low) / span * top), top) if span else 0] for mean in means
    )


def smooth(losses: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
    """The centred running mean over SMOOTHING of the steps, weighted by tokens. [n] -> [n]"""
    loss, weight = np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    reach = math.ceil(len(loss) * SMOOTHING / 2)
    total = np.concatenate([[0.0], np.cumsum(loss * weight)])
    count = np.concatenate([[0.0], np.cumsum(weight)])
    start = np.maximum(np.arange(len(loss)) - reach, 0)
    stop = np.minimum(np.arange(len(loss)) + reach + 1, len(loss))
    mean: NDArray[np.float64] = (total[stop] - total[start]) / np.maximum(count[stop] - count[start], 1e-12)
    return mean


def loss_plot(
    steps: Sequence[StepDone],
    validations: Sequence[Validated],
    path: Path,
    title: str = "",
    chance: float | None = None,
) -> None:
    """Training and validation loss against steps, epochs on top, the best validation marked. Writes a PNG.

    chance: the loss of one who knows the labels alone and takes each for as likely as the others.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _training_curve(axes, steps)
    _validation_curve(axes, validations)
    if chance is not None:
        axes.axhline(chance, color=GREY, linewidth=1.2, linestyle="--", label=f"chance: {chance:.4g}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    losses = [loss for loss in (*(s.loss for s in steps), *(v.loss for v in validations), chance or 0) if loss > 0]
    if losses and max(losses) > WIDE * min(losses):
        axes.set_yscale("log")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines["right"].set_visible(False)
    _epochs_on_top(axes, [*steps, *validations])
    if title:
        figure.suptitle(shorten(title, LONGEST_TITLE), parse_math=False)
    if steps or validations:
        figure.legend(frameon=False, loc="outside right upper")
    _save(figure, path)


def _training_curve(axes: Any, steps: Sequence[StepDone]) -> None:
    if not steps:
        return
    numbers, loss = [event.step for event in steps], [event.loss for event in steps]
    axes.plot(numbers, loss, color=BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
    mean = smooth(loss, [event.tokens for event in steps])
    axes.plot(numbers, mean, color=BLUE, linewidth=1.8, label="training, running mean")


def _validation_curve(axes: Any, validations: Sequence[Validated]) -> None:
    if not validations:
        return
    numbers, loss = [event.step for event in validations], [event.loss for event in validations]
    best = min(validations, key=lambda event: event.loss)
    axes.plot(numbers, loss, color=ORANGE, linewidth=1.8, marker="o", markersize=4, label="validation")
    label = f"best: {best.loss:.4g} at step {best.step}"
    star = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "linestyle": "none", "zorder": 5}
    axes.plot([best.step], [best.loss], color=ORANGE, label=label, **star)
    if overfitting_verdict(validations).verdict == "overfitting":
        axes.axvspan(best.step, numbers[-1], color=GREY, alpha=0.12, linewidth=0, label="overfitting", zorder=0)


def _epochs_on_top(axes: Any, events: Sequence[StepDone | Validated]) -> None:
    last = max(events, key=lambda event: event.step, default=None)
    if last is None or last.step == 0 or last.epoch <= 0:
        axes.spines["top"].set_visible(False)
        return
    per_epoch = last.step / last.epoch
    top = axes.secondary_xaxis("top", functions=(lambda step: step / per_epoch, lambda epoch: epoch * per_epoch))
    top.set_xlabel("epoch")


def confusion_plot(matrix: ArrayLike, labels: Sequence[str], path: Path) -> None:
    """Which label was taken for which ([k, k], rows are the truth). Writes a PNG.

    Up to MOST_LABELS labels it is the matrix with its numbers; with more labels, the most frequent confusions.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(matrix, dtype=np.int64)
    names = [shorten(label, LONGEST_LABEL) for label in labels]
    if len(names) <= MOST_LABELS:
        size = 2.5 + 0.55 * max(len(names), 3)
        figure = Figure(figsize=(size + 0.8, size), layout="constrained")
        _matrix(figure, counts, names)
    else:
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        _worst_pairs(figure, counts, names)
    _save(figure, path)


def _matrix(figure: Any, counts: NDArray[np.int64], names: Sequence[str]) -> None:
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # [k, k]
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for (i, j), count in np.ndenumerate(counts):
        ink = "white" if shares[i, j] > 0.55 else "black" if count else "#999999"
        axes.text(j, i, str(count), ha="center", va="center", color=ink, fontsize=9)
    crowded = len(names) > 3 or max(map(len, names), default=0) > 10
    axes.set_xticks(range(len(names)), names, parse_math=False, rotation=90 if crowded else 0)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, label="share of the true label's rows", shrink=0.8)


def _worst_pairs(figure: Any, counts: NDArray[np.int64], names: Sequence[str]) -> None:
    axes = figure.add_subplot()
    worst = worst_confusions(counts, MOST_LABELS)
    bars = axes.barh(range(len(worst)), [rows for _, _, rows in worst], color=BLUE)
    axes.bar_label(bars, [f"{rows} of {counts[true].sum()}" for true, _, rows in worst], padding=3)
    pairs = [f"{names[true]}  →  {names[predicted]}" for true, predicted, _ in worst]
    axes.set_yticks(range(len(worst)), pairs, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("rows")
    wrong = counts.sum() - np.trace(counts)
    figure.suptitle(f"{wrong} of {counts.sum()} rows wrong; the most frequent confusions, true → predicted")


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; the tables show the label in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150, format="png")
    write_file(path, picture.getvalue())

"""The pictures hold what they say, without a warning, whatever a run's length and its labels."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from finetune.events import StepDone, Validated
from finetune.report.plot import (
    BLOCKS,
    LONGEST_LABEL,
    LONGEST_TITLE,
    MOST_LABELS,
    confusion_plot,
    loss_plot,
    smooth,
    sparkline,
)
from finetune.report.summary import _chance


def steps(n: int) -> list[StepDone]:
    losses = np.random.default_rng(0).gamma(4.0, 0.2, size=n)
    return [StepDone(i + 1, (i + 1) / 20, float(loss), 1.0, 1e-3, 8, 80, 0.1, 1) for i, loss in enumerate(losses)]


def validations(*losses: float) -> list[Validated]:
    return [
        Validated(20 * i, float(i), 1.0 / i if i else None, loss, 2.0, 0.5, None, False, 1.0)
        for i, loss in enumerate(losses)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the PNG's own header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_loss_plot_shows_every_curve_and_the_best(tmp_path, drawn):
    loss_plot(steps(80), validations(2.0, 0.9, 0.8, 1.0, 1.4), tmp_path / "loss.png")
    assert size(tmp_path / "loss.png")[0] >= 1000
    axes = drawn[0].axes[0]
    raw, mean, validation, best = axes.lines
    assert list(raw.get_ydata()) == [one.loss for one in steps(80)]
    assert np.ptp(mean.get_ydata()) < np.ptp(raw.get_ydata())
    assert list(validation.get_ydata()) == [2.0, 0.9, 0.8, 1.0, 1.4]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (40, 0.8)
    assert legend(drawn[0])[-2:] == ["best: 0.8 at step 40", "overfitting"]
    (region,) = axes.patches
    assert (region.get_x(), region.get_x() + region.get_width()) == (40, 80)


@pytest.mark.parametrize("title", ["run-1: loss of smollm2", "a $_{bad$ name", "x" * 500])
def test_the_loss_plot_has_a_title_and_the_line_of_chance(tmp_path, drawn, title):
    loss_plot(steps(80), validations(2.0, 0.9), tmp_path / "loss.png", title, 0.6931)
    shown = drawn[0].get_suptitle()
    assert shown == title if len(title) <= LONGEST_TITLE else len(shown) <= LONGEST_TITLE
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("chance")]
    assert set(line.get_ydata()) == {0.6931}
    assert "chance: 0.6931" in legend(drawn[0])


@pytest.mark.parametrize(("labels", "rows", "tokens", "expected"), [
    (2, 10, 10, np.log(2)), (2, 10, 20, np.log(2) / 2), (77, 4, 12, np.log(77) / 3), (0, 10, 10, None),
])  # fmt: skip
def test_chance_is_of_the_labels(labels, rows, tokens, expected):
    tuned = SimpleNamespace(labels=("x",) * labels, rows=rows, tokens=tokens)
    assert _chance(tuned) == (None if expected is None else pytest.approx(expected))


def test_epochs_stand_above_their_steps(tmp_path, drawn):
    loss_plot(steps(80), validations(2.0, 1.0), tmp_path / "loss.png")
    (top,) = drawn[0].axes[0].child_axes
    low, high = drawn[0].axes[0].get_xlim()
    assert top.get_xlim() == pytest.approx((low / 20, high / 20))


def test_no_region_without_overfitting(tmp_path, drawn):
    loss_plot(steps(60), validations(2.0, 1.5, 1.2), tmp_path / "loss.png")
    assert not drawn[0].axes[0].patches and "overfitting" not in legend(drawn[0])


@pytest.mark.parametrize(("n", "losses"), [(0, ()), (0, (1.0,)), (1, ()), (1, (1.0,)), (3, (1.0, 1.0)), (2000, (2.0,))])
def test_loss_plot_of_any_length(tmp_path, n, losses):
    loss_plot(steps(n), validations(*losses), tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (1425, 675)


def test_confusion_matrix_shows_counts_with_the_truth_in_rows(tmp_path, drawn):
    confusion_plot([[8, 2], [1, 9]], ["negative", "positive"], tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "8", (1, 0): "2", (0, 1): "1", (1, 1): "9",
    }  # fmt: skip
    assert axes.get_ylabel() == "true" and axes.get_xlabel() == "predicted"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["negative", "positive"]
    assert axes.images[0].get_array().tolist() == [[0.8, 0.2], [0.1, 0.9]]


def test_many_labels_show_the_worst_pairs(tmp_path, drawn):
    matrix = 5 * np.eye(77, dtype=np.int64)
    matrix[3, 4], matrix[10, 2] = 9, 7
    confusion_plot(matrix, [f"label {i}" for i in range(77)], tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["label 3  →  label 4", "label 10  →  label 2"]
    assert [bar.get_width() for bar in axes.patches] == [9, 7]
    assert [text.get_text() for text in axes.texts] == ["9 of 14", "7 of 12"]


@pytest.mark.parametrize("k", [1, 2, MOST_LABELS, MOST_LABELS + 1, 150])
@pytest.mark.parametrize("errors", [0, 3])
def test_confusions_of_any_number_of_labels(tmp_path, k, errors):
    matrix = np.full((k, k), errors) + np.eye(k, dtype=np.int64)
    confusion_plot(matrix, [f"a rather long name of the label number {i}" for i in range(k)], tmp_path / "c.png")
    assert min(size(tmp_path / "c.png")) >= 300


def test_labels_are_text_and_nothing_else(tmp_path, drawn):
    labels = ["$x_{$", "日本語", "two\nlines", "_hidden", "", "x" * 80]
    confusion_plot(np.eye(6, dtype=np.int64), labels, tmp_path / "confusion.png")
    shown = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert shown[:5] == ["$x_{$", "日本語", "two lines", "_hidden", ""]
    assert len(shown[5]) == LONGEST_LABEL and " ... " in shown[5]


def test_long_labels_keep_both_ends_apart(tmp_path, drawn):
    labels = [f"{end}_card_payment_fee_was_charged_twice_{end}" for end in "ab"]
    confusion_plot([[1, 0], [0, 1]], labels, tmp_path / "confusion.png")
    one, other = (text.get_text() for text in drawn[0].axes[0].get_yticklabels())
    assert one[0] == one[-1] == "a" and other[0] == other[-1] == "b"


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=80))
def test_the_running_mean_is_a_mean_over_neighbours(rows):
    losses, tokens = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = smooth(losses, tokens)
    reach = math.ceil(len(rows) * 0.05)
    for i, mean in enumerate(found):
        near = slice(max(i - reach, 0), i + reach + 1)
        assert mean == pytest.approx(np.average(losses[near], weights=tokens[near]), abs=1e-6)


def test_sparkline_follows_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([7, 7, 0, 0], 2) == "█▁"
    assert sparkline([1, 2, 3], 10) == "▁▅█"
    assert sparkline([5, 5, 5], 3) == "▁▁▁"
    assert sparkline([1, math.nan, math.inf, 3], 4) == "▁  █"
    assert sparkline([], 5) == "" and sparkline([1.0], 0) == "" and sparkline([math.nan], 3) == " "


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60), st.integers(0, 40))
def test_sparkline_has_a_block_a_column(values, width):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set(BLOCKS + " ")

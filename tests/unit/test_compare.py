"""`compare`: finished runs on the terminal, as JSON and as a page; and measured anew where their rows differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.commands import compare
from finetune.commands import report as report_command
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import Incompatible
from finetune.recipe.load import check_recipe
from tests.unit.toy_run import load_job, run_to_report

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    return model_with_tokenizer(tmp_path_factory.mktemp("model"))


def write(file: Path, first: int, count: int) -> str:
    words = {"positive": "a fine good warm film", "negative": "a dull bad cold film"}
    labels = ["positive", "negative"]
    lines = [{"text": f"{words[labels[i % 2]]} {i}", "label": labels[i % 2]} for i in range(first, first + count)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on the reference backend: two of the same rows, and one whose test rows are partly training rows of them."""
    folder = tmp_path_factory.mktemp("work")
    files = {name: write(folder / f"{name}.jsonl", *rows) for name, rows in
             {"train": (0, 18), "test": (50, 9), "other": (12, 12)}.items()}  # fmt: skip

    def run(name: str, test: str, **sections: object) -> Path:
        values = {
            "model": {"path": str(model)},
            "data": {"train": files["train"], "test": files[test]},
            "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]},
            "train": {"epochs": 2, "batch_size": 4, "learning_rate": 0.02},
            "backend": "reference",
            "output": str(folder / "runs"),
        }
        job = load_job(check_recipe(values | sections))
        made = create(job.recipe, name)
        run_to_report(job, made)
        return made.path

    return {
        "first": run("first", "test"),
        "second": run("second", "test", seed=3, train={"epochs": 1, "batch_size": 4, "learning_rate": 0.01}),
        "other": run("other", "other"),
    }


def compare_them(*paths: Path, **options: object) -> dict:
    settings = {"measure": False, "data": None, "html": None, "rows": True, "backend": None} | options
    compare.run(paths, **settings)  # type: ignore[arg-type]
    page = settings["html"] or paths[-1] / "compare.html"
    assert isinstance(page, Path) and page.read_text().startswith("<!doctype html>")
    values: dict = json.loads(page.with_suffix(".json").read_text())
    return values


def test_a_run_has_its_page_and_report_writes_the_same(made: dict[str, Path]) -> None:
    page = (made["first"] / "report.html").read_bytes()
    assert page.startswith(b"<!doctype html>")
    report_command.run(made["first"], None, rows=True)
    assert (made["first"] / "report.html").read_bytes() == page


def test_two_runs_are_compared(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = compare_them(made["first"], made["second"], html=tmp_path / "page.html")
    assert [run["name"] for run in values["runs"]] == [made["first"].name, made["second"].name]
    assert [one["what"] for one in values["steps"][0]["changes"]] == [
        "train.epochs", "train.learning_rate", "seed", "train rows, drawn by the seed", "valid rows, drawn by the seed"
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.startswith(values["verdict"][:40]) and "train.epochs: 2 -> 1" in shown


def test_the_same_run_twice_changes_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    values = compare_them(made["first"], made["first"], html=tmp_path / "page.html")
    assert values["verdict"].startswith("No change: ")
    for shift in [values["steps"][0]["errors"], *(line["shifts"][0] for line in values["kinds"])]:
        assert (shift["fixed"], shift["new"], shift["p_value"]) == ([], [], 1.0)
    assert values["steps"][0]["changes"] == []


def test_other_rows_are_refused_and_nothing_is_written(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="--measure"):
        compare_them(made["first"], made["other"], html=tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_measured_anew_on_the_rows_of_the_first(made: dict[str, Path], tmp_path: Path) -> None:
    """The figures of a run's own rows stay; the other is measured on them too."""
    values = compare_them(made["first"], made["other"], measure=True, html=tmp_path / "page.html")
    report = json.loads((made["first"] / "report.json").read_text())
    assert values["rows"] == 9 and values["runs"][0]["value"] == report["tuned"]["accuracy"]
    assert values["notes"] == []


def test_rows_that_the_other_run_was_trained_on_are_left_out(made: dict[str, Path], tmp_path: Path) -> None:
    values = compare_them(made["other"], made["first"], measure=True, html=tmp_path / "page.html")
    (note,) = values["notes"]
    left_out = int(note.split()[0])
    assert note == f"{left_out} rows that {made['first'].name} was trained on are left out."
    assert values["rows"] == 12 - left_out and 4 <= left_out <= 6  # two of the 18 were set apart, and not trained on


def test_measured_anew_on_a_file(made: dict[str, Path], tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", 200, 8)
    values = compare_them(made["first"], made["other"], data=rows, html=tmp_path / "page.html")
    assert values["rows"] == 8


def test_where_training_rows_are_gone_it_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(made["first"], tmp_path / "moved"))
    text = RunFolder(moved).recipe.read_text()
    RunFolder(moved).recipe.write_text(text.replace("train.jsonl", "gone.jsonl"))
    values = compare_them(made["other"], moved, measure=True, html=tmp_path / "page.html")
    assert values["rows"] == 12 and values["notes"][0].startswith("Not checked whether moved was trained on")


def test_where_training_rows_are_others_now_it_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(made["first"], tmp_path / "moved"))
    rows = write(tmp_path / "train.jsonl", 300, 18)
    text = RunFolder(moved).recipe.read_text()
    train = next(line for line in text.splitlines() if line.startswith("  train: "))
    RunFolder(moved).recipe.write_text(text.replace(train, f"  train: {rows}"))
    values = compare_them(made["other"], moved, measure=True, html=tmp_path / "page.html")
    assert values["notes"][0].endswith("its training rows have changed since.")


def test_runs_that_read_rows_otherwise_are_not_measured_on_tokens(made: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(made["other"], tmp_path / "other"))
    identity = json.loads((other / "identity.json").read_text())
    (other / "identity.json").write_text(json.dumps(identity | {"prompt.template": "plain"}))
    with pytest.raises(Incompatible, match=r"prompt\.template.*\n.*--data"):
        compare_them(made["first"], other, measure=True, html=tmp_path / "page.html")


def test_without_rows_neither_page_nor_figures_have_texts(made: dict[str, Path], tmp_path: Path) -> None:
    compare_them(made["first"], made["second"], rows=False, html=tmp_path / "page.html")
    for file in (tmp_path / "page.html", tmp_path / "page.json"):
        text = file.read_text()
        assert "film" not in text and "positive" not in text and str(made["first"].parent) not in text

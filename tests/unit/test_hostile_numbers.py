"""Numbers of a model's files that no model has, and models whose positions end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import load, save

from backends.interface import BackendError, LoraSpec
from backends.model_folder import ModelFolder
from finetune.data.tokenizer import stop_tokens
from finetune.errors import DataError, EnvironmentProblem, RecipeError
from finetune.training import job
from tests.unit.hostile import CONFIG, header_of, model, model_bytes, refused, with_header

POSITIONS: dict[str, tuple[str, int, dict[str, Any], int | None]] = {
    "OPT, two more than its config says": (
        "model.decoder.embed_positions.weight", 30, {"max_position_embeddings": 28}, 28,
    ),
    "GPT-2": ("transformer.wpe.weight", 24, {"n_positions": 24}, 24),
    "GPT-2 that says nothing": ("transformer.wpe.weight", 24, {}, 24),
    "a config that claims too much": ("transformer.wpe.weight", 24, {"max_position_embeddings": 4096}, 24),
    "BERT": ("bert.embeddings.position_embeddings.weight", 16, {"max_position_embeddings": 16}, 16),
    "GPT": ("transformer.positions_embed.weight", 20, {"n_positions": 20}, 20),
    "computed": ("model.norm.weight", 8, {"max_position_embeddings": 16}, None),
}  # fmt: skip


def opened(folder: Path, tensor: str, rows: int, settings: dict[str, Any]) -> ModelFolder:
    tensors = load(model_bytes()) | {tensor: np.zeros((rows, 8), np.float32)}
    return ModelFolder.open(model(folder, CONFIG | settings, save(tensors)))


@pytest.mark.parametrize("kind", POSITIONS)
def test_learned_positions_are_counted(tmp_path: Path, kind: str) -> None:
    *made, expected = POSITIONS[kind]
    assert opened(tmp_path / "model", *made).positions == expected


def _check(
    folder: ModelFolder, lengths: list[int], task: str = "text", max_tokens: int = 8, generate: bool = True
) -> None:
    class Row(list[int]):
        location = "rows.jsonl:7"

        @property
        def prompt_tokens(self) -> list[int]:
            return self[:-2]

    split = SimpleNamespace(examples=[Row(range(length)) for length in lengths])
    prepared = SimpleNamespace(splits=[split], held_out=split, task=task)
    evaluate = SimpleNamespace(generate=generate, max_tokens=max_tokens)
    setup = SimpleNamespace(folder=folder, recipe=SimpleNamespace(evaluate=evaluate))
    job._check_positions(cast(Any, setup), cast(Any, prepared))


def test_a_row_beyond_the_positions_ends_before_training(tmp_path: Path) -> None:
    folder = opened(tmp_path / "model", "transformer.wpe.weight", 24, {})
    _check(folder, [3, 24])
    with pytest.raises(RecipeError, match=r"rows\.jsonl:7: 25 tokens.* has 24 positions; set train\.max_length: 24"):
        _check(folder, [3, 25])


def test_an_answer_beyond_the_positions_ends_before_training(tmp_path: Path) -> None:
    folder = opened(tmp_path / "model", "transformer.wpe.weight", 24, {})
    _check(folder, [18], "generation")
    _check(folder, [19], "generation", generate=False)
    _check(folder, [19], "classification")
    with pytest.raises(RecipeError, match=r"evaluate\.max_tokens: 8, after a prompt of 17 tokens"):
        _check(folder, [19], "generation")


def test_an_answer_has_the_room_that_the_positions_leave(tmp_path: Path) -> None:
    setup = SimpleNamespace(folder=opened(tmp_path / "model", "transformer.wpe.weight", 24, {}))
    assert [job.room_for_answer(cast(Any, setup), prompt, 8) for prompt in (3, 16, 17, 23)] == [8, 8, 7, 1]
    with pytest.raises(DataError, match=r"the prompt has 24 tokens, .* has 24 positions; shorten it"):
        job.room_for_answer(cast(Any, setup), 24, 8)
    computed = SimpleNamespace(folder=ModelFolder.open(model(tmp_path / "computed")))
    assert job.room_for_answer(cast(Any, computed), 10**6, 8) == 8


def test_computed_positions_have_no_end(tmp_path: Path) -> None:
    _check(ModelFolder.open(model(tmp_path / "model")), [100_000], "generation")


SCALED = {
    "yarn over its own context": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 32),
    "scaled before it was written": (
        {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 4}, 16,
    ),
    "a factor that is none": ({"rope_type": "linear", "factor": "two"}, 16),
    "a factor without end": ({"rope_type": "linear", "factor": 1e300}, 16),
    "none": (None, 16),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_rows_beyond_the_context_are_reported(tmp_path: Path, kind: str) -> None:
    scaling, context = SCALED[kind]
    settings = {"max_position_embeddings": 16, "rope_scaling": scaling}
    folder = ModelFolder.open(model(tmp_path / "model", {**CONFIG, "rope_parameters": None, **settings}))
    assert folder.context == context
    told = [job.beyond_context(folder, _rows([context, context + n])) or "" for n in (0, 1)]
    assert told[0] == ""
    assert told[1].startswith(f"1 row longer than the {context} tokens of the model's context")


@pytest.mark.parametrize("stated", [None, 0, -3])
def test_a_context_that_nothing_says_is_no_bound(tmp_path: Path, stated: Any) -> None:
    folder = ModelFolder.open(model(tmp_path / "model", CONFIG | {"max_position_embeddings": stated}))
    assert folder.context is None
    assert job.beyond_context(folder, _rows([10**6])) is None


def _rows(lengths: list[int]) -> Any:
    return SimpleNamespace(splits=[SimpleNamespace(examples=[range(length) for length in lengths])])


@pytest.mark.parametrize("rank", [9, 100, 2**16, 10**7])
def test_a_rank_is_no_greater_than_the_layers(tmp_path: Path, rank: int) -> None:
    folder = ModelFolder.open(model(tmp_path / "model"))
    assert folder.lora_modules(LoraSpec(8, 4.0))
    with pytest.raises(BackendError, match=r"lora\.rank .* its largest layer is 8 wide; lower it"):
        folder.lora_modules(LoraSpec(rank, 4.0))


@pytest.mark.parametrize("listed", [10**30, -1, [3, 2**31], [2, -5], [10**400], "text", True, [[2]]], ids=str)
def test_an_end_token_that_no_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: Any) -> None:
    monkeypatch.setattr("finetune.data.tokenizer.end_of_turn", lambda tokenizer: None)
    tokenizer = SimpleNamespace(eos_token_id=1, name_or_path=str(tmp_path))
    file = tmp_path / "generation_config.json"
    for taken, expected in (([5, 6], {1, 5, 6}), (7, {1, 7}), (None, {1})):
        file.write_text(json.dumps({"eos_token_id": taken}))
        assert stop_tokens(tokenizer) == expected
    file.write_text(json.dumps({"eos_token_id": listed}))
    with pytest.raises(EnvironmentProblem, match=r"generation_config\.json: eos_token_id holds what is not the number"):
        stop_tokens(tokenizer)


@pytest.mark.parametrize("value", [True, 1, "yes", [1]], ids=str)
@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states", "torchscript"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_config_that_changes_what_the_model_gives(tmp_path: Path, key: str, value: Any, nested: bool) -> None:
    settings = {"text_config": CONFIG | {key: value}} if nested else {key: value}
    with pytest.raises(BackendError, match=f"config.json says {key}: .* changes what the model gives; remove it"):
        ModelFolder.open(model(tmp_path / "model", CONFIG | settings))
    for usual in (False, None):
        ModelFolder.open(model(tmp_path / "model", CONFIG | {key: usual, "return_dict": True}))


@pytest.mark.parametrize("key", ["return_dict", "use_return_dict"])
def test_a_config_that_gives_tuples(tmp_path: Path, key: str) -> None:
    with pytest.raises(BackendError, match=f"config.json says {key}: False"):
        ModelFolder.open(model(tmp_path / "model", CONFIG | {key: False}))


@pytest.mark.parametrize("claimed", [True, False], ids=["its header claims it", "its header knows nothing of it"])
def test_weights_of_a_terabyte_in_a_sparse_file(tmp_path: Path, claimed: bool) -> None:
    folder, size = model(tmp_path / "model"), 2**40
    header, _ = header_of(model_bytes())
    if claimed:
        end = max(one["data_offsets"][1] for one in header.values())
        header["model.far.weight"] = {"dtype": "F32", "shape": [size // 4, 1], "data_offsets": [end, end + size]}
        size += end
    file = folder / "model.safetensors"
    file.write_bytes(with_header(header, b""))
    with file.open("r+b") as opened_file:
        opened_file.truncate(file.stat().st_size + size)
    message = refused(ModelFolder.open, folder) or ""
    assert "model.safetensors" in message

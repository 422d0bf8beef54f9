"""Models, adapters, checkpoints and recipes that mean harm: refused in 2 s and 512 MB, and nothing of them is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec
from backends.model_folder import ModelFolder
from finetune.data.tokenizer import encode_prompt, load_tokenizer, stop_tokens
from finetune.disk import checkpoint as checkpoints
from finetune.disk.adapter import check_base, read_adapter
from tests.unit.hostile import (
    CONFIG,
    damaged_json,
    damaged_tensors,
    header_of,
    model,
    model_bytes,
    no_network,  # noqa: F401
    refused,
    with_header,
)

ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", "auto_mapping": None,
    "fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}, "finetune": {"base_fingerprint": "x"},
}  # fmt: skip
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "added_tokens": [{"id": 5, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": [["a", "b"], ["ab", "c"]]},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "model_max_length": 64,
    "tokenizer_file": None, "chat_template": None, "added_tokens_decoder": {},
}  # fmt: skip
quick_and_slow = pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.slow)])


@pytest.fixture(scope="module", autouse=True)
def _libraries_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before any bound on memory: libraries take address space of their own when they are first used."""
    folder = tokenizer_folder(tmp_path_factory.mktemp("first"))
    use_tokenizer(folder)
    registry.open_session("reference", ModelSpec(folder), LoraSpec(2, 4.0), OptimSpec(), 0)


def lora_modules(folder: Path) -> dict[str, tuple[int, int]]:
    return ModelFolder.open(folder).lora_modules(LoraSpec(2, 4.0))


def accepted_by_the_library(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False


@quick_and_slow
def test_damaged_weights_are_refused_exactly_where_the_library_refuses_them(tmp_path: Path, times: int) -> None:
    rng, weights = random.Random(1), model_bytes()
    taken = 0
    for _ in range(160 * times):
        folder = model(tmp_path / "m", weights=damaged_tensors(rng, weights))
        message = refused(lora_modules, folder)
        if not accepted_by_the_library(folder / "model.safetensors"):
            assert message is not None
            assert "model.safetensors" in message
        taken += message is None
    assert taken < 40 * times  # a flipped bit in a name or between two floats is no harm


def lies() -> dict[str, bytes]:
    header, body = header_of(model_bytes())
    name = next(iter(header))
    text = json.dumps(header)
    far = {**header, name: {**header[name], "data_offsets": [0, 10**12]}}
    over = {
        **header,
        name: {**header[name], "data_offsets": next(v for k, v in header.items() if k != name)["data_offsets"]},
    }
    return {
        "empty": b"", "short": b"\0" * 7, "huge header": with_header(text, body, 2**63),
        "a header of 100 MB": with_header(text, body, 100_000_000), "offsets beyond the end": with_header(far, body),
        "two tensors in one place": with_header(over, body), "a hole": with_header(header, body + b"\0" * 8),
        "a key twice": with_header(text[:-1] + "," + text[1:], body), "deep": with_header("[" * 10**6, body),
        "a list": with_header("[]", body),
        "tensors without number": with_header("[" + '"data_offsets",' * 250_000 + "0]", b""),
        "not utf-8": with_header("{}", body)[:8] + b"\xff\xfe" + body,
        "a pickle": pickle.dumps({"a": 1}), "no tensors": save({}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", lies())
def test_lying_weights(tmp_path: Path, kind: str) -> None:
    assert refused(lora_modules, model(tmp_path / "one", weights=lies()[kind]))
    beside = model(tmp_path / "two")
    (beside / "consolidated.safetensors").write_bytes(lies()[kind])
    assert refused(lora_modules, beside) or kind == "no tensors"


@pytest.mark.parametrize("name", ["model-2.safetensors", "model-00001-of-00002.safetensors", "model.old.safetensors"])
def test_a_tensor_stands_in_one_file(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    (folder / name).write_bytes(model_bytes())
    assert name in ModelFolder.open(folder).notes[0]  # beside model.safetensors it is left over
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    message = refused(ModelFolder.open, folder) or ""
    assert name in message
    assert "stands in" in message
    (folder / name).write_bytes(save({"another.weight": np.zeros((2, 2), np.float32)}))
    assert refused(ModelFolder.open, folder) is None


@quick_and_slow
def test_damaged_configs(tmp_path: Path, times: int) -> None:
    rng = random.Random(2)
    messages = []
    for _ in range(100 * times):
        folder = model(tmp_path / "m", damaged_json(rng, CONFIG))
        spec = ModelSpec(folder), LoraSpec(2, 4.0), OptimSpec(), 0
        messages.append(refused(registry.open_session, "reference", *spec))
    assert sum(one is not None for one in messages) > 25 * times


@quick_and_slow
def test_damaged_adapters(tmp_path: Path, times: int) -> None:
    rng = random.Random(3)
    header, body = header_of(model_bytes())
    names = [f"base_model.model.model.layers.0.{i}.lora_{side}.weight" for i in range(4) for side in "AB"]
    weights = with_header(dict(zip(names, header.values(), strict=False)), body[: max(
        one["data_offsets"][1] for one in list(header.values())[:8])])  # fmt: skip
    for number in range(100 * times):
        text = json.dumps(ADAPTER) if number % 2 else damaged_json(rng, ADAPTER)
        (tmp_path / "adapter_config.json").write_text(text)
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged_tensors(rng, weights) if number % 2 else weights)
        assert refused(read_adapter, tmp_path)  # its rank is never the config's


@quick_and_slow
def test_the_base_that_an_adapter_names_is_only_a_name(tmp_path: Path, times: int) -> None:
    rng, opened = random.Random(4), ModelFolder.open(model(tmp_path / "base"))
    for _ in range(20 * times):
        (tmp_path / "adapter_config.json").write_text(damaged_json(rng, ADAPTER))
        refused(check_base, tmp_path, opened, "org/base")
    other = ADAPTER | {"base_model_name_or_path": str(tmp_path / "canary"), "finetune": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(other))
    assert refused(check_base, tmp_path, opened, "org/base") is None
    for path in ("./base", "../base", "~/base"):  # folders of another machine, and no hub ids
        moved = json.dumps(ADAPTER | {"base_model_name_or_path": path, "finetune": None})
        (tmp_path / "adapter_config.json").write_text(moved)
        assert refused(check_base, tmp_path, opened, "org/other") is None
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {"finetune": None}))
    assert refused(check_base, tmp_path, opened, "mirror/Base") is None
    assert "org/base" in (refused(check_base, tmp_path, opened, "org/other") or "")


@quick_and_slow
def test_damaged_checkpoints_with_right_manifests(tmp_path: Path, times: int) -> None:
    rng = random.Random(5)
    good = {
        "state.safetensors": model_bytes(),
        "loop.json": json.dumps({"step": 3, "loop": {"best_step": 1}}).encode(),
        "identity.json": b'{"data": "abc"}',
    }
    for _ in range(40 * times):
        folder = tmp_path / "step-00000003"
        folder.mkdir()
        name = rng.choice(list(good))
        bad = damaged_tensors(rng, good[name]) if "safe" in name else damaged_json(rng, json.loads(good[name])).encode()
        files = good | {name: bad}
        for one, data in files.items():
            (folder / one).write_bytes(data)
        entries = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in sorted(files.items())}
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}, indent=1))
        assert refused(checkpoints.load_newest, tmp_path) is None  # set aside, or harmless
        for left in tmp_path.iterdir():
            os.rename(left, tmp_path.parent / f"{tmp_path.name}-{rng.random()}")  # noqa: PTH104


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_checkpoint_is_made_of_plain_files(tmp_path: Path, kind: str) -> None:
    (tmp_path / "step-00000001").mkdir()
    odd = tmp_path / "step-00000001" / "state.safetensors"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to("/etc/hostname")
    found, messages = checkpoints.load_newest(tmp_path)
    assert found is None
    assert "not a plain file" in messages[0]


def tokenizer_folder(folder: Path, tokenizer: str | None = None, config: str | None = None, **files: str) -> Path:
    model(folder)
    (folder / "tokenizer.json").write_text(tokenizer or json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(config or json.dumps(TOKENIZER_CONFIG))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelFolder.open(folder))
    stop_tokens(tokenizer)
    encode_prompt(tokenizer, "abc ab" * 20)


@quick_and_slow
def test_damaged_tokenizers(tmp_path: Path, times: int) -> None:
    rng = random.Random(6)
    assert refused(use_tokenizer, tokenizer_folder(tmp_path / "t")) is None
    for number in range(50 * times):
        which = (
            {"tokenizer": damaged_json(rng, TOKENIZER)}
            if number % 2
            else {"config": damaged_json(rng, TOKENIZER_CONFIG)}
        )
        refused(use_tokenizer, tokenizer_folder(tmp_path / "t", **which))
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    endless = tokenizer_folder(tmp_path / "t", json.dumps(TOKENIZER | {"pre_tokenizer": pattern}))
    assert refused(lambda: encode_prompt(load_tokenizer(ModelFolder.open(endless)), "a" * 50 + "!"))
    huge = tokenizer_folder(tmp_path / "t")
    with (huge / "tokenizer.json").open("r+b") as opened:
        opened.truncate(10**9)  # a file with a hole: no such disk is needed
    assert "are the most" in (refused(use_tokenizer, huge) or "")


SHARDS = ["../canary.safetensors", "/etc/canary.safetensors", "a\0b.safetensors", "model/../../x.safetensors", "",
          "pytorch_model.bin", "model-1.bin", "model-9.safetensors", 7, None, "..",
          ["model.safetensors"], "~/canary"]  # fmt: skip


@pytest.mark.parametrize("shard", SHARDS)
def test_an_index_names_files_of_the_folder(tmp_path: Path, shard: Any) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": shard}}
    folder = model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "canary.safetensors").write_bytes(model_bytes())
    assert refused(ModelFolder.open, folder)


@pytest.mark.parametrize("name", ["model-2.safetensors", "tokenizer.json", "chat_template.jinja", "notes"])
def test_links_stay_in_the_folder_or_its_hub_cache(tmp_path: Path, name: str) -> None:
    (tmp_path / "canary").write_bytes(model_bytes())
    folder = model(tmp_path / "m")
    (folder / name).symlink_to(tmp_path / "canary")
    assert "link out of" in (refused(ModelFolder.open, folder) or "")
    snapshot = model(tmp_path / "models--a--b" / "snapshots" / "abc")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    other = save({"another.weight": np.zeros((2, 2), np.float32)})
    (tmp_path / "models--a--b" / "blobs" / "123").write_bytes(other)
    (snapshot / name).symlink_to("../../blobs/123")
    assert refused(ModelFolder.open, snapshot) is None
    (snapshot / "extra.json").symlink_to("../../../canary")
    assert "link out of" in (refused(ModelFolder.open, snapshot) or "")

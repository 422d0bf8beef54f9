"""GGUF files hold the model's numbers, in the type that was asked for or a larger one, and nothing else."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("libgguf")
pytest.importorskip("xllamacpp")

import gguf
import xllamacpp

from backends.model_folder import ModelFolder
from finetune.errors import EnvironmentProblem
from finetune.export import gguf_file
from finetune.export.families import family_of
from finetune.export.gguf_file import packed, type_of, write_adapter, write_model
from tests.tiny_models import model_with_tokenizer
from tests.unit.export.gguf_models import LENGTHS, TOKENS, distance, engine, expected, model, readers, tensors, write

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
# kind -> relative error of a tensor (root mean square), and of log-probabilities, as measured and rounded up
BOUNDS = {
    "f32": (0.0, 1e-5), "f16": (5e-4, 0.02), "bf16": (3e-3, 0.1), "q8_0": (0.01, 0.3), "q6_k": (0.03, 0.6),
    "q5_k_m": (0.06, 1.0), "q4_k_m": (0.12, 2.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return model("llama", tmp_path_factory.mktemp("wide"), tokenizer, tie_word_embeddings=False, **WIDE)


def read(file: Path) -> dict[str, tuple[str, Any]]:
    """Tensor -> type, numbers."""
    told = gguf.GGUFReader(file).tensors
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in told}


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_file_holds_the_numbers_of_the_model(kind: str, wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    narrow, family = write(wide, file, kind), family_of(ModelFolder.open(wide))
    told = read(file)
    assert narrow == 0 and len(told) == len(family.names)
    relative, absolute = BOUNDS[kind]
    for name, tensor in tensors(wide).items():
        right, numbers = family.converted(name, tensor), told[family.names[name]][1]
        assert numbers.shape == right.shape
        error = float(np.sqrt(((numbers - right) ** 2).mean() / (right**2).mean()))
        assert error <= (relative if tensor.ndim == 2 else 0.0), name
    assert distance(file, expected(wide)) < absolute


def test_four_bits_are_mixed_as_llama_quantize_mixes_them() -> None:
    def types(kind: str, blocks: int, name: str) -> str:
        return "".join(
            type_of(f"blk.{i}.{name}.weight", (256, 256), kind, blocks, "output.weight")[0][1] for i in range(blocks)
        )

    assert types("q4_k_m", 16, "attn_v") == types("q4_k_m", 16, "ffn_down") == "6644644644644666"
    assert types("q5_k_m", 3, "ffn_down") == "556" and types("q4_k_m", 8, "attn_v") == "64464466"
    assert types("q4_k_m", 4, "attn_q") == "4444" and types("q4_k_m", 2, "attn_qkv") == "55"
    assert types("q5_k_m", 2, "attn_qkv") == "66" and types("q6_k", 2, "attn_v") == "66"
    shape = (320, 256)
    assert type_of("output.weight", shape, "q4_k_m", 2, "output.weight") == ("Q6_K", False)
    assert type_of("token_embd.weight", shape, "q4_k_m", 2, "output.weight") == ("Q4_K", False)
    assert type_of("token_embd.weight", shape, "q4_k_m", 2, "token_embd.weight") == ("Q6_K", False)  # tied


@pytest.mark.parametrize(
    ("kind", "width", "chosen"),
    [
        ("q4_k_m", 576, "Q5_0"), ("q5_k_m", 576, "Q5_1"), ("q6_k", 576, "Q8_0"), ("q8_0", 576, "Q8_0"),
        ("q4_k_m", 36, "F16"), ("q6_k", 36, "F16"), ("q8_0", 36, "F16"), ("bf16", 36, "BF16"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_written_in_a_larger_type(kind: str, width: int, chosen: str) -> None:
    told = type_of("blk.0.attn_q.weight", (8, width), kind, 8, "output.weight")
    assert told == (chosen, kind != "bf16" and not (kind == "q8_0" and width == 576))


def test_how_many_were_too_narrow_is_said(tokenizer: Path, tmp_path: Path) -> None:
    folder = model("llama", tmp_path / "model", tokenizer)
    narrow = write(folder, tmp_path / "model.gguf", "q4_k_m")
    assert narrow == sum(tensor.ndim == 2 for _, tensor in tensors(folder).items())
    assert {kind for kind, _ in read(tmp_path / "model.gguf").values()} == {"F32", "Q5_0", "Q8_0"}
    assert distance(tmp_path / "model.gguf", expected(folder)) < 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="only that build gives the function away")
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"])
def test_the_bytes_are_those_of_llama_cpp(kind: str) -> None:
    pack = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    pack.restype = ctypes.c_size_t
    pack.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    numbers = np.random.default_rng(3).standard_normal((16, 512)).astype(np.float32)
    ours = packed(numbers, kind, "a").tobytes()
    theirs = np.zeros(len(ours), np.uint8)
    number = int(gguf.GGMLQuantizationType[kind])
    assert pack(number, numbers.ctypes.data, theirs.ctypes.data, 0, 16, 512, None) == len(ours)
    assert theirs.tobytes() == ours


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not finite"), (7e4, "bf16")])
def test_numbers_that_the_type_does_not_hold_are_refused(value: float, reason: str) -> None:
    with pytest.raises(EnvironmentProblem, match=reason):
        packed(np.full((2, 64), value, np.float32), "F16", "blk.0.attn_q.weight")


def adapter_of(folder: Path, modules: tuple[str, ...]) -> dict[str, Any]:
    random, made = np.random.default_rng(7), {}
    for name, tensor in tensors(folder).items():
        if name.removesuffix(".weight").endswith(modules):
            out, inputs = tensor.shape
            module = name.removesuffix(".weight")
            made[f"{module}.lora_A"] = (random.standard_normal((4, inputs)) * 0.1).astype(np.float32)
            made[f"{module}.lora_B"] = (random.standard_normal((out, 4)) * 0.1).astype(np.float32)
    return made


def merge(folder: Path, adapter: dict[str, Any], scale: float) -> None:
    for file in folder.glob("*.safetensors"):
        whole = load_file(file)
        for name in adapter:
            if name.endswith("lora_A"):
                module = name.removesuffix(".lora_A")
                change = adapter[f"{module}.lora_B"].astype(np.float64) @ adapter[name]
                whole[f"{module}.weight"] = (whole[f"{module}.weight"] + scale * change).astype(np.float32)
        save_file(whole, file, {"format": "pt"})


ADAPTED = [
    ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")),
    ("phi3", ("qkv_proj", "gate_up_proj", "down_proj")),
    ("qwen3", ("q_proj", "k_proj")),
    ("gemma2", ("k_proj", "o_proj")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "modules"), ADAPTED, ids=[name for name, _ in ADAPTED])
def test_an_adapter_does_what_the_merged_model_does(
    name: str, modules: tuple[str, ...], tokenizer: Path, tmp_path: Path
) -> None:
    folder = model(name, tmp_path / "model", tokenizer)
    write(folder, tmp_path / "base.gguf")
    adapter = adapter_of(folder, modules)
    write_adapter(tmp_path / "adapter.gguf", ModelFolder.open(folder), adapter, alpha=8.0, kind="f32")
    merge(folder, adapter, 2.0)
    told = engine(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    wanted = expected(folder)
    errors = [
        max(abs(value - row[token]) for token, value in told.distribution(TOKENS[:length]).items())
        for length, row in zip(LENGTHS, wanted, strict=True)
    ]
    assert max(errors) < (2e-3 if name == "gemma2" else 1e-4)
    assert distance(tmp_path / "base.gguf", wanted) > 0.1  # the adapter matters


def test_an_adapter_that_is_not_permuted_is_seen(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model("llama", tmp_path / "model", tokenizer)
    write(folder, tmp_path / "base.gguf")
    adapter = adapter_of(folder, ("q_proj", "k_proj"))
    monkeypatch.setattr(gguf_file, "family_of", lambda opened: dataclasses.replace(family_of(opened), permuted={}))
    write_adapter(tmp_path / "adapter.gguf", ModelFolder.open(folder), adapter, alpha=8.0, kind="f32")
    merge(folder, adapter, 2.0)
    told, right = engine(tmp_path / "base.gguf", tmp_path / "adapter.gguf").distribution(TOKENS), expected(folder)[-1]
    assert max(abs(value - right[token]) for token, value in told.items()) > 0.01


def test_a_model_that_mlx_has_packed_is_written_unpacked(tokenizer: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    plain, packing = model("llama", tmp_path / "plain", tokenizer), {"group_size": 64, "bits": 4}
    unpacked, stored = {}, {}
    for name, tensor in tensors(plain).items():
        unpacked[name] = stored[name] = tensor
        if tensor.ndim == 2:  # the embedding too
            words, scales, biases = mx.quantize(mx.array(tensor), **packing)
            unpacked[name] = np.array(mx.dequantize(words, scales, biases, **packing))
            parts = {"weight": words, "scales": scales, "biases": biases}
            stored |= {f"{name.removesuffix('.weight')}.{part}": np.array(value) for part, value in parts.items()}
    save_file(unpacked, plain / "model.safetensors", {"format": "pt"})
    folder = Path(shutil.copytree(plain, tmp_path / "packed"))
    save_file(stored, folder / "model.safetensors", {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization": packing}
    (folder / "config.json").write_text(json.dumps(config))
    opened = ModelFolder.open(folder)
    write_model(tmp_path / "model.gguf", opened, readers(unpacked), "", "f32")
    assert distance(tmp_path / "model.gguf", expected(plain)) < 1e-5

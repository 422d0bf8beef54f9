"""Predicted memory: what it must grow with, and that it is right where it can be counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from backends import predictions, registry
from backends.interface import LoraSpec, ModelSpec
from backends.memory_plan import Footprint, Micro, first_adapted, footprint, read_architecture, weight_bytes
from backends.micro_batches import few_widths
from backends.model_folder import ModelFolder
from backends.predictions import Architecture, Costs, Size
from backends.torch_backend.costs import APPLE, NVIDIA

FLOAT, HALF = ModelSpec(Path("model"), dtype="float32"), ModelSpec(Path("model"), dtype="bfloat16")
ROWS = Micro(8, 128, 64)
D, INNER, KEYS, VOCABULARY = 256, 704, 128, 1000
SHAPES = {
    "self_attn.q_proj": (D, D), "self_attn.k_proj": (KEYS, D), "self_attn.v_proj": (KEYS, D),
    "self_attn.o_proj": (D, D), "mlp.gate_proj": (INNER, D), "mlp.up_proj": (INNER, D), "mlp.down_proj": (D, INNER),
}  # fmt: skip


def architecture(blocks: int = 4, **sizes: Any) -> Architecture:
    modules = {f"model.layers.{block}.{name}": shape for block in range(blocks) for name, shape in SHAPES.items()}
    other = VOCABULARY * D
    linear = sum(out * inp for out, inp in modules.values())
    whole = Architecture(blocks, D, INNER, D, KEYS, VOCABULARY, modules, other, 4 * (linear + other), 4, False)
    return replace(whole, **sizes)


def needed(
    shape: Architecture, model: ModelSpec = FLOAT, rank: int = 8, micro: Micro = ROWS, last: int = 99,
    backend: str = "torch", device: Any = "gpu",
) -> Footprint:  # fmt: skip
    lora = LoraSpec(rank, 16.0)
    adapted = {name: size for name, size in shape.modules.items() if int(name.split(".")[2]) >= shape.blocks - last}
    costs = NVIDIA if (backend, device) == ("torch", "gpu") else registry.costs(backend, device)
    return footprint(shape, model, lora, adapted, micro, costs)


BACKENDS = st.sampled_from(["torch", "mlx"])
MODELS = st.sampled_from([FLOAT, HALF, replace(HALF, quantize="4bit"), replace(FLOAT, checkpointing=True)])
FEW = st.integers(1, 12)


@given(FEW, FEW, st.integers(1, 64), MODELS, BACKENDS)
def test_more_rows_blocks_or_rank_never_need_less(
    blocks: int, rows: int, rank: int, model: ModelSpec, backend: str
) -> None:
    micro = Micro(rows, 128, 8 * rows)
    base = needed(architecture(blocks), model, rank, micro, backend=backend)
    for more in (
        needed(architecture(blocks + 1), model, rank, micro, backend=backend),
        needed(architecture(blocks), model, rank + 1, micro, backend=backend),
        needed(architecture(blocks), model, rank, Micro(rows + 1, 128, 8 * rows + 8), backend=backend),
        needed(architecture(blocks), model, rank, Micro(rows, 136, 8 * rows), backend=backend),
    ):
        assert more.training >= base.training  # equal where the update needs more than the step before it
        assert more.weights + more.adapter + more.activations >= base.weights + base.adapter + base.activations
        assert more.peak >= base.peak


@pytest.mark.parametrize(("backend", "most"), [("torch", 28), ("mlx", 32)])
def test_a_whole_model_needs_so_many_bytes_for_each_weight(backend: str, most: int) -> None:
    """Weight, gradient, both moments and the best weight; and what a checkpoint or an update holds beside them."""
    shape, costs = architecture(40), registry.costs(backend, "cpu")
    weights = shape.linear + shape.other
    lora, micro = LoraSpec(1, 1.0, whole=True), Micro(1, 8, 1)
    found = footprint(shape, FLOAT, lora, shape.modules, micro, costs)
    assert (found.weights, found.adapter) == (4.0 * weights, 16.0 * weights)
    widest = costs.widest_update * max(VOCABULARY, INNER) * D
    assert found.training - found.runtime == pytest.approx(most * weights + widest, rel=0.01)


def test_a_whole_models_gradient_of_a_micro_batch_stands_beside_the_sum_in_mlx() -> None:
    shape, costs, lora = architecture(2), registry.costs("mlx", "cpu"), LoraSpec(1, 1.0, whole=True)
    micro = Micro(2, 2048, 4096)  # activations that an update does not reach
    without = footprint(shape, FLOAT, lora, shape.modules, micro, replace(costs, whole_sum=0.0))
    found = footprint(shape, FLOAT, lora, shape.modules, micro, costs)
    assert found.peak - without.peak == pytest.approx(4.0 * (shape.linear + shape.other))


@pytest.mark.parametrize("built", [False, True])
def test_libraries_of_a_card_are_counted_where_torch_has_them(
    built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    if built:
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    for spec in (SimpleNamespace(origin=str(tmp_path / "__init__.py")), None):
        monkeypatch.setattr(predictions, "PathFinder", SimpleNamespace(find_spec={"torch": spec}.__getitem__))
        assert (predictions.cuda_libraries() > 0) == (built and spec is not None)


@given(st.integers(2, 12), st.integers(1, 12), BACKENDS)
def test_fewer_adapted_blocks_save_less(blocks: int, last: int, backend: str) -> None:
    part, whole = (needed(architecture(blocks), last=n, backend=backend) for n in (min(last, blocks), blocks))
    assert part.activations < whole.activations or last >= blocks
    assert part.weights == whole.weights


@given(MODELS, BACKENDS)
def test_recomputation_saves_less(model: ModelSpec, backend: str) -> None:
    plain, saved = (needed(architecture(8), replace(model, checkpointing=on), backend=backend) for on in (False, True))
    assert saved.activations < plain.activations / 2


def test_the_weights_are_those_of_the_scheme() -> None:
    shape = architecture()
    linear, other = shape.linear, shape.other
    torch, mlx = registry.costs("torch", "gpu"), registry.costs("mlx", "gpu")
    assert weight_bytes(shape, "none", 4, torch) == 4 * (linear + other)
    assert weight_bytes(shape, "none", 2, mlx) == 2 * (linear + other)
    nf4 = linear * (0.5 + 1 / 64 + 4 / 64 / 256)  # and bfloat16 for the rest
    assert weight_bytes(shape, "4bit", 2, torch) == pytest.approx(nf4 + 2 * other)
    assert weight_bytes(shape, "4bit", 2, mlx) == pytest.approx(linear * 4.5 / 8 + 2 * other)


def test_what_a_block_saves_of_a_token() -> None:
    found = needed(architecture(1), micro=Micro(1, 128, 128), rank=1).activations / 128
    # what enters both norms; queries, keys, values and attention's result; gate and up; a number for each adapter
    assert found == pytest.approx(1.1 * 4 * (2 * D + 2 * D + 2 * KEYS + 2 * INNER + 7))  # and what the allocator holds


def test_a_cpu_computes_a_part_at_a_time() -> None:
    small, large = (needed(architecture(), micro=Micro(rows, 256, 256 * rows), device="cpu") for rows in (4, 16))
    assert small.activations == large.activations
    long = needed(architecture(), micro=Micro(2, 4096, 8192), device="cpu")  # but a row is never cut
    assert long.activations == pytest.approx(4 * small.activations)


def test_a_gpu_keeps_little_where_blocks_are_computed_again() -> None:
    """Three blocks' inputs and one block's results, however many blocks there are; the rest waits beside the card."""
    again, untied = replace(HALF, checkpointing=True), VOCABULARY * D
    few, many = (needed(architecture(blocks, embedding=untied), again) for blocks in (4, 12))
    assert few.activations == many.activations
    kept = needed(architecture(4, embedding=untied))
    assert needed(architecture(3), again).activations < needed(architecture(4), HALF).activations < kept.activations
    assert few.weights == needed(architecture(4), again).weights - 2 * untied  # an embedding of its own waits there too


def test_an_apple_gpu_has_no_memory_beside_its_own() -> None:
    """With PyTorch (MPS) the inputs of all blocks that are computed again count, and so does the embedding; and of the
    block that is computed the weights of every pair.
    """
    again, shape = replace(HALF, checkpointing=True), architecture(12, embedding=VOCABULARY * D)
    found = footprint(shape, again, LoraSpec(8, 16.0), shape.modules, ROWS, APPLE)
    beside = footprint(shape, again, LoraSpec(8, 16.0), shape.modules, ROWS, NVIDIA)
    inputs = 9 * D * 2 * ROWS.tokens  # of all blocks but the three that an NVIDIA card holds
    pairs = 4 * shape.heads * ROWS.width * ROWS.tokens
    assert found.activations == pytest.approx(beside.activations + 1.1 * (inputs + pairs))
    assert found.weights == beside.weights + 2 * VOCABULARY * D


def test_logits_are_counted_as_many_as_are_computed_at_a_time() -> None:
    """Of 500 positions and 10 million logits MLX makes 4 million at once on a CPU, and all on a GPU."""
    shape, micro = architecture(vocabulary=20_000), Micro(1, 500, 500)
    small = architecture(vocabulary=VOCABULARY)
    states = 2 * 500 * D * 4
    for device, rows, held in (("cpu", 2**22 // 20_000, 1.05), ("gpu", 500, 1.1)):
        found = needed(shape, micro=micro, backend="mlx", device=device)
        assert found.working == pytest.approx(held * (rows * 20_000 * 8 + states))
        assert found.working > needed(small, micro=micro, backend="mlx", device=device).working


def test_only_a_changed_type_costs_more_than_the_weights_while_loading() -> None:
    assert needed(architecture(), FLOAT, device="cpu").loading == 0
    assert needed(architecture(), HALF, device="cpu").loading == architecture().stored
    assert needed(architecture(), HALF, device="cpu", backend="mlx").loading < architecture().stored / 2


def test_every_figure_is_the_backends_own() -> None:
    """A plan from costs that no backend has: each figure is seen where it belongs, and nowhere else."""
    plain = Costs("gpu", 1e9, lambda architecture, adapted, lora, number: 100.0 * number, 0.5, held=1.0)
    model, shape = replace(HALF, quantize="4bit"), architecture(2)
    lora, modules = LoraSpec(8, 16.0), dict(shape.modules)

    def planned(costs: Costs, model: ModelSpec = model) -> Footprint:
        return footprint(shape, model, lora, modules, ROWS, costs)

    base = planned(plain)
    assert (base.runtime, base.activations) == (1e9, 2 * 100 * 2 * ROWS.tokens)
    assert base.working == (4 * INNER + 6 * D) * 2 * ROWS.tokens + 2 * INNER * D
    assert base.loading == VOCABULARY * D * 4
    changed = {
        "runtime": (replace(plain, four_bit_runtime=7.0), base.runtime + 7),
        "weights": (replace(plain, four_bit_weight=Size(1.0, 0.5)), 2 * (shape.linear + shape.other)),
        "activations": (replace(plain, held=2.0, tokens_at_once=256), base.activations / 2),
        "working": (replace(plain, unpacked_weight=Size(5.0)), base.working + 3 * INNER * D),
        "loading": (replace(plain, maps_files=True, quantising=3.0), shape.stored + 3 * VOCABULARY * D),
    }
    for part, (costs, expected) in changed.items():
        assert getattr(planned(costs), part) == pytest.approx(expected), part
    assert planned(replace(plain, bfloat16_products=2.0)).runtime == base.runtime + 2 * ROWS.tokens
    assert planned(replace(plain, update=1e6)).step == 1e6 * lora.trainable(modules)
    of_dora = footprint(shape, model, replace(lora, dora=True), modules, ROWS, plain)
    outputs = sum(out for out, _ in modules.values())
    assert of_dora.activations - base.activations == outputs * 2 * ROWS.tokens  # the products before their lengths
    assert of_dora.working - base.working == 4 * INNER * D and of_dora.adapter - base.adapter == 20 * outputs
    again = replace(model, checkpointing=True)
    one, three = (planned(replace(plain, recomputed_blocks=n), again).activations for n in (1.0, 3.0))
    assert three - one == base.activations


def test_bytes_of_a_number() -> None:
    sizes = [(spec.number_bytes("cpu"), spec.number_bytes("gpu")) for spec in (ModelSpec(Path("m")), FLOAT, HALF)]
    assert sizes == [(4, 2), (4, 4), (2, 2)]


def test_the_first_adapted_block() -> None:
    assert first_adapted({"model.layers.3.a": (1, 1), "model.layers.2.b": (1, 1)}) == 2


def model_folder(folder: Path, tied: bool = True) -> Path:
    """As transformers writes it, of zeros; two blocks."""
    config = {
        "model_type": "llama", "hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in architecture(2).modules.items()}
    for name in ("model.embed_tokens", *([] if tied else ["lm_head"])):
        tensors[f"{name}.weight"] = np.zeros((VOCABULARY, D), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_says_its_sizes(tmp_path: Path, tied: bool) -> None:
    expected, found = architecture(2, heads=4), read_architecture(ModelFolder.open(model_folder(tmp_path, tied)))
    own = 0 if tied else VOCABULARY * D
    assert replace(found, stored=0, modules={}) == replace(
        expected, stored=0, modules={}, other=expected.other + own, embedding=own
    )
    assert dict(found.modules) == dict(expected.modules)


def test_a_gpu_of_mlx_computes_a_few_tokens_more_and_they_are_counted() -> None:
    widths = range(1, 5000)
    made = [few_widths(width) for width in widths]
    assert all(width <= wider <= 17 / 16 * width for width, wider in zip(widths, made, strict=True))
    assert [len({wide for wide in made if low < wide <= 2 * low}) for low in (256, 512, 1024)] == [16, 16, 16]
    assert made[:256] == [*widths[:256]]
    found = {
        (backend, width): needed(architecture(), micro=Micro(2, width, 500), backend=backend, device="gpu")
        for backend in ("mlx", "torch")
        for width in (264, 272)
    }
    assert found["mlx", 264] == found["mlx", 272]
    assert found["torch", 264].activations < found["torch", 272].activations

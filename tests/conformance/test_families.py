"""Models inside others, and models whose layers have other names in each library, are one model in both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backends import libraries, registry
from backends.interface import BackendError, ModelSpec
from backends.model_folder import ModelFolder
from tests.conformance.toy import DROPPING, LORA, Case, close, random_adapter, toy_batch

pytest.importorskip("torch")
pytest.importorskip("mlx.core")

from tests.tiny_families import MAKERS_CONFIGS, MODELS, published
from tests.tiny_models import family

Usable = Callable[[str], None]
BATCH = toy_batch()
# mlx-lm reads some in their makers' form alone, has no kv_b_proj, and leaves a tensor out
ONE_LIBRARY = {"gpt_oss", "qwen3_5_moe_saved", "olmo_hybrid", "glm4_moe_lite", "ernie4_5_moe"}
# blocks, and how many linear layers they have that are adapted
SIZES = {
    "gemma3": (6, 42), "mistral3": (2, 14), "qwen3_vl": (2, 14), "qwen3_5": (4, 31), "gemma4": (6, 50),
    "gemma4_e2b": (4, 32),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = published(name, tmp_path_factory.mktemp("published") / name)
        return made[name]

    return folder


@pytest.mark.parametrize("name", sorted(set(MODELS) - ONE_LIBRARY))
def test_a_published_model_is_the_same_in_both_libraries(
    name: str, folder_of: Callable[[str], Path], usable: Usable
) -> None:
    usable("torch"), usable("mlx")
    one, other = (Case(backend, folder_of(name)).open(lora=DROPPING) for backend in ("torch", "mlx"))
    base = one.score(BATCH)
    assert base.logprob[BATCH.weights > 0].std() > 0.3
    np.testing.assert_allclose(other.score(BATCH).logprob, base.logprob, atol=1e-4)
    state = random_adapter(one)
    for session in (one, other):
        session.set_state(state)
    np.testing.assert_allclose(other.score(BATCH).logprob, one.score(BATCH).logprob, atol=1e-4)
    ours, theirs = one.step([BATCH], 1e-2), other.step([BATCH], 1e-2)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
    assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-3)
    close(other.get_state(), one.get_state(), 2e-3)


@pytest.mark.parametrize("name", sorted(MAKERS_CONFIGS))
def test_a_config_that_transformers_wrote_is_the_same_model_in_mlx_lm(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The other families' configs are as transformers writes them in every test."""
    saved = published(name, tmp_path, as_saved=True)
    assert (saved / "config.json").read_text() != (folder_of(name) / "config.json").read_text()
    one, other = (Case(backend, saved).open() for backend in ("torch", "mlx"))
    np.testing.assert_allclose(other.score(BATCH).logprob, one.score(BATCH).logprob, atol=1e-4)
    makers = Case("mlx", folder_of(name)).open()
    np.testing.assert_array_equal(makers.score(BATCH).logprob, other.score(BATCH).logprob)


@pytest.mark.parametrize("name", SIZES)
def test_only_the_text_model_is_adapted_and_counted(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = ModelFolder.open(folder_of(name))
    modules = folder.lora_modules(LORA)
    assert (folder.blocks, len(modules)) == SIZES[name]
    assert all(module.startswith(folder.stack) for module in modules)
    last = folder.lora_modules(type(LORA)(rank=4, alpha=8.0, layers=1))
    assert {module.removeprefix(folder.stack).split(".")[0] for module in last} == {str(folder.blocks - 1)}


def test_keys_and_values_that_a_block_takes_from_another_are_not_adapted(folder_of: Callable[[str], Path]) -> None:
    modules = ModelFolder.open(folder_of("gemma4")).lora_modules(LORA)
    shared = {module.split(".")[3] for module in modules if module.endswith("k_proj")}
    assert shared == {"0", "1", "2", "3"}


def test_gemmas_embeddings_have_the_same_scale_where_it_is_no_short_number(tmp_path: Path) -> None:
    """sqrt(80), which mlx-lm rounds to bfloat16; at the width of the other tests it is 8."""
    folder = family("gemma3_text", tmp_path, hidden_size=80)
    torch, mlx = (Case(name, folder).open() for name in ("torch", "mlx"))
    np.testing.assert_allclose(mlx.score(BATCH).logprob, torch.score(BATCH).logprob, atol=1e-5)
    one, other = (session.step([BATCH], 1e-2) for session in (torch, mlx))
    assert (one.loss, one.grad_norm) == (pytest.approx(other.loss, rel=1e-5), pytest.approx(other.grad_norm, rel=1e-4))
    assert "rounds the scale" in libraries.by_name()["mlx-lm"].differs(ModelFolder.open(folder))


def test_a_model_of_which_mlx_lm_leaves_a_part_out_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("ernie4_5_moe")
    registry.check_model("torch", ModelSpec(folder), LORA)
    words = r"mlx-lm leaves model\.layers\.1\.mlp\.moe_statics\.e_score_correction_bias out.*; use another backend"
    with pytest.raises(BackendError, match=words):
        registry.check_model("mlx", ModelSpec(folder), LORA)
    with pytest.raises(BackendError, match=words):
        Case("mlx", folder).open()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("qwen3_5_moe_saved", "model.language_model.layers.0.mlp.experts.0.down_proj.weight"),
        ("olmo_hybrid", "model.layers.0.attention_layer_norm.weight"),
    ],
)
def test_weights_in_a_form_that_one_library_does_not_take_are_refused_before_anything_is_loaded(
    name: str, tensor: str, folder_of: Callable[[str], Path]
) -> None:
    model = ModelSpec(folder_of(name))
    registry.check_model("torch", model, LORA)
    for refused in (lambda: registry.check_model("mlx", model, LORA), Case("mlx", folder_of(name)).open):
        with pytest.raises(BackendError, match=f"mlx-lm does not take {tensor}.*use another backend") as caught:
            refused()
        assert "download" not in str(caught.value)

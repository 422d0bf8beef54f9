"""The adapter folder under PEFT's and mlx-lm's own loaders, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import registry
from backends.interface import BackendError, Batch, LoraSpec, ModelSpec, OptimSpec, TrainState
from backends.model_folder import ModelFolder
from finetune.disk.adapter import check_start, read_adapter
from finetune.disk.adapter_writer import write_adapter
from finetune.errors import Incompatible
from tests.tiny_models import tiny_llama

REAL = [name for name in registry.NAMES if name != "reference"]
TOKENS = np.random.default_rng(0).integers(3, 128, (3, 12)).astype(np.int32)  # [B, T + 1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def trained(name: str, base: Path, folder: Path, lora: LoraSpec) -> np.ndarray:
    """Three steps on backend `name`, the adapter written to `folder`; log-probabilities of every next token."""
    if reason := registry.probe(name):
        pytest.skip(reason)
    session = registry.open_session(name, ModelSpec(base, dtype="float32"), lora, OptimSpec(), 0)
    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((3, 11), np.float32))
    for _ in range(3):
        session.step([batch], 1e-2)
    folder.mkdir()
    write_adapter(folder, session.get_state().adapter, lora, str(base), 2, {})
    return session.score(batch).logprob


def chosen_logprob(logits: np.ndarray) -> np.ndarray:
    """log p of each next token from logits [B, T, V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprob = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logprob, TOKENS[:, 1:, None], axis=-1)[..., 0]


DORA = {"r": 4, "lora_alpha": 8, "use_dora": True}
Q = {"base_model.model.q.lora_A.weight": (4, 8), "base_model.model.q.lora_B.weight": (8, 4)}
SPECS = {
    "all": LoraSpec(4, 8.0),
    "some": LoraSpec(4, 6.0, targets=("q_proj", "down_proj")),
    "top": LoraSpec(4, 8.0, layers=1),
    "by root": LoraSpec(4, 6.0, by_root=True),
    "dora": LoraSpec(4, 8.0, dora=True),
    "dora, some": LoraSpec(4, 6.0, targets=("k_proj", "up_proj", "down_proj"), by_root=True, dora=True, layers=1),
}
EACH = [pytest.param(lora, id=name, marks=[pytest.mark.slow] * (name == "dora, some")) for name, lora in SPECS.items()]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("lora", EACH)
@pytest.mark.parametrize("name", REAL)
def test_peft_loads_it_as_it_is(tmp_path: Path, base: Path, name: str, lora: LoraSpec) -> None:
    ours = trained(name, base, tmp_path / "adapter", lora)
    torch, peft, transformers = (pytest.importorskip(one) for one in ("torch", "peft", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(TOKENS[:, :-1].astype(np.int64))).logits.numpy()
    assert np.abs(chosen_logprob(logits) - ours).max() < 1e-5


@pytest.mark.parametrize("lora", EACH)
@pytest.mark.parametrize("name", REAL)
def test_mlx_lm_loads_it_as_it_is(tmp_path: Path, base: Path, name: str, lora: LoraSpec) -> None:
    ours = trained(name, base, tmp_path / "adapter", lora)
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    from mlx_lm.tuner.utils import load_adapters

    model, _ = utils.load_model(base, model_config={"rope_theta": 10000.0})
    model = load_adapters(model, str(tmp_path / "adapter"))
    model.eval()
    logits = np.array(model(mx.array(TOKENS[:, :-1])))
    assert np.abs(chosen_logprob(logits) - ours).max() < 1e-5


def test_the_scale_of_rslora_is_alpha_by_the_root_of_the_rank(tmp_path: Path) -> None:
    lora = LoraSpec(9, 6.0, by_root=True)
    tensors = {
        "model.layers.0.q.lora_A": np.ones((9, 4), np.float32),
        "model.layers.0.q.lora_B": np.ones((4, 9), np.float32),
    }
    write_adapter(tmp_path, tensors, lora, "base", 1, {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["lora_alpha"] == 6
    assert lora.scale == config["lora_parameters"]["scale"] == read_adapter(tmp_path).scale == 2.0


@pytest.mark.parametrize("drop", ["adapter_model.safetensors", "adapters.safetensors"])
def test_either_format_comes_back_as_it_was(tmp_path: Path, base: Path, drop: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_A": rng.normal(size=(4, 64)).astype(np.float32),
        "model.layers.0.self_attn.q_proj.lora_B": rng.normal(size=(64, 4)).astype(np.float32),
    }
    write_adapter(tmp_path, tensors, LoraSpec(4, 6.0), "base", 2, {})
    (tmp_path / drop).unlink()
    if drop == "adapter_model.safetensors":  # as mlx-lm itself writes it
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        kept = {key: config[key] for key in ("fine_tune_type", "num_layers", "lora_parameters")}
        (tmp_path / "adapter_config.json").write_text(json.dumps(kept))
    found = read_adapter(tmp_path)
    assert (found.rank, found.scale) == (4, 1.5)
    assert found.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(found.tensors[key], tensor)


def test_an_integral_alpha_is_written_as_an_integer(tmp_path: Path) -> None:
    """Ollama reads lora_alpha as an unsigned integer."""
    write_adapter(tmp_path, {}, LoraSpec(4, 6.0), "base", 2, {})
    assert '"lora_alpha": 6,' in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (None, {}, "adapter_config.json: missing"),
        ("{", {}, "cannot be read"),
        (DORA, Q, "q has no magnitude for every row"),
        (DORA, Q | {"base_model.model.q.lora_magnitude_vector": (7,)}, "q has no magnitude for every row"),
        (DORA, Q | {"base_model.model.q.lora_magnitude_vector": (8, 1)}, "not a LoRA factor"),
        (DORA, Q | {"base_model.model.k.lora_magnitude_vector": (8,)}, "k has no magnitude for every row"),
        ({"fine_tune_type": "full"}, {}, "fine_tune_type"),
        ({"r": 4, "lora_alpha": 8}, {"x.embed.weight": (4, 4)}, "not a LoRA factor"),
        ({"r": 4, "lora_alpha": 8}, {"base_model.model.q.lora_A.weight": (3, 8)}, "not of rank 4"),
        ({"r": 4, "lora_alpha": 8}, {}, "no LoRA tensor"),
        ({"lora_alpha": 8}, {"base_model.model.q.lora_A.weight": (3, 8)}, "no rank and scale"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, config: object, tensors: dict, words: str) -> None:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
    save_file({n: np.zeros(s, np.float32) for n, s in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Incompatible, match=words):
        read_adapter(tmp_path)


def test_a_start_of_dora_is_one_for_dora_alone(tmp_path: Path, base: Path) -> None:
    folders, model = (tmp_path / "plain", tmp_path / "dora"), ModelFolder.open(base)
    for folder, lora in zip(folders, (SPECS["all"], SPECS["dora"]), strict=True):
        session = registry.open_session("reference", ModelSpec(base), lora, OptimSpec(), 0)
        folder.mkdir()
        write_adapter(folder, session.get_state().adapter, lora, str(base), 2, {})
        check_start(folder, model, lora)
    with pytest.raises(Incompatible, match=r"plain is not of DoRA; remove lora\.dora"):
        check_start(folders[0], model, SPECS["dora"])
    with pytest.raises(Incompatible, match=r"dora is of DoRA; set lora\.dora: true"):
        check_start(folders[1], model, SPECS["all"])
    (folders[1] / "adapter_model.safetensors").unlink()  # as mlx-lm itself has it
    assert read_adapter(folders[1]).tensors.keys() == session.get_state().adapter.keys()


@pytest.mark.parametrize("row", [np.zeros(8), np.full(8, np.inf), np.full(8, np.nan)], ids=["zeros", "inf", "nan"])
@pytest.mark.parametrize("name", REAL)
def test_a_weight_that_has_a_row_without_a_length_takes_no_dora(name: str, row: np.ndarray, tmp_path: Path) -> None:
    if reason := registry.probe(name):
        pytest.skip(reason)
    folder = tiny_llama(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] = np.resize(row, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackendError, match=r"layers\.1\.mlp\.up_proj has rows .* remove lora\.dora"):
        registry.open_session(name, ModelSpec(folder, dtype="float32"), SPECS["dora"], OptimSpec(), 0)


@pytest.mark.parametrize("name", REAL)
def test_an_adapter_of_the_other_backend_is_a_start(tmp_path: Path, base: Path, name: str) -> None:
    other = next(one for one in REAL if one != name)
    scores = trained(other, base, tmp_path / "adapter", SPECS["all"])
    if reason := registry.probe(name):
        pytest.skip(reason)
    session = registry.open_session(name, ModelSpec(base, dtype="float32"), SPECS["all"], OptimSpec(), 1)
    session.set_state(TrainState(0, read_adapter(tmp_path / "adapter").tensors, {}))
    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((3, 11), np.float32))
    assert np.abs(session.score(batch).logprob - scores).max() < 1e-5

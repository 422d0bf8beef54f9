"""What is special to MLX; what every backend must do is in tests/conformance."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from backends.interface import (  # noqa: E402
    BackendError,
    Batch,
    LoraSpec,
    ModelSpec,
    NonFinite,
    OptimSpec,
    OutOfMemory,
    TrainState,
)
from backends.layer_names import Part  # noqa: E402
from backends.mlx_backend import blas_bridge  # noqa: E402
from backends.mlx_backend import head as mlx_head  # noqa: E402
from backends.mlx_backend import lora as mlx_lora  # noqa: E402
from backends.mlx_backend import model as mlx_model  # noqa: E402
from backends.mlx_backend import session as mlx_backend  # noqa: E402
from tests.tiny_models import family, tiny_llama  # noqa: E402

VOCAB = 128


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), tie=True)


def opened(folder: Path, lora: LoraSpec | None = None, seed: int = 0, **model: Any) -> mlx_backend.MlxSession:
    return mlx_backend.open(ModelSpec(folder, **model), lora or LoraSpec(4, 8.0), OptimSpec(), seed)


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own matrix products, as on a Mac."""
    monkeypatch.setattr(blas_bridge, "ENABLED", False)


def a_batch(rows: int = 2, width: int = 12, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    tokens = random.integers(3, VOCAB, (rows, width + 1)).astype(np.int32)
    weights = (random.random((rows, width)) < 0.5).astype(np.float32)
    weights[:, -1] = 1.0
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def flat(state: TrainState) -> bytes:
    return b"".join(tensor.tobytes() for part in (state.adapter, state.moments) for tensor in part.values())


def after_steps(session: mlx_backend.MlxSession, steps: int = 3) -> bytes:
    for step in range(steps):
        session.step([a_batch(seed=2 * step), a_batch(seed=2 * step + 1)], 1e-2)
    return flat(session.get_state())


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_checkpointing_changes_neither_loss_nor_gradient_even_with_dropout(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    lora = LoraSpec(4, 8.0, dropout=0.3)
    plain, sparing = opened(folder, lora), opened(folder, lora, checkpointing=True)
    for step in range(3):
        expected, found = (s.step([a_batch(seed=step)], 1e-2) for s in (plain, sparing))
        assert found.loss == expected.loss
    for name, tensor in plain.get_state().adapter.items():
        np.testing.assert_allclose(sparing.get_state().adapter[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def test_checkpointing_keeps_to_its_own_model(llama: Path) -> None:
    kind = type(opened(llama)._forward.model.layers[0])
    call = kind.__call__
    opened(llama, checkpointing=True)
    opened(llama, checkpointing=True)
    assert type(opened(llama)._forward.model.layers[0]) is kind
    assert kind.__call__ is call


@pytest.mark.usefixtures("own_products")
def test_checkpointing_needs_less_memory(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, num_hidden_layers=12)
    peaks = []
    for checkpointing in (False, True):
        session = opened(folder, checkpointing=checkpointing)
        mx.clear_cache()
        mx.reset_peak_memory()
        session.step([a_batch(rows=8, width=64)], 1e-3)
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("tie", [True, False])
def test_only_supervised_positions_reach_the_head(tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(tiny_llama(tmp_path, tie=tie, intermediate_size=96))
    widths: list[int] = []
    kind, method = (nn.Embedding, "as_linear") if tie else (nn.Linear, "__call__")
    original = getattr(kind, method)

    def spy(self: Any, x: Any) -> Any:
        if self.weight.shape == (VOCAB, 64):
            widths.append(x.size // 64)
        return original(self, x)

    monkeypatch.setattr(kind, method, spy)
    batch = a_batch(width=30)
    batch.weights[:] = 0
    batch.weights[0, 3:6] = 1
    widths.clear()  # of what was tried when the session was opened
    session.score(batch)
    session.step([batch], 1e-3)
    assert widths.count(3) == 2 and max(widths) == 3


def test_a_head_that_is_not_recognised_still_gives_the_chosen_positions() -> None:
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = mx.random.normal((7, 5))
            self.layers: list[Any] = []

        def __call__(self, inputs: Any, cache: Any = None) -> Any:
            return self.table[inputs] @ self.table.T

    model, inputs = Unusual(), mx.array([[1, 2, 3], [4, 5, 6]])
    head = mlx_head.Head(model, 16)
    logits = head.logits(head.hidden(inputs, mx.array([2, 4])))
    np.testing.assert_array_equal(np.array(logits), np.array(model(inputs).reshape(6, 7)[mx.array([2, 4])]))


@pytest.mark.parametrize(
    "message", ["[METAL] Command buffer execution failed: Insufficient Memory", "[malloc] Unable to allocate 9 bytes."]
)
def test_out_of_memory_leaves_the_state_as_it_was(llama: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session, other = opened(llama), opened(llama)
    after_steps(session, 1), after_steps(other, 1)
    before = flat(session.get_state())
    calls = []
    original = mlx_head.Head.hidden

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError(message)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(mlx_head.Head, "hidden", failing)
        with pytest.raises(OutOfMemory, match=message.split()[-2]):
            session.step([a_batch(seed=1), a_batch(seed=2)], 1e-2)
    assert flat(session.get_state()) == before
    assert after_steps(session) == after_steps(other)


def test_other_errors_pass_and_leave_the_state_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(llama)
    before, scores = flat(session.get_state()), session.score(a_batch())

    def failing(*_: Any) -> Any:
        raise RuntimeError("kernel not found")

    with monkeypatch.context() as patch:
        patch.setattr(mlx_head.Head, "loss", failing)
        with pytest.raises(RuntimeError, match="kernel not found"):
            session.step([a_batch()], 1e-2)
    assert flat(session.get_state()) == before
    np.testing.assert_array_equal(session.score(a_batch()).logprob, scores.logprob)


def test_nothing_but_infinity_in_the_adapter_is_non_finite(llama: Path) -> None:
    session = opened(llama)
    state = session.get_state()
    broken = {name: np.full_like(tensor, np.inf) for name, tensor in state.adapter.items()}
    session.set_state(TrainState(0, broken, {}))
    with pytest.raises(NonFinite, match="step 1"):
        session.step([a_batch()], 1e-2)
    assert session.get_state().step == 0


def test_an_update_out_of_range_is_not_applied(llama: Path) -> None:
    session = opened(llama)
    before = flat(session.get_state())
    with pytest.raises(NonFinite):
        session.step([a_batch()], 1e39)
    assert flat(session.get_state()) == before


# --- randomness ---------------------------------------------------------------------------------


def test_dropout_depends_on_no_global_state(llama: Path) -> None:
    lora = LoraSpec(4, 8.0, dropout=0.5)
    mx.random.seed(1)
    first = after_steps(opened(llama, lora))
    mx.random.seed(2)
    again = opened(llama, lora)
    again.score(a_batch())
    again.generate([[5, 6]], 3, [])
    assert after_steps(again) == first
    assert after_steps(opened(llama)) != first


def test_a_step_draws_the_same_wherever_training_began(llama: Path) -> None:
    lora = LoraSpec(4, 8.0, dropout=0.5)
    whole, resumed = opened(llama, lora), opened(llama, lora)
    after_steps(whole, 2)
    resumed.set_state(whole.get_state())
    twins = [a_batch(), a_batch()]
    losses = [whole.step(twins[:1], 0.0).loss, whole.step(twins[:1], 0.0).loss, whole.step(twins, 0.0).loss]
    assert len(set(losses)) == 3
    assert [resumed.step(batches, 0.0).loss for batches in (twins[:1], twins[:1], twins)] == losses


def test_dropout_keeps_the_mean_and_is_off_in_evaluation(llama: Path, own_products: None) -> None:
    session = opened(llama, LoraSpec(4, 8.0, dropout=0.25))
    layer = session._forward.model.layers[0].self_attn.q_proj
    session.step([a_batch()], 0.0)
    assert layer.masks.mask(layer.number, mx.ones((2, 64))) is None
    layer.masks.at(0, np.arange(4000))
    with pytest.raises(BackendError, match=r"q_proj is run on 2 inputs for 4000 tokens.*lora\.dropout: 0"):
        layer(mx.ones((2, 64)))
    layer.lora_a, layer.lora_b = mx.ones((64, 4)), mx.ones((4, 64)) / 4
    x = mx.ones((4000, 64))
    adapted = np.array(layer(x) - layer.linear(x)).mean()  # 2 is the scale: on average nothing is lost
    assert adapted == pytest.approx(2 * 64, rel=0.01)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intermediate", "scheme"),
    [
        (128, "affine4/64"),
        (96, "affine4/64 (12 of 14 linear layers), affine4/32 (2 of 14 linear layers)"),
        (72, "affine4/64 (12 of 14 linear layers)"),
    ],
)
def test_4bit_says_what_it_did(intermediate: int, scheme: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, intermediate_size=intermediate)
    session = opened(folder, quantize="4bit")
    assert session.scheme == scheme
    assert isinstance(session._forward.model.model.embed_tokens, nn.Embedding)
    assert isinstance(session._forward.model.lm_head, nn.Linear)
    difference = session.score(a_batch()).logprob - opened(folder).score(a_batch()).logprob
    assert 1e-4 < np.abs(difference).max() < 3
    losses = [session.step([a_batch()], 1e-2).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


def test_4bit_that_quantises_nothing_is_an_error(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, hidden_size=48, intermediate_size=72, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(BackendError, match="divisible by 32"):
        opened(folder, quantize="4bit")


def test_a_quantised_mlx_model_loads_as_it_is(llama: Path, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, config = load_model(llama)
    kept_whole = "up_proj"
    nn.quantize(model, 32, 8, class_predicate=lambda path, m: hasattr(m, "to_quantized") and kept_whole not in path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    settings = {"quantization": {"group_size": 32, "bits": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    for quantize in ("none", "4bit"):
        session = opened(tmp_path, quantize=quantize)
        assert session.scheme == "affine8/32 (12 of 14 linear layers)"
        assert session.lora_shapes == opened(llama).lora_shapes
        difference = session.score(a_batch()).logprob - opened(llama).score(a_batch()).logprob
        assert np.abs(difference).max() < 0.2
        assert np.isfinite(session.step([a_batch()], 1e-2).loss)


def test_a_bitsandbytes_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    save_file(load_file(llama / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(BackendError, match="bitsandbytes"):
        opened(tmp_path)


@pytest.mark.parametrize("change", [{"model_type": "no_such_family"}, {"model_file": "own.py"}, {"hidden_size": 32}])
def test_a_model_that_mlx_lm_cannot_load_is_a_backend_error(
    change: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')", encoding="utf-8")
    save_file(load_file(llama / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(BackendError, match=r"cannot load|model.remote_code"):
        opened(tmp_path)


def test_a_rope_that_mlx_lm_only_warns_about_is_an_error(tmp_path: Path) -> None:
    folder = family("phi3", tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "long_factor": [1.0] * 8}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BackendError, match="as it is"):
        opened(folder)


def test_a_bfloat16_base_keeps_its_activations_and_a_float32_adapter(llama: Path) -> None:
    session = opened(llama, dtype="bfloat16")
    layer = session._forward.model.layers[0].self_attn.q_proj
    assert (layer.linear.weight.dtype, layer.lora_a.dtype) == (mx.bfloat16, mx.float32)
    assert layer(mx.ones((1, 2, 64), mx.bfloat16)).dtype == mx.bfloat16
    assert session.step([a_batch()], 1e-2).loss == pytest.approx(opened(llama).step([a_batch()], 1e-2).loss, rel=0.02)
    assert all(tensor.dtype == np.float32 for tensor in session.get_state().moments.values())


def test_names_that_the_model_lacks_are_listed(llama: Path) -> None:
    model, _ = mlx_model.load(ModelSpec(llama), mx.float32)
    with pytest.raises(BackendError, match=r"layers\.9\.q_proj, model\.norm"):
        names = ("model.layers.0.self_attn.q_proj", "layers.9.q_proj", "model.norm")
        layers = {name: (Part(name, 0, 64),) for name in names}
        mlx_lora.attach(model, layers, LoraSpec(4, 8.0), mlx_lora.Dropout(0.0, 0, {}))


def test_opening_and_training_print_nothing(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = opened(llama, quantize="4bit")
    after_steps(session, 1)
    assert capfd.readouterr() == ("", "")


def test_only_the_last_blocks_are_adapted_and_trained(llama: Path) -> None:
    session = opened(llama, LoraSpec(4, 8.0, layers=1, targets=("q_proj", "down_proj")))
    assert list(session.lora_shapes) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert len(session._forward.model.trainable_parameters()["model"]["layers"][1]["mlp"]) > 0
    assert session.step([a_batch()], 1e-2).grad_norm > 0


# --- rotary embeddings, against transformers ----------------------------------------------------

_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
_SCALED = {"rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            "llama",
            {"rope_parameters": _SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
        ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": _LONG}),
        ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": _LONG}),
        ("granite", {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}),
        ("smollm3", {"no_rope_layers": [0, 1]}),
        (
            "gemma3_text",
            {
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
                },
            },
        ),
    ],
)
def test_rotary_settings_mean_what_they_mean_in_transformers(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, batch = family(name, tmp_path, **settings), a_batch(width=40)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprob = torch.log_softmax(model(torch.from_numpy(batch.inputs).long()).logits, dim=-1)
    expected = logprob.gather(-1, torch.from_numpy(batch.targets).long()[..., None])[..., 0].numpy() * batch.weights
    np.testing.assert_allclose(opened(folder).score(batch).logprob, expected, atol=1e-4)


# --- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_many_lengths_together_give_what_each_gives_alone(llama: Path, temperature: float) -> None:
    session, random = opened(llama), np.random.default_rng(0)
    after_steps(session)
    prompts = [random.integers(3, VOCAB, length).tolist() for length in (9, 1, 40, 3, 9, 17, 2, 30)]
    together = session.generate(prompts, 7, [4, 5, 6], temperature, seed=1)
    for place, prompt in enumerate(prompts):
        filler = [prompt] * place  # what is sampled depends on the place
        assert session.generate([*filler, prompt], 7, [4, 5, 6], temperature, seed=1)[-1] == together[place]


def test_generation_agrees_with_scoring_and_stops_before_the_stop_token(llama: Path) -> None:
    session = opened(llama)
    (tokens,) = session.generate([[5, 6, 7]], 6, [])
    whole = np.array([[5, 6, 7, *tokens]], dtype=np.int32)
    scores = session.score(Batch(whole[:, :-1], whole[:, 1:], np.ones((1, 8), np.float32)))
    assert scores.greedy[0, 2:].tolist() == tokens
    stop = tokens[3]
    assert session.generate([[5, 6, 7]], 6, [stop]) == [tokens[: tokens.index(stop)]]
    assert session.generate([[5, 6, 7]], 0, []) == [[]]
    with pytest.raises(ValueError, match="at least one token"):
        session.generate([[]], 3, [])

"""Ways in which MLX computes less than the whole model, each against the whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
rope_utils = pytest.importorskip("mlx_lm.models.rope_utils")
pytest.importorskip("torch")

from backends.interface import BackendError, Batch, LoraSpec, ModelSpec, OptimSpec  # noqa: E402
from backends.kept_states import Activations  # noqa: E402
from backends.micro_batches import joined  # noqa: E402
from backends.mlx_backend import attention as mlx_attention  # noqa: E402
from backends.mlx_backend import cpu_kernels as mlx_numpy  # noqa: E402
from backends.mlx_backend import head as mlx_head  # noqa: E402
from backends.mlx_backend import session as mlx_backend  # noqa: E402
from backends.mlx_backend.cpu_layers import _FAST  # noqa: E402
from backends.mlx_backend.lora import AdaptedLinear  # noqa: E402
from backends.mlx_backend.model import ignored_window  # noqa: E402
from tests.tiny_models import family, tiny_llama  # noqa: E402

VOCAB = 128
LORA = LoraSpec(4, 8.0)


@pytest.fixture(params=["numpy", "own"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By numpy's BLAS where this machine needs it, and by MLX's own, as on a GPU."""
    if request.param == "own":
        monkeypatch.setattr(mlx_backend, "use_blas", lambda model: None)
    return str(request.param)


def opened(folder: Path, lora: LoraSpec = LORA, **spec: Any) -> mlx_backend.MlxSession:
    session = mlx_backend.open(ModelSpec(folder, **spec), lora, OptimSpec(eps=1e-2), 0)
    state, random = session.get_state(), np.random.default_rng(1)
    adapter = {n: (random.standard_normal(v.shape) * 0.1).astype(np.float32) for n, v in state.adapter.items()}
    session.set_state(replace(state, adapter=adapter))
    return session


def a_batch(rows: int = 3, width: int = 24, answers: int = 3, seed: int = 0) -> Batch:
    """Rows of unequal length whose last few tokens are supervised."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, VOCAB, (rows, width + 1)).astype(np.int32)
    weights = np.zeros((rows, width), np.float32)
    for row in range(rows):
        end = width - 3 * row
        weights[row, end - 1 - row % answers : end] = 1
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def both(session: mlx_backend.MlxSession, whole: mlx_backend.MlxSession, batch: Batch) -> None:
    """One step and the scores after it are the same."""
    ours, theirs = session.step([batch], 1e-2), whole.step([batch], 1e-2)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    np.testing.assert_allclose(session.score(batch).logprob, whole.score(batch).logprob, atol=1e-4)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nll", [mlx_head.weighted_nll, mlx_numpy.weighted_nll])
def test_the_slope_of_the_loss_is_its_gradient(nll: Callable[..., Any]) -> None:
    random = np.random.default_rng(0)
    logits = mx.array(random.standard_normal((5, 7)).astype(np.float32) * 4)
    targets, shares = random.integers(0, 7, 5).astype(np.int32), random.random(5).astype(np.float32)

    def plain(x: Any) -> Any:
        return (mx.array(shares) * nn.losses.cross_entropy(x, mx.array(targets))).sum()

    wanted, gradient = mx.value_and_grad(plain)(logits)
    loss, slope = nll(logits, targets, shares)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(np.array(slope), np.array(gradient), atol=1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_the_loss_in_chunks_is_the_loss_at_once(name: str, tmp_path: Path) -> None:
    folder, batch = family(name, tmp_path), replace(a_batch(), weights=np.ones((3, 24), np.float32))
    whole, session = opened(folder), opened(folder)
    whole.step([batch], 1e-2), session.step([batch], 1e-2)
    wanted, scores = whole.step([batch], 1e-2), whole.score(batch)
    session._forward.head._at_once = VOCAB * 5  # five rows at once
    found = session.step([batch], 1e-2)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    np.testing.assert_allclose(session.score(batch).logprob, scores.logprob, atol=1e-5)


@pytest.mark.usefixtures("products")
def test_the_logits_of_a_step_never_exist_at_once(tmp_path: Path) -> None:
    batch = replace(a_batch(rows=8, width=30), weights=np.ones((8, 30), np.float32))
    session = opened(tiny_llama(tmp_path, vocab_size=30_000))
    session._forward.head._at_once = 30_000 * 4
    session.step([batch], 1e-3)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    session.step([batch], 1e-3)
    assert mx.get_peak_memory() - before < 0.6 * 240 * 30_000 * 4


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "longer", "none", "window", "rows"])
@pytest.mark.parametrize("attend", [mlx_attention.attend, mlx_numpy.attend])
def test_attention_and_its_gradient(attend: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for ops in (mlx_attention.MLX, mlx_numpy.NUMPY):
        monkeypatch.setattr(ops, "queries", 4)
    length, keys = (10, 15) if kind == "longer" else (10, 10)
    random = np.random.default_rng(0)
    q, k, v, slope = (
        mx.array(random.standard_normal((2, heads, size, 8)).astype(np.float32))
        for heads, size in ((6, length), (3, keys), (3, keys), (6, length))
    )
    window = (mx.arange(10)[:, None] >= mx.arange(10)) & (mx.arange(10)[:, None] < mx.arange(10) + 3)
    rows = mx.array(random.random((2, 1, 10, 10)) < 0.5) | mx.eye(10).astype(mx.bool_)
    mask = {"none": None, "window": window, "rows": rows}.get(kind, "causal")

    def plain(q: Any, k: Any, v: Any) -> Any:
        return (mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask) * slope).sum()

    wanted, gradients = mx.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v)
    found, ours = mx.value_and_grad(lambda *x: (attend(*x, 0.3, mask) * slope).sum(), argnums=(0, 1, 2))(q, k, v)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)
    for one, other in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-4)


def test_swiglu_by_numpy_and_its_gradient() -> None:
    random = np.random.default_rng(0)
    gate, x = (mx.array(random.standard_normal((2, 50, 8)).astype(np.float32) * 9) for _ in range(2))
    gate[0, 0, 0], gate[0, 0, 1] = 200.0, -200.0

    def plain(gate: Any, x: Any) -> Any:
        return (nn.silu(gate) * x * x).sum()

    wanted = mx.grad(plain, argnums=(0, 1))(gate, x)
    found = mx.grad(lambda gate, x: (mlx_numpy.swiglu(gate, x) * x).sum(), argnums=(0, 1))(gate, x)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        nn.RMSNorm(16, eps=1e-3),
        nn.RoPE(16, base=100.0),
        nn.RoPE(16, traditional=True),
        nn.RoPE(8),
        nn.RoPE(16, scale=0.25),
        rope_utils.YarnRoPE(16, scaling_factor=4.0, original_max_position_embeddings=8),
    ],
    ids=["norm", "plain", "in pairs", "half of the head", "scaled", "yarn"],
)
@pytest.mark.parametrize("offset", [0, 5, [3, 7]])
@pytest.mark.parametrize("turned", [False, True])
def test_modules_by_numpy_and_their_gradients(module: Any, offset: Any, turned: bool) -> None:
    kind, random = type(module), np.random.default_rng(0)
    x, slope = (mx.array(random.standard_normal((2, 3, 6, 16)).astype(np.float32)) for _ in range(2))
    if kind is nn.RMSNorm:
        module.weight, more = mx.array(random.standard_normal(16).astype(np.float32)), {}
    else:
        more = {"offset": mx.array(offset) if isinstance(offset, list) else offset}

    def run(x: Any) -> Any:
        return (module(x.swapaxes(1, 2) if turned else x, **more) * (slope.swapaxes(1, 2) if turned else slope)).sum()

    wanted = mx.value_and_grad(run)(x)
    module.__class__ = _FAST[kind]
    try:
        for _ in range(2):  # the second time with tables that are there
            for one, other in zip(mx.value_and_grad(run)(x), wanted, strict=True):
                np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-5)
    finally:
        module.__class__ = kind


def test_the_first_input_s_slope_is_not_computed_and_nothing_else_is_missing(tmp_path: Path) -> None:
    session, batch = opened(tiny_llama(tmp_path)), a_batch()
    spared = [name for name, layer in session._layers.items() if getattr(layer, "first", False)]
    if not mlx_numpy_is_used(session):
        assert not spared
        return
    assert sorted(name.rpartition("layers.0.")[2] for name in spared) == [f"self_attn.{n}_proj" for n in "kqv"]
    whole = opened(tmp_path)
    for layer in whole._layers.values():
        layer.__dict__["first"] = False
    assert session.step([batch], 1e-2).grad_norm == pytest.approx(whole.step([batch], 1e-2).grad_norm, rel=1e-6)


def mlx_numpy_is_used(session: mlx_backend.MlxSession) -> bool:
    return all(isinstance(layer, _FAST[AdaptedLinear]) for layer in session._layers.values())


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3", "phi3"])
def test_the_last_block_only_where_something_is_asked(name: str, tmp_path: Path) -> None:
    session, whole = opened(family(name, tmp_path)), opened(tmp_path)
    assert session._forward._tail is not None
    whole._forward._tail = None
    spread = a_batch(seed=1)
    spread.weights[1, 2] = 1.0  # far from the row's last: a window would be too wide
    for batch in (a_batch(), spread, a_batch(rows=1)):
        both(session, whole, batch)


@pytest.mark.usefixtures("products")
def test_frozen_blocks_are_computed_once_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lora = tiny_llama(tmp_path, num_hidden_layers=4), replace(LORA, layers=2)
    session, whole = opened(folder, lora), opened(folder, lora)
    whole._forward._kept = None
    kept, computed = session._forward._kept, []
    assert kept is not None
    once = kept._computed
    monkeypatch.setattr(kept, "_computed", lambda tokens: computed.append(len(tokens)) or once(tokens))
    for _ in range(3):
        both(session, whole, a_batch())
    assert computed == [24, 21, 18]  # up to the last supervised position, each row once


@pytest.mark.usefixtures("products")
def test_frozen_blocks_without_room_are_computed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lora = tiny_llama(tmp_path, num_hidden_layers=3), replace(LORA, layers=1)
    session, whole = opened(folder, lora), opened(folder, lora)
    whole._forward._kept = None
    monkeypatch.setattr(Activations, "put", lambda *_: None)
    for _ in range(2):
        both(session, whole, a_batch())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.usefixtures("products")
def test_prefixes_are_computed_once(name: str, tmp_path: Path) -> None:
    session, random = (
        opened(family(name, tmp_path, sliding_window=16 if "gemma" in name else None)),
        np.random.default_rng(2),
    )
    assert session.shares_prefixes
    whole = opened(tmp_path)
    whole.shares_prefixes = False
    long, short = (random.integers(3, VOCAB, size).astype(np.int32) for size in (17, 9))
    for prefixes, prefix_of in (((long, short), (1, 0, 1)), ((long,), (0, 0, 0))):
        both(session, whole, replace(a_batch(), prefixes=prefixes, prefix_of=prefix_of))


def test_what_cannot_share_says_so(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama")
    assert not opened(llama, checkpointing=True).shares_prefixes
    assert not opened(llama, replace(LORA, layers=1)).shares_prefixes
    gemma = opened(family("gemma2", tmp_path / "gemma2"))  # its own attention takes no mask for each row
    assert not gemma.shares_prefixes and gemma._forward._tail is None
    batch = replace(a_batch(), prefixes=(np.array([5, 6], np.int32),), prefix_of=(0, 0, 0))
    assert gemma.step([batch], 1e-3).loss == pytest.approx(opened(tmp_path / "gemma2").step([joined(batch)], 1e-3).loss)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3"])
def test_rows_longer_than_an_ignored_window_are_refused(name: str, tmp_path: Path) -> None:
    session = opened(family(name, tmp_path, sliding_window=12))
    short, long = a_batch(width=12), a_batch(width=13)
    session.step([short], 1e-3), session.score(short), session.generate([[5] * 8], 4, ())
    for refused in (lambda: session.step([long], 1e-3), lambda: session.score(long)):
        with pytest.raises(BackendError, match="max_length to at most 12"):
            refused()
    with pytest.raises(BackendError, match="sliding window of 12"):
        session.generate([[5] * 9], 4, ())
    assert session.get_state().step == 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("gemma3_text", {"sliding_window": 12}),
        ("qwen2", {"sliding_window": 12, "use_sliding_window": False}),
    ],
)
def test_other_windows_are_no_limit(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    session = opened(family(name, tmp_path, **settings))
    assert session._forward.window is None
    session.score(a_batch(width=20))


def test_a_config_without_layers_that_slide(tmp_path: Path) -> None:
    model = opened(tiny_llama(tmp_path))._forward.model
    config = {"model_type": "mistral", "sliding_window": 12}
    assert ignored_window(model, config) == 12
    assert ignored_window(model, config | {"layer_types": ["full_attention"]}) is None
    assert ignored_window(model, config | {"model_type": "qwen2"}) is None

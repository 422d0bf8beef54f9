"""The gated delta rule in chunks is the recurrence, token by token: output, state and every gradient."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

from mlx_lm.models.gated_delta import gated_delta_ops, gated_delta_update  # noqa: E402

from backends.mlx_backend import delta_chunks, delta_rule  # noqa: E402
from backends.predictions import DELTA_RULE  # noqa: E402
from backends.torch_backend.costs import DELTA_KERNEL  # noqa: E402
from backends.torch_backend.layers import delta_rule_of  # noqa: E402
from tests.conformance.toy import DROPPING, Case, close, random_adapter, toy_batch  # noqa: E402
from tests.tiny_families import published  # noqa: E402

Arrays = list[Any]
Rule = Callable[..., Any]


def inputs(rows: int, tokens: int, heads: int, values: int, dk: int, dv: int, kind: str = "") -> Arrays:
    """q, k, v, decay, beta and the state before the first token."""
    rng = np.random.default_rng(tokens)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    q, k = normal(rows, tokens, heads, dk) / dk, normal(rows, tokens, heads, dk)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = normal(rows, tokens, values, dv), normal(rows, values, dv, dk)
    decay, beta = -rng.exponential(0.1, (rows, tokens, values)), rng.random((rows, tokens, values))
    if kind == "repeated":  # a series in powers of the system would lose every digit here
        k[:, 1:], beta[:], decay[:] = k[:, :1], 1.0, 0.0
    if kind == "forgetting":
        decay[:, ::7], decay[:, 1::5] = -80.0, 0.0
    return [mx.array(x.astype(np.float32)) for x in (q, k, v, decay, beta, state)]


def by_token(q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> Any:
    return gated_delta_ops(q, k, v, mx.exp(decay), beta, state)


def results(rule: Rule, given: Arrays) -> list[np.ndarray]:
    """Output, last state, and the gradients by all that is given."""
    rng, shapes = np.random.default_rng(9), [x.shape for x in rule(*given)]
    upstream = [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    outputs, grads = mx.vjp(lambda *x: list(rule(*x)), given, upstream)
    return [np.array(x) for x in (*outputs, *grads)]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 1, 1, 1, 4, 4), ""),
        ((2, 37, 2, 4, 16, 8), ""),
        ((1, 64, 1, 2, 8, 16), "repeated"),
        ((2, 65, 2, 2, 8, 8), "forgetting"),
        ((1, 131, 1, 3, 8, 8), "repeated"),
        ((3, 200, 2, 4, 16, 16), ""),
    ],
)
def test_chunks_are_the_recurrence_with_every_gradient(
    shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_chunks, "_AT_ONCE", 128)  # several parts
    given = inputs(*shape, kind)
    for name, ours, theirs in zip(
        ("output", "state", "q", "k", "v", "decay", "beta", "first state"),
        results(delta_rule.delta_rule, given),
        results(by_token, given),
        strict=True,
    ):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max() + 1e-7, name


@pytest.mark.parametrize("kind", ["right", "left", "none", "negative", "bfloat16"])
def test_it_takes_the_place_of_mlx_lms_function(kind: str) -> None:
    q, k, v, a, b, state = inputs(2, 20, 2, 4, 16, 8)
    heads = [mx.array(np.linspace(-1, 1, 4).astype(np.float32))] * 2
    mask, more = None, {}
    if kind in ("right", "left"):
        mask = mx.array(np.arange(20)[None] < [[20], [13]]) if kind == "right" else mx.array(np.arange(20)[None] >= 6)
    if kind == "negative":
        more = {"allow_neg_eigval": True}
    if kind == "bfloat16":
        q, k, v, a, b = (x.astype(mx.bfloat16) for x in (q, k, v, a, b))
    rule = delta_rule.DeltaRule(_Nothing())

    def called(function: Rule) -> list[np.ndarray]:
        def loss(*x: Any) -> Any:
            out, last = function(*x[:5], *heads, x[5], mask, use_kernel=False, **more)
            assert (out.dtype, last.dtype) == (q.dtype, mx.float32)
            seen = out.astype(mx.float32) if mask is None else mx.where(mask[..., None, None], out, 0.0)
            return (seen * mx.sin(mx.arange(seen.size).reshape(seen.shape))).sum() + (last * last).sum(), last

        (total, last), grads = mx.value_and_grad(loss, argnums=range(6))(q, k, v, a, b, state)
        return [np.array(x.astype(mx.float32)) for x in (total, last, *grads)]

    near = 2e-2 if kind == "bfloat16" else 1e-5
    for ours, theirs in zip(called(rule), called(gated_delta_update), strict=True):
        assert np.abs(ours - theirs).max() <= near * np.abs(theirs).max()


class _Nothing:
    def modules(self) -> list[Any]:
        return []


@pytest.mark.usefixtures("products")
def test_memory_grows_with_tokens_and_not_with_states() -> None:
    """Of 64 x 64 numbers a state and head: the loop keeps one a token, which is 16 times all its inputs."""

    def peak(rule: Rule, tokens: int) -> int:
        given = inputs(1, tokens, 1, 1, 64, 64)
        mx.eval(given)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda *x: rule(*x)[0].sum(), argnums=range(5))(*given))
        return int(mx.get_peak_memory() - before)

    short, long = peak(delta_rule.delta_rule, 2048), peak(delta_rule.delta_rule, 4096)
    own = 4 * (4 * 64 + 2) * 4  # bytes of a token: inputs, output, and the gradients of all of them, with copies
    assert (long - short) / 2048 < 3 * own < 64 * 64 * 4
    assert peak(delta_rule.delta_rule, 1024) < peak(by_token, 512)


def opened(backend: str, folder: Path, **spec: Any) -> Any:
    session = Case(backend, folder).open(lora=DROPPING, **spec)
    session.set_state(random_adapter(session))
    return session


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_scores_and_answers_as_with_the_loop(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batch = published("qwen3_5", tmp_path), toy_batch(4, 37)
    ours = opened("mlx", folder, checkpointing=checkpointing)
    monkeypatch.setattr(delta_rule, "rebound", lambda *_: False)
    loop = opened("mlx", folder, checkpointing=checkpointing)
    assert DELTA_RULE in ours.shortcuts and DELTA_RULE not in loop.shortcuts
    np.testing.assert_allclose(ours.score(batch).logprob, loop.score(batch).logprob, atol=1e-4)
    one, other = ours.step([batch], 1e-2), loop.step([batch], 1e-2)
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    close(ours.get_state(), loop.get_state(), 2e-3)
    prompts = [[5, 9, 3] * 7, [4, 8], [7] * 19]
    assert ours.generate(prompts, 6, []) == loop.generate(prompts, 6, [])


def test_a_model_without_the_rule_names_no_such_shortcut(tiny_folder: Path) -> None:
    assert all(DELTA_RULE not in Case(backend, tiny_folder).open().shortcuts for backend in ("torch", "mlx"))


@pytest.mark.slow
def test_training_is_several_times_as_fast_as_the_loop() -> None:
    """512 tokens and 8 heads of 128 x 128, as Qwen3.5's; in processor time, on one core."""
    given = inputs(1, 512, 8, 8, 128, 128)

    def seconds(rule: Rule) -> float:
        began = time.process_time()
        mx.eval(mx.grad(lambda *x: (rule(*x)[0] ** 2).sum(), argnums=range(5))(*given))
        return time.process_time() - began

    ours = min(seconds(delta_rule.delta_rule) for _ in range(3))
    assert seconds(by_token) > 5 * ours  # 10 to 17 on a core that others share


# --- torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_transformers_form_is_the_recurrence_at_odd_lengths(tokens: int) -> None:
    """Chunk-wise and differentiable, by transformers itself where flash-linear-attention is not installed."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    given = inputs(2, tokens, 2, 4, 16, 8)
    q, k, v, decay, beta, state = given
    scaled = [q * 16**0.5, k, v, decay, beta, state.swapaxes(-1, -2)]  # it scales queries itself
    leaves = [torch.from_numpy(np.array(x)).requires_grad_() for x in scaled]
    out, last = torch_chunk_gated_delta_rule(*leaves[:5], initial_state=leaves[5], output_final_state=True)
    rng = np.random.default_rng(9)
    upstream = [rng.standard_normal(x.shape).astype(np.float32) for x in by_token(*given)]
    grads = torch.autograd.grad([out, last], leaves, [torch.from_numpy(upstream[0]), torch.from_numpy(upstream[1]).mT])
    found = [out, last.mT, grads[0] * 16**0.5, *grads[1:5], grads[5].mT]
    for ours, theirs in zip(found, results(by_token, given), strict=True):
        assert np.abs(ours.detach().numpy() - theirs).max() <= 2e-5 * np.abs(theirs).max() + 1e-7


@pytest.mark.parametrize(("code", "runs"), [("raise ImportError('no CUDA')", False), (None, True)])
def test_the_librarys_kernels_are_named_where_transformers_calls_them(
    code: str | None, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not where the library is installed and cannot be imported."""
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
    from transformers.models.qwen3_5 import modeling_qwen3_5

    own = modeling_qwen3_5.torch_chunk_gated_delta_rule
    (tmp_path / "fla" / "ops").mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").write_text(code or "from fla import ops")
    (tmp_path / "fla" / "ops" / "__init__.py").write_text("from fla.ops import gated_delta_rule")
    (tmp_path / "fla" / "ops" / "gated_delta_rule.py").write_text("def chunk_gated_delta_rule(query): ...")
    monkeypatch.syspath_prepend(tmp_path)
    bound = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(unwrap(own))
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", bound)
    model = torch.nn.ModuleList([modeling_qwen3_5.Qwen3_5RMSNorm(4)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        del sys.modules[name]
    assert delta_rule_of(model) == [DELTA_KERNEL if runs else DELTA_RULE]


def test_torch_pads_and_says_which_form_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    session = opened("torch", published("qwen3_5", tmp_path))
    assert DELTA_RULE in session.shortcuts
    batch = toy_batch(3, 21)
    alone = [
        session.score(replace(batch, inputs=batch.inputs[n : n + 1], targets=batch.targets[n : n + 1],
                              weights=batch.weights[n : n + 1])).logprob[0]
        for n in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(session.score(batch).logprob, np.stack(alone), atol=1e-5)
    assert "slower" not in capfd.readouterr().err  # the run says it, transformers need not

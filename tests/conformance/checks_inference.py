"""Promises of `open`, `score`, `generate`, `get_state` and `set_state`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from backends import registry
from backends.adapter_state import initial_adapter
from backends.interface import BackendError, Batch, IncompatibleState, LoraSpec, Session, TrainState
from backends.micro_batches import joined, own_part
from backends.model_folder import ModelFolder
from tests.conformance.toy import (
    DROPPING,
    LORA,
    VOCABULARY,
    Case,
    begun,
    differ,
    identical,
    prefixed,
    random_adapter,
    registered,
    taken_away,
    toy_batch,
    without_b,
    without_layers,
)

BATCH = toy_batch()
PROMPTS = [[5, 9, 33], [7], [101, 4, 4, 62, 8]]


def check_names_shapes_and_types(case: Case) -> None:
    session = case.open(seed=5)
    modules = ModelFolder.open(case.folder).lora_modules(LORA)
    assert dict(session.lora_shapes) == modules
    assert (session.scheme == "none") == (case.quantize == "none")
    assert session.device and session.peak_bytes() > 0
    assert type(session.shortcuts) is tuple and set(session.shortcuts) <= set(
        registry.shortcuts(registered(case.backend))
    )
    free = session.free_bytes()
    assert free is None or free > 0
    state, wanted = session.get_state(), initial_adapter(modules, LORA.rank, seed=5)
    assert state.step == 0 and set(state.adapter) == set(wanted)
    assert set(state.moments) == {f"{name}.{kind}" for name in wanted for kind in ("exp_avg", "exp_avg_sq")}
    for name, value in wanted.items():
        np.testing.assert_array_equal(state.adapter[name], value)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert not state.moments[f"{name}.{kind}"].any()
    for array in (*state.adapter.values(), *state.moments.values()):
        assert isinstance(array, np.ndarray) and array.dtype == np.float32


def check_only_the_chosen_layers_are_adapted(case: Case) -> None:
    lora = LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "down_proj"), layers=1)
    session = case.open(lora=lora)
    assert set(session.lora_shapes) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    session.step([BATCH], 1e-2)


def check_what_cannot_be_had_is_refused(case: Case) -> None:
    with pytest.raises(BackendError, match="no_such_proj"):
        case.open(lora=replace(LORA, targets=("q_proj", "no_such_proj")))
    with pytest.raises(BackendError):
        replace(case, folder=case.folder / "nowhere").open()


def check_scores_are_of_supervised_positions(case: Case) -> None:
    scores = begun(case).score(BATCH)
    assert scores.logprob.dtype == np.float32 and scores.greedy.dtype == np.int32
    assert scores.logprob.shape == scores.greedy.shape == BATCH.weights.shape
    silent = BATCH.weights == 0
    assert (scores.logprob[~silent] < 0).all()
    assert not scores.logprob[silent].any() and not scores.greedy[silent].any()
    nothing = begun(case).score(replace(BATCH, weights=BATCH.weights * 0))
    assert not nothing.logprob.any() and not nothing.greedy.any()


def check_scores_are_log_probabilities(case: Case) -> None:
    """Over every possible target they sum to one, and greedy is the best of them."""
    session = begun(case)
    vocabulary = np.arange(128, dtype=np.int32)
    inputs = np.tile(BATCH.inputs[:1, :4], (128, 1))
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    targets[:, -1], weights[:, -1] = vocabulary, 1
    scores = session.score(Batch(inputs, targets, weights))
    assert np.exp(scores.logprob[:, -1].astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
    assert set(scores.greedy[:, -1]) == {int(scores.logprob[:, -1].argmax())}


def check_scoring_is_the_same_every_time(case: Case) -> None:
    session = begun(case, lora=DROPPING)
    first = session.score(BATCH).logprob
    np.testing.assert_array_equal(session.score(BATCH).logprob, first)
    session.step([BATCH], 0.0)
    np.testing.assert_array_equal(session.score(BATCH).logprob, first)
    np.testing.assert_allclose(begun(case).score(BATCH).logprob, first, atol=1e-6)  # dropout is for training


def check_zero_b_is_the_base(case: Case) -> None:
    session = case.open()
    base = session.score(BATCH).logprob
    state = random_adapter(session)
    session.set_state(state)
    assert np.abs(session.score(BATCH).logprob - base).max() > 1e-2
    session.set_state(without_b(state))
    np.testing.assert_allclose(session.score(BATCH).logprob, base, atol=1e-6)


def check_the_scale_is_alpha_over_rank(case: Case) -> None:
    """One adapter in three spellings: twice B at half alpha, and zero rows up to twice the rank at twice alpha."""
    session = begun(case)
    wanted, adapter = session.score(BATCH).logprob, session.get_state().adapter
    half = case.open(lora=replace(LORA, alpha=LORA.alpha / 2))
    half.set_state(TrainState(0, {n: v * (2 if n.endswith("B") else 1) for n, v in adapter.items()}, {}))
    np.testing.assert_allclose(half.score(BATCH).logprob, wanted, atol=1e-4)
    tall = case.open(lora=replace(LORA, rank=LORA.rank * 2, alpha=LORA.alpha * 2))
    grown = {n: np.concatenate([v, v * 0], axis=1 if n.endswith("B") else 0) for n, v in adapter.items()}
    tall.set_state(TrainState(0, grown, {}))
    np.testing.assert_allclose(tall.score(BATCH).logprob, wanted, atol=1e-4)


def check_base_weights_are_what_is_multiplied_with(case: Case) -> None:
    """An adapter of full rank that takes them away leaves layers that give nothing."""
    session = case.open(lora=LoraSpec(rank=64, alpha=64.0))
    weights = {module: session.base_weight(module) for module in session.lora_shapes}
    assert {module: weight.shape for module, weight in weights.items()} == dict(session.lora_shapes)
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    session.set_state(taken_away(weights))
    for module, weight in weights.items():  # the adapter is no part of them, and they are copies
        np.testing.assert_array_equal(session.base_weight(module), weight)
        weight[:] = 0
    supervised = BATCH.weights > 0
    wanted = without_layers(case)[BATCH.inputs, BATCH.targets]
    np.testing.assert_allclose(session.score(BATCH).logprob[supervised], wanted[supervised], atol=2e-5)
    with pytest.raises(BackendError, match="no_such_proj"):
        session.base_weight("model.layers.0.no_such_proj")


def check_state_goes_out_and_in(case: Case) -> None:
    session = begun(case)
    session.step([BATCH], 1e-2)
    state, trained, scores = session.get_state(), session.trained(), session.score(BATCH).logprob
    kept = {name: value.copy() for name, value in state.adapter.items()}
    fresh = case.open(seed=8)
    fresh.set_state(state)
    identical(fresh.get_state(), state)
    np.testing.assert_array_equal(fresh.score(BATCH).logprob, scores)
    session.step([BATCH], 1e-2)
    assert not differ(state, TrainState(0, kept, {})), "a later step changed a state that was handed out"
    assert differ(state, session.get_state())
    assert not differ(TrainState(0, trained, {}), TrainState(0, kept, {})), (
        "what trains, and later steps change no copy"
    )
    now = session.get_state()
    session.set_trained(trained)
    identical(session.get_state(), replace(now, adapter=trained))
    np.testing.assert_array_equal(session.score(BATCH).logprob, scores)
    for value in state.adapter.values():
        value[:] = 0
    np.testing.assert_array_equal(fresh.score(BATCH).logprob, scores)


def check_what_does_not_fit_is_refused(case: Case) -> None:
    session = begun(case)
    session.step([BATCH], 1e-2)
    state = session.get_state()
    names = list(state.adapter)
    adapter = dict(state.adapter)
    adapter["elsewhere.lora_A"] = adapter.pop(names[0])
    adapter[names[1]] = adapter[names[1]].T.copy()
    moments = dict(state.moments)
    del moments[f"{names[2]}.exp_avg"]
    with pytest.raises(IncompatibleState) as refusal:
        session.set_state(TrainState(5, adapter, moments))
    for name in (names[0], names[1], "elsewhere.lora_A", f"{names[2]}.exp_avg"):
        assert name in str(refusal.value)
    identical(session.get_state(), state)


def check_greedy_generation_agrees_with_scores(case: Case) -> None:
    session = begun(case)
    completions = session.generate(PROMPTS, 6, stop=())
    assert [len(completion) for completion in completions] == [6, 6, 6]
    assert session.generate(PROMPTS, 0, stop=()) == [[], [], []] and session.generate([], 4, stop=()) == []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert session.generate([prompt], 6, stop=()) == [completion]
        assert _greedy(session, prompt, completion) == completion


def _greedy(session: Session, prompt: list[int], completion: list[int]) -> list[int]:
    tokens = np.array([[*prompt, *completion]], np.int32)
    weights = np.zeros((1, tokens.shape[1] - 1), np.float32)
    weights[0, len(prompt) - 1 :] = 1
    return session.score(Batch(tokens[:, :-1], tokens[:, 1:], weights)).greedy[0, len(prompt) - 1 :].tolist()


def check_generation_stops(case: Case) -> None:
    session = begun(case)
    whole = session.generate(PROMPTS, 6, stop=())
    stop = {whole[0][2], whole[1][0]}
    for completion, short in zip(whole, session.generate(PROMPTS, 6, stop), strict=True):
        end = next((place for place, token in enumerate(completion) if token in stop), 6)
        assert short == completion[:end]


def check_sampling_follows_its_seed(case: Case) -> None:
    session = begun(case)
    drawn = [session.generate(PROMPTS, 8, (), temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(0 <= token < 128 and type(token) is int for row in drawn[0] for token in row)
    assert session.generate(PROMPTS, 4, (), temperature=1e-4) == session.generate(PROMPTS, 4, ())


def check_shared_prefixes_change_no_score(case: Case) -> None:
    session, batch = begun(case), prefixed()
    alone = own_part(session.score(joined(batch)), batch)
    shared = session.score(batch)
    np.testing.assert_allclose(shared.logprob, alone.logprob, atol=2e-5)
    np.testing.assert_array_equal(shared.greedy, alone.greedy)
    assert not shared.logprob[batch.weights == 0].any() and not shared.greedy[batch.weights == 0].any()


def check_generation_from_a_shared_start(case: Case) -> None:
    session = begun(case)
    start = np.random.default_rng(5).integers(0, VOCABULARY, 40).tolist()
    prompts = [[*start, *prompt] for prompt in PROMPTS]
    together = session.generate(prompts, 6, ())
    assert together == [session.generate([prompt], 6, ())[0] for prompt in prompts]

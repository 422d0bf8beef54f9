"""Promises of `step`: each check takes a case and fails with an AssertionError where one is broken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from backends import dropout
from backends.interface import Batch, NonFinite, OptimSpec, TrainState
from backends.micro_batches import joined
from tests.conformance.toy import (
    DROPPING,
    LORA,
    OPTIM,
    VOCABULARY,
    Case,
    begun,
    close,
    differ,
    identical,
    mean_nll,
    padded,
    part,
    prefixed,
    random_adapter,
    toy_batch,
    without_b,
)

BATCH = toy_batch()
OTHER = toy_batch(seed=1)
LR = 1e-2


def check_loss_is_the_mean_of_scores(case: Case) -> None:
    session = begun(case)
    expected = mean_nll(session, BATCH)
    result = session.step([BATCH], LR)
    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.tokens == np.count_nonzero(BATCH.weights)
    assert type(result.loss) is float and type(result.tokens) is int and type(result.grad_norm) is float


def check_a_token_outside_the_vocabulary_is_refused(case: Case) -> None:
    session = begun(case)
    before = session.get_state()
    wrong = BATCH.inputs.copy()
    wrong[0, 1] = VOCABULARY
    long = prefixed()
    for batch in (
        replace(BATCH, inputs=wrong),
        replace(BATCH, targets=wrong),
        replace(BATCH, inputs=BATCH.inputs - VOCABULARY),
        replace(long, prefixes=(long.prefixes[0] + VOCABULARY, *long.prefixes[1:])),
    ):
        for call in (lambda batch=batch: session.step([BATCH, batch], LR), lambda batch=batch: session.score(batch)):
            with pytest.raises(ValueError, match=f"vocabulary of {VOCABULARY}"):
                call()
    for prompt in ([5, VOCABULARY], [-1, 5], []):
        with pytest.raises(ValueError, match="token"):
            session.generate([[5], prompt], 3, ())
    identical(session.get_state(), before)
    assert session.step([BATCH], LR).tokens == np.count_nonzero(BATCH.weights)


def check_padding_changes_nothing(case: Case) -> None:
    plain, wide = begun(case, lora=DROPPING), begun(case, lora=DROPPING)
    scores, wide_scores = plain.score(BATCH), wide.score(padded(BATCH, 3))
    rows, width = BATCH.inputs.shape
    np.testing.assert_allclose(wide_scores.logprob[:rows, :width], scores.logprob, atol=2e-5)
    ours, theirs = plain.step([BATCH], LR), wide.step([padded(BATCH, 3)], LR)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5) and theirs.tokens == ours.tokens
    close(wide.get_state(), plain.get_state())


def check_shared_prefixes_change_no_step(case: Case) -> None:
    shared, alone = begun(case, lora=DROPPING), begun(case, lora=DROPPING)
    for batch in (prefixed(), replace(OTHER, prefixes=prefixed().prefixes[:1], prefix_of=(0,) * len(OTHER.inputs))):
        ours, theirs = shared.step([batch, BATCH], LR), alone.step([joined(batch), BATCH], LR)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.tokens == theirs.tokens
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    close(shared.get_state(), alone.get_state())


def check_top_layers_learn_the_same_from_rows_seen_again(case: Case) -> None:
    """What a session keeps of frozen layers below the adapter is exact, also for rows cut or padded otherwise."""
    lora = replace(DROPPING, layers=1)
    kept = case.open(lora=lora)
    kept.set_state(random_adapter(kept))
    for _ in range(3):
        fresh = case.open(lora=lora)
        fresh.set_state(kept.get_state())
        for batches in ([BATCH], [part(BATCH, 3, 1), padded(part(BATCH, 4, 0, 2), 3)]):
            ours, theirs = kept.step(batches, LR), fresh.step(batches, LR)
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mean_nll(kept, OTHER) == pytest.approx(mean_nll(fresh, OTHER), rel=1e-5)
        close(kept.get_state(), fresh.get_state())


def check_splitting_changes_nothing(case: Case) -> None:
    for lora in (LORA, DROPPING):
        whole = begun(case, lora=lora)
        expected = [whole.step([batch], LR) for batch in (BATCH, OTHER)]
        for rows in ([[0], [1, 2, 3, 4]], [[4, 3], [2], [1, 0]]):
            split = begun(case, lora=lora)
            results = [split.step([part(batch, *chosen) for chosen in rows], LR) for batch in (BATCH, OTHER)]
            for result, wanted in zip(results, expected, strict=True):
                assert result.loss == pytest.approx(wanted.loss, rel=1e-5)
                assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
                assert result.tokens == wanted.tokens
            close(split.get_state(), whole.get_state(), 1e-4)


def check_a_micro_batch_without_supervision_is_nothing(case: Case) -> None:
    empty = Batch(BATCH.inputs, BATCH.targets, BATCH.weights * 0)
    alone, beside = begun(case, lora=DROPPING), begun(case, lora=DROPPING)
    assert beside.step([BATCH, empty], LR).loss == pytest.approx(alone.step([BATCH], LR).loss, rel=1e-6)
    close(beside.get_state(), alone.get_state())
    before = alone.get_state()
    with pytest.raises(ValueError):
        alone.step([empty], LR)
    identical(alone.get_state(), before)


def check_weights_weigh(case: Case) -> None:
    """Twice every weight is the same mean; a row of half the weight counts half."""
    plain, twice = begun(case), begun(case)
    doubled = replace(BATCH, weights=BATCH.weights * 2)
    assert twice.step([doubled], LR).loss == pytest.approx(plain.step([BATCH], LR).loss, rel=1e-5)
    close(twice.get_state(), plain.get_state())


def check_weights_below_zero_turn_the_gradient(case: Case) -> None:
    """With a total of its own, a step's gradient is linear in the weights."""
    optim = OptimSpec(betas=(0.0, 0.0), clip_norm=None)
    signs = np.array([[1.0], [-0.5], [0.25], [-1.0], [1.0]], np.float32)
    mixed = replace(BATCH, weights=BATCH.weights * signs)
    first = {}
    for name, batch, total in (
        ("mixed", mixed, 2.0),
        ("above", replace(BATCH, weights=mixed.weights.clip(min=0)), 2.0),
        ("below", replace(BATCH, weights=-mixed.weights.clip(max=0)), 2.0),
        ("plain", BATCH, None),
        ("sum", BATCH, float(BATCH.weights.sum())),
    ):
        session = begun(case, optim=optim)
        session.step([batch], 0.0, total)
        moments = session.get_state().moments
        first[name] = {key: value for key, value in moments.items() if key.endswith("exp_avg")}
    for key, value in first["mixed"].items():
        limit = 1e-4 * max(float(np.abs(first["above"][key]).max()), 1e-9)
        assert np.abs(value - (first["above"][key] - first["below"][key])).max() <= limit
        np.testing.assert_allclose(first["sum"][key], first["plain"][key], rtol=1e-4, atol=limit)


def check_zero_rate_changes_no_weight(case: Case) -> None:
    session = begun(case, optim=replace(OPTIM, weight_decay=0.1))
    before = session.get_state()
    session.step([BATCH], 0.0)
    after = session.get_state()
    assert not differ(before, after)
    assert after.step == before.step + 1
    assert any(value.any() for value in after.moments.values())


def check_the_base_stays_frozen(case: Case) -> None:
    session = case.open()
    base = session.score(BATCH).logprob
    for _ in range(3):
        session.step([BATCH], LR)
    assert not np.array_equal(session.score(BATCH).logprob, base)
    session.set_state(without_b(session.get_state()))
    np.testing.assert_array_equal(session.score(BATCH).logprob, base)


def check_the_update_is_adamw(case: Case) -> None:
    """Two steps against the formula; the gradient is recovered from the first moment."""
    optim = OptimSpec(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, clip_norm=None)
    session = begun(case, optim=optim)
    old = session.get_state()
    for number, batch in enumerate((BATCH, OTHER), start=1):
        norm = session.step([batch], LR).grad_norm
        new = session.get_state()
        squares = 0.0
        for name, weight in old.adapter.items():
            m, v = (np.float64(old.moments[f"{name}.{kind}"]) for kind in ("exp_avg", "exp_avg_sq"))
            grad = (new.moments[f"{name}.exp_avg"] - 0.8 * m) / 0.2
            squares += float((grad**2).sum())
            v = 0.95 * v + 0.05 * grad**2
            np.testing.assert_allclose(new.moments[f"{name}.exp_avg_sq"], v, rtol=1e-3, atol=1e-3 * v.max())
            m_hat = new.moments[f"{name}.exp_avg"] / (1 - 0.8**number)
            v_hat = new.moments[f"{name}.exp_avg_sq"] / (1 - 0.95**number)
            wanted = weight * (1 - LR * 0.1) - LR * m_hat / (np.sqrt(v_hat) + 1e-3)
            np.testing.assert_allclose(new.adapter[name], wanted, atol=LR * 1e-4)
        assert norm == pytest.approx(squares**0.5, rel=1e-3)
        assert new.step == number
        old = new


def check_clipping_is_by_the_global_norm(case: Case) -> None:
    free, clipped, loose = (begun(case, optim=replace(OPTIM, clip_norm=limit)) for limit in (None, 0.05, 1e6))
    norm = free.step([BATCH], LR).grad_norm
    assert norm > 0.05
    assert clipped.step([BATCH], LR).grad_norm == pytest.approx(norm, rel=1e-5)
    loose.step([BATCH], LR)
    close(loose.get_state(), free.get_state())
    whole, small = free.get_state().moments, clipped.get_state().moments
    for name in (name for name in whole if name.endswith("exp_avg")):
        wanted = whole[name] * (0.05 / (norm + 1e-6))
        np.testing.assert_allclose(small[name], wanted, atol=1e-4 * np.abs(wanted).max())


def check_fifty_steps_halve_the_loss(case: Case) -> None:
    session = case.open(lora=replace(LORA, rank=8, alpha=16.0), optim=OptimSpec())
    losses = [session.step([BATCH, OTHER], LR).loss for _ in range(50)]
    assert losses[-1] < losses[0] / 2
    assert mean_nll(session, BATCH) < losses[0] / 2


def check_dropout_acts_and_changes_with_every_step(case: Case) -> None:
    session = begun(case, lora=DROPPING)
    expected = mean_nll(session, BATCH)
    first, second = (session.step([BATCH], 0.0).loss for _ in range(2))
    assert len({round(first, 5), round(second, 5), round(expected, 5)}) == 3
    ours, theirs = (begun(case, lora=DROPPING, seed=seed).step([BATCH], 0.0).loss for seed in (0, 1))
    assert ours == first and theirs != first
    twins = begun(case, lora=DROPPING).step([BATCH, BATCH], 0.0).loss
    assert twins != first, "equal rows of one step have the same dropout"


def check_dropout_is_the_one_that_is_defined(case: Case) -> None:
    """Every module's mask, read from its gradient by A, in which a dropped input has no part at all.

    One token alone is supervised; of the last block's modules, only keys and values are asked of the token before it.
    """
    for seed, step, row, position in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 7, 0, 0), (0, 0, 3, 0), (0, 0, 0, 1)):
        session = case.open(lora=replace(LORA, dropout=0.4), seed=seed)
        session.set_state(replace(random_adapter(session), step=step))
        tokens = np.arange(5, 6 + position, dtype=np.int32)[None]
        weights = (np.arange(1 + position) == position).astype(np.float32)[None]
        session.step([Batch(tokens, tokens + 4, weights, rows=(row,))], 0.0)
        grads, modules = session.get_state().moments, session.lora_shapes
        words = dropout.token_words(seed, step, dropout.places([row], np.array([position]), 1, 0))
        seen = 0
        for (module, (_, inputs)), keys in zip(
            modules.items(), dropout.keys(words, dropout.module_words(modules)), strict=True
        ):
            kept = np.abs(grads[f"{module}.lora_A.exp_avg"]).sum(0) > 0  # [in]
            others = ".layers.0." in module or module.endswith(("k_proj", "v_proj"))
            if not kept.any() or (position and others):  # what a token attends to, if to one alone, is no choice
                continue
            seen += 1
            expected = dropout.mask(keys, inputs, 0.4)[0]
            assert np.array_equal(kept, expected), f"{module}: seed {seed}, step {step}, row {row}, at {position}"
        assert seen >= 4


def check_dropout_keeps_the_mean(case: Case) -> None:
    """What is kept is divided by 1 - p: near the base, where the loss is linear, dropout leaves its mean alone."""
    trained = case.open()
    base = mean_nll(trained, BATCH)
    for _ in range(2):
        trained.step([BATCH], 1e-3)
    dropping = case.open(lora=replace(LORA, dropout=0.5))
    dropping.set_state(trained.get_state())
    losses = [dropping.step([BATCH], 0.0).loss for _ in range(12)]
    assert (np.mean(losses) - base) / (mean_nll(trained, BATCH) - base) == pytest.approx(1, abs=0.25)


def check_equal_seeds_give_equal_bytes(case: Case) -> None:
    states = []
    for seed in (3, 3, 4):
        session = case.open(lora=DROPPING, seed=seed)
        for batch in (BATCH, OTHER, BATCH):
            session.step([batch], LR)
        states.append(session.get_state())
    identical(states[0], states[1])
    assert differ(states[0], states[2])


def check_resuming_is_exact(case: Case) -> None:
    optim = OptimSpec(weight_decay=0.01)
    whole = case.open(lora=DROPPING, optim=optim)
    losses = [whole.step([BATCH, OTHER], LR).loss for _ in range(4)]
    first = case.open(lora=DROPPING, optim=optim)
    halves = [first.step([BATCH, OTHER], LR).loss for _ in range(2)]
    second = case.open(lora=DROPPING, optim=optim)
    second.set_state(first.get_state())
    halves += [second.step([BATCH, OTHER], LR).loss for _ in range(2)]
    assert halves == losses
    identical(second.get_state(), whole.get_state())


def check_looking_does_not_disturb(case: Case) -> None:
    """Scoring, generating and reading the state between steps leave the training as it would have been."""
    quiet, watched = (case.open(lora=DROPPING) for _ in range(2))
    for batch in (BATCH, OTHER, BATCH):
        watched.score(BATCH)
        watched.generate([[1, 2, 3], [4]], 3, {2}, temperature=1.0, seed=5)
        watched.get_state()
        assert watched.step([batch], LR) == quiet.step([batch], LR)
    identical(watched.get_state(), quiet.get_state())


def check_sessions_do_not_disturb_each_other(case: Case) -> None:
    alone = case.open(lora=DROPPING)
    losses = [alone.step([BATCH], LR).loss for _ in range(3)]
    one, two = case.open(lora=DROPPING), case.open(lora=DROPPING, seed=9)
    beside = []
    for _ in range(3):
        two.step([OTHER], 0.1)
        beside.append(one.step([BATCH], LR).loss)
    assert beside == losses
    identical(one.get_state(), alone.get_state())


def check_what_is_not_finite_is_not_applied(case: Case) -> None:
    session = begun(case)
    session.step([BATCH], LR)
    good = session.get_state()
    poisoned = {name: value.copy() for name, value in good.adapter.items()}
    next(iter(poisoned.values()))[0, 0] = np.nan
    session.set_state(TrainState(good.step, poisoned, good.moments))
    before = session.get_state()
    with pytest.raises(NonFinite):
        session.step([BATCH], LR)
    identical(session.get_state(), before)
    session.set_state(good)
    fresh = begun(case)
    fresh.step([BATCH], LR)
    assert session.step([OTHER], LR) == fresh.step([OTHER], LR)


def check_a_blow_up_is_not_applied(case: Case) -> None:
    session = begun(case, optim=OptimSpec(clip_norm=None))
    with pytest.raises(NonFinite):
        for _ in range(4):
            before = session.get_state()
            session.step([BATCH], 1e38)
    identical(session.get_state(), before)
    assert all(np.isfinite(value).all() for value in before.adapter.values())


def check_checkpointing_changes_nothing(case: Case) -> None:
    plain, frugal = (case.open(lora=DROPPING, checkpointing=flag) for flag in (False, True))
    for session in (plain, frugal):
        session.set_state(random_adapter(session))
    for batch in (BATCH, OTHER):
        assert frugal.step([batch], LR).loss == pytest.approx(plain.step([batch], LR).loss, rel=1e-5)
    close(frugal.get_state(), plain.get_state())
    np.testing.assert_allclose(frugal.score(BATCH).logprob, plain.score(BATCH).logprob, atol=2e-5)

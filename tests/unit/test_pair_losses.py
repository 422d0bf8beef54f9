"""Pairs of answers: the losses of DPO and ORPO, their gradients, and the steps that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec, Session, TrainState
from backends.micro_batches import few_prefixes
from finetune.data.rows import Example
from finetune.evaluation.pair_losses import DPO, ORPO, PairLoss
from finetune.evaluation.pairs import referred, scored_pairs
from finetune.training.objective import Preference
from tests.unit.data.test_preference_rows import pair
from tests.unit.toy_run import result_of

LOSSES: dict[str, PairLoss] = {"dpo": DPO(0.3), "orpo": ORPO(0.3)}
BETA = 0.3
either = pytest.mark.parametrize("loss", LOSSES)


def session(folder: Path, backend: str) -> Session:
    spec, lora = ModelSpec(folder, dtype="float32"), LoraSpec(4, 8.0)
    live = registry.open_session(backend, spec, lora, OptimSpec(eps=1e-4), 0)
    rng = np.random.default_rng(5)
    state = live.get_state()
    adapter = {
        name: (0.1 * rng.standard_normal(value.shape)).astype(np.float32) for name, value in state.adapter.items()
    }
    live.set_state(TrainState(0, adapter, {}))
    return live


def pairs(count: int = 4) -> list[Example]:
    """Some with a prompt that is shared, some with a short one; with references of their own."""
    made = [pair((40, 10, 50, 4)[i % 4], 3 + i, 8 - i, seed=i) for i in range(count)]
    return list(referred(made, -20.0 + np.random.default_rng(1).standard_normal((count, 2))))


def steps(
    live: Session, examples: list[Example], count: int, micro_tokens: int = 4096, loss: str = "dpo"
) -> list[float]:
    objective, told = Preference(LOSSES[loss]), []
    for number in range(count):
        chosen = [examples[i] for i in ((0, 1), (2, 3), (1, 3))[number % 3]]
        micro = objective.batches(chosen, micro_tokens, live.shares_prefixes)
        told.append(objective.step(live, chosen, micro, 5e-3).loss)
    return told


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_pairs_are_computed_some_at_a_time_where_a_device_asks_for_it(backend: str, tiny_folder: Path) -> None:
    """Prompts that are shared too: else all of a batch would be in memory at once."""
    if reason := registry.probe(backend):
        pytest.skip(reason)
    whole, few = session(tiny_folder, backend), session(tiny_folder, backend)
    examples = list(referred([pair(40 + 3 * i, 3 + i, 8 - i, seed=i) for i in range(5)], np.full((5, 2), -20.0)))
    (batch,) = Preference(LOSSES["dpo"]).batches(examples, 4096, True)
    holder: Any = few if backend == "torch" else few._forward  # type: ignore[attr-defined]
    for tokens, at_once in ((1, [1] * 5), (200, [2, 2, 1]), (300, [3, 2]), (10**6, [5])):
        holder._tokens_at_once = tokens
        cut = list(few_prefixes(batch, tokens))
        assert [len(part.prefixes) for _, part in cut] == at_once
        assert sorted(row for rows, _ in cut for row in rows) == list(range(10))
        for rows, part in cut:
            for place, row in enumerate(rows):
                owner = part.prefixes[part.prefix_of[place]]
                np.testing.assert_array_equal(owner, batch.prefixes[batch.prefix_of[row]])
                np.testing.assert_array_equal(part.inputs[place], batch.inputs[row])
                assert part.rows[place] == batch.rows[row]
        np.testing.assert_allclose(few.score(batch).logprob, whole.score(batch).logprob, atol=2e-5)
    holder._tokens_at_once = 200
    for live in (whole, few):
        objective = Preference(LOSSES["dpo"])
        objective.step(live, examples, objective.batches(examples, 4096, True), 5e-3)
    for name, value in whole.get_state().moments.items():
        np.testing.assert_allclose(few.get_state().moments[name], value, atol=1e-5 * max(np.abs(value).max(), 1e-9))


@either
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("logprobs", [(-40.0, -1.0), (-1.0, -40.0), (-3.0, -2.9), (-0.02, -0.5), (-700.0, -0.01)])
def test_the_slope_is_the_derivative_of_the_loss(logprobs: tuple[float, float], side: int, loss: str) -> None:
    """By finite differences of one answer's log-probability."""
    examples = pairs(1)
    ends = []
    for step in (1e-5, -1e-5):
        moved = np.array([logprobs])
        moved[0, side] += step
        ends.append(LOSSES[loss].losses(examples, moved)[0])
    exact = LOSSES[loss].slopes(examples, np.array([logprobs]))[0, side]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_an_answer_that_is_certain_has_a_finite_loss() -> None:
    """Its odds have no bound, and float32 rounds such a probability to 1."""
    for logprobs in ((0.0, -5.0), (-5.0, 0.0), (0.0, 0.0)):
        one = pairs(1), np.array([logprobs])
        assert np.isfinite(LOSSES["orpo"].losses(*one)).all() and np.isfinite(LOSSES["orpo"].slopes(*one)).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "mlx"])
def test_the_loss_of_the_model_itself_is_ln_2(backend: str, tiny_folder: Path) -> None:
    live = session(tiny_folder, backend)
    examples = pairs()
    own = list(referred(examples, result_of(scored_pairs(live, examples, 4096, ""))))
    assert steps(live, own, 1)[0] == pytest.approx(np.log(2), abs=1e-6)


@either
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_twenty_steps_are_those_of_the_formula_in_plain_torch(tiny_folder: Path, loss: str) -> None:
    """transformers, PEFT, torch's own AdamW and gradient, every row alone: within 1e-4."""
    torch, peft, transformers = (pytest.importorskip(one) for one in ("torch", "peft", "transformers"))
    live, examples = session(tiny_folder, "torch"), pairs()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    leaves = sorted({module.rsplit(".", 1)[-1] for module in live.lora_shapes})
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=leaves))
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    with torch.no_grad():
        for name, value in live.get_state().adapter.items():
            named[name].copy_(torch.from_numpy(value))
    optimiser = torch.optim.AdamW(named.values(), lr=5e-3, eps=1e-4, weight_decay=0.0)

    def logprob(one: Example) -> Any:
        tokens = torch.from_numpy(one.tokens.astype(np.int64))
        logs = torch.log_softmax(model(input_ids=tokens[None, :-1]).logits[0], -1)
        return (logs.gather(-1, tokens[1:, None])[:, 0] * torch.from_numpy(one.weights[1:])).sum()

    theirs = []
    for number in range(20):
        total = 0.0
        for example in (examples[i] for i in ((0, 1), (2, 3), (1, 3))[number % 3]):
            assert example.rejected is not None
            better, worse, sigmoid = logprob(example), logprob(example.rejected), torch.nn.functional.logsigmoid
            if loss == "dpo":
                change = better - example.under_base - (worse - example.rejected.under_base)
                total = total - sigmoid(BETA * change) / 2
            else:  # as the paper writes it, by probabilities
                better, worse = better / example.weights.sum(), worse / example.rejected.weights.sum()
                odds = [one.exp() / (1 - one.exp()) for one in (better, worse)]
                total = total - (better + BETA * sigmoid(torch.log(odds[0] / odds[1]))) / 2
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimiser.step()
        theirs.append(float(total.detach()))
    np.testing.assert_allclose(steps(live, examples, 20, loss=loss), theirs, rtol=1e-4, atol=1e-5)


@either
def test_all_backends_take_the_same_steps_however_pairs_are_cut(tiny_folder: Path, loss: str) -> None:
    ours = steps(session(tiny_folder, "torch"), pairs(), 12, loss=loss)
    for backend, micro_tokens in (("mlx", 4096), ("torch", 1)):
        told = steps(session(tiny_folder, backend), pairs(), 12, micro_tokens, loss)
        np.testing.assert_allclose(told, ours, rtol=1e-4)
    assert ours[-1] < ours[2]

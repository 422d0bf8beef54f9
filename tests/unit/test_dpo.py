"""Direct preference optimisation: its loss, its gradient, whole runs, and what is measured of pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec, Session, TrainState
from finetune.check.proof import without_rows
from finetune.data.rows import Example
from finetune.disk.run_folder import RunFolder, create
from finetune.errors import ExitCode
from finetune.evaluation.pairs import losses, margins, pulls, referred, scored_pairs
from finetune.events import Event, StepDone
from finetune.recipe.load import load_recipe
from finetune.training.objective import Preference
from tests.end_to_end.command import Work
from tests.unit.data.test_compared import pair
from tests.unit.test_wrong_resume import RECIPE, finetune
from tests.unit.toy_run import load_job, result_of, run_to_report

PAIRED = RECIPE.replace("lora: {rank: 2, alpha: 4}", "lora: {rank: 2, alpha: 4}\npreferences: {}").replace(
    "steps: 3", "steps: 6, learning_rate: 0.02"
)
BETA = 0.3


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"what is {i}?", "chosen": f"a fine film {i}", "rejected": "a dull cold film"}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A working folder with one finished run, `run`."""
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    model = model_with_tokenizer(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=1)
    work = Work(tmp_path_factory.mktemp("work"), model)
    work.lines("rows.jsonl", rows(12))
    work.lines("valid.jsonl", rows(7, 100))
    work.recipe(PAIRED)
    finetune(work, "train", "recipe.yaml", "output=runs").good()
    next((work.folder / "runs").glob("recipe-*")).rename(work.folder / "run")
    return work


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


def steps(live: Session, examples: list[Example], count: int, micro_tokens: int = 4096) -> list[float]:
    objective, told = Preference(BETA), []
    for number in range(count):
        chosen = [examples[i] for i in ((0, 1), (2, 3), (1, 3))[number % 3]]
        micro = objective.batches(chosen, micro_tokens, live.shares_prefixes)
        told.append(objective.step(live, chosen, micro, 5e-3).loss)
    return told


@pytest.mark.parametrize("margin", [-40.0, -1.0, 0.0, 2.0, 700.0])
def test_the_pull_is_the_derivative_of_the_loss(margin: float) -> None:
    """By finite differences of the worse answer's log-probability."""
    ends = [losses(margins(np.array([[margin, sign * 1e-4]]), np.zeros((1, 2)), BETA))[0] for sign in (1, -1)]
    exact = pulls(margins(np.array([[margin, 0.0]]), np.zeros((1, 2)), BETA), BETA)[0]
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(exact, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch", "mlx"])
def test_the_loss_of_the_model_itself_is_ln_2(backend: str, tiny_folder: Path) -> None:
    live = session(tiny_folder, backend)
    examples = pairs()
    own = list(referred(examples, result_of(scored_pairs(live, examples, 4096, ""))))
    assert steps(live, own, 1)[0] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_twenty_steps_are_those_of_the_formula_in_plain_torch(tiny_folder: Path) -> None:
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
            change = logprob(example) - example.under_base, logprob(example.rejected) - example.rejected.under_base
            total = total - torch.nn.functional.logsigmoid(BETA * (change[0] - change[1])) / 2
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimiser.step()
        theirs.append(float(total.detach()))
    np.testing.assert_allclose(steps(live, examples, 20), theirs, rtol=1e-4, atol=1e-5)


def test_mlx_and_torch_take_the_same_steps_however_pairs_are_cut(tiny_folder: Path) -> None:
    ours = steps(session(tiny_folder, "torch"), pairs(), 12)
    for live, micro_tokens in ((session(tiny_folder, "mlx"), 4096), (session(tiny_folder, "torch"), 1)):
        np.testing.assert_allclose(steps(live, pairs(), 12, micro_tokens), ours, rtol=1e-4)
    assert ours[-1] < ours[2]


def test_a_run_measures_pairs_before_and_after(made: Work) -> None:
    report = json.loads((made.folder / "run" / "report.json").read_text())
    assert report["base"]["loss"] == pytest.approx(np.log(2), abs=1e-6) and report["base"]["pairs"]["margin"] == 0
    assert report["tuned"]["loss"] < report["base"]["loss"] and report["tuned"]["pairs"]["margin"] > 0
    assert report["tuned"]["pairs"]["rewarded"] > 0.5 and report["tuned"]["interval"] is not None
    assert report["validations"][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    said = (made.folder / "run" / "report.txt").read_text()
    assert "preference accuracy" in said and "loss, nats/pair" in said


def test_a_model_of_all_rows_but_none_is_the_run_s_own(made: Work) -> None:
    """Its pairs have the references of the model without its adapter: without them its margins would be others."""
    job = load_job(load_recipe(made.folder / "recipe.yaml"))
    again = result_of(without_rows(job, job.open(), RunFolder(made.folder / "run"), (), 60.0))
    run = json.loads((made.folder / "run" / "report.json").read_text())["tuned"]
    assert (again.loss, again.pairs.margin) == pytest.approx((run["loss"], run["pairs"]["margin"]), abs=1e-6)


def test_commands_take_a_run_of_pairs(made: Work) -> None:
    run = json.loads((made.folder / "run" / "report.json").read_text())
    finetune(made, "eval", "run").good()
    again = json.loads((made.folder / "run" / "eval.json").read_text())
    for model in ("base", "tuned"):
        assert again[model]["accuracy"] == run[model]["accuracy"]
        assert again[model]["pairs"]["margin"] == pytest.approx(run[model]["pairs"]["margin"], abs=1e-5)
    finetune(made, "generate", "run", "what is 5?", "--max-tokens", "3").good()
    assert "pairs of unequal length" in finetune(made, "check", "recipe.yaml").good().out
    assert "preferences" in finetune(made, "plan", "recipe.yaml").good().out
    finetune(made, "init", "rows.jsonl", "--output", "begun.yaml", "--model", "model").good()
    started = load_recipe(made.folder / "begun.yaml", ["backend=reference", "quantize=none"])
    assert started.preferences is not None and started.lora.dropout == 0
    assert len(load_job(started).prepared.train.examples) + len(load_job(started).prepared.valid.examples) == 12


@pytest.mark.parametrize(
    ("key", "said"),
    [("lora.dropout=0.1", "without chance"), ("task=generation", "remove it"), ("head={}", "no label"),
     ("evaluate.swaps=pronouns", "not asked again")],
)  # fmt: skip
def test_recipes_that_pairs_do_not_fit_are_refused(made: Work, key: str, said: str) -> None:
    answer = finetune(made, "train", "recipe.yaml", key)
    assert answer.code == ExitCode.RECIPE and said in answer.err


@pytest.mark.parametrize("after", [None, 1, 4])
def test_a_run_of_pairs_that_goes_on_ends_with_the_same_bytes(made: Work, after: int | None, tmp_path: Path) -> None:
    """after: the step it was stopped after; None: while the pairs were scored."""
    job = load_job(load_recipe(made.folder / "recipe.yaml", [f"output={tmp_path}"]))
    run = create(job.recipe, "stopped")
    with pytest.raises(Exception, match="stopped"):
        run_to_report(job, run, stop=lambda event: _is_due(event, after))
    run_to_report(load_job(load_recipe(run.recipe)), run, resume=True)
    for name in ("references.json", "adapter/adapter_model.safetensors", "evaluation-tuned.json"):
        assert (run.path / name).read_bytes() == (made.folder / "run" / name).read_bytes(), name


def _is_due(event: Event, after: int | None) -> bool:
    if after is None:
        return getattr(event, "what", "") == "references: loss"
    return isinstance(event, StepDone) and event.step == after


def test_a_prompt_that_is_shortened_for_one_answer_alone_leaves_the_pair_out(made: Work, tmp_path: Path) -> None:
    long = [*rows(3), {"prompt": "what is this? " * 20, "chosen": "a film", "rejected": "a fine warm film " * 5}]
    made.lines("long.jsonl", long)
    settings = ["data.train=" + str(made.folder / "long.jsonl"), "train.max_length=48", "data.max_dropped=0.5"]
    job = load_job(load_recipe(made.folder / "recipe.yaml", [*settings, "train.batch_size=2"]))
    assert len(job.prepared.train.examples) == 3
    assert "raise train.max_length" in job.prepared.train.dropped[-1][1]
    assert all(replace(one, rejected=None) and one.rejected for one in job.prepared.train.examples)

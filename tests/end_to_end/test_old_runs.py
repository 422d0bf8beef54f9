"""Runs that an earlier version made stay readable: what it stopped goes on, what it finished is measured and asked.

The run folders are in tests/assets/old_runs, made by tests/assets/make_old_run.py. A run that goes on must end with the
loss curve and the adapter of the one that the earlier version ran to its end. On the reference backend that is to the
byte, where numpy rounds as it did on the day they were made; elsewhere it is to rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from tests.assets.make_old_run import (
    ANSWER_TOKENS,
    CASES,
    OLD_RUNS,
    WAS,
    arithmetic,
    last_step,
    lay_out,
    write_model,
)
from tests.end_to_end.command import Answer, Work

NAMES = [name for name in CASES if (OLD_RUNS / name).is_dir()]
PEFT_FILE = "adapter/adapter_model.safetensors"


class OldJob(Work):
    """The toy job of a case, made again, with copies of its kept runs in runs/, and what the commands said of them."""

    def __init__(self, name: str, folder: Path) -> None:
        (folder / "made").mkdir()
        lay_out(name, folder / "made")
        super().__init__(folder / "work", folder / "made" / "model")
        for file in (folder / "made").iterdir():
            if file.is_file():
                shutil.copy(file, self.folder)
        self.kept = OLD_RUNS / name
        self.facts = json.loads((self.kept / "facts.json").read_text())
        self.backend = CASES[name].backend
        self.other_masks = CASES[name].dropout > 0
        self.exact = self.backend == "reference" and self.facts["arithmetic"] == arithmetic()
        self.finished, self.stopped = self.copy("finished"), self.copy("stopped")
        self.changed = {change.__name__: self.copy("stopped", change.__name__) for change in CHANGES}
        for change in CHANGES:
            change(self, self.changed[change.__name__])
        self.answers = self._ask()

    def copy(self, which: str, name: str = "") -> Path:
        run = self.folder / "runs" / (name or which)
        shutil.copytree(self.kept / which, run)
        for path in run.rglob("*"):
            if path.is_file() and WAS.encode() in (data := path.read_bytes()):
                path.write_bytes(data.replace(WAS.encode(), str(self.folder).encode()))
        return run

    def _ask(self) -> dict[str, Answer]:
        """All commands in one process: it is the start that takes time."""
        run, prompt = str(self.finished), self.facts["prompt"]
        commands = {
            "resume": ["resume", str(self.stopped)],
            "eval other rows": ["eval", run, "--data", "valid.jsonl"],
            "eval": ["eval", run],
            "generate": ["generate", run, prompt, "--max-tokens", str(ANSWER_TOKENS)],
            "generate base": ["generate", run, prompt, "--max-tokens", str(ANSWER_TOKENS), "--base"],
            "resume finished": ["resume", run],
            "start": ["train", "recipe.yaml", f"lora.start_from={run}/adapter", "train.steps=1", "output=others"],
            **{name: ["resume", str(changed)] for name, changed in self.changed.items()},
        }
        return dict(zip(commands, self.several(*commands.values()), strict=True))


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.slow] * (n in ("classification-plain", "chat-torch"))) for n in NAMES],
)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OldJob:
    if CASES[request.param].backend == "torch":
        pytest.importorskip("torch")
    return OldJob(request.param, tmp_path_factory.mktemp("old"))


def curve(run: Path) -> list[list[float]]:
    """Step, loss, gradient norm, learning rate and tokens of every step, as metrics.jsonl has them."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    return [[one[part] for part in parts] for one in events if "grad_norm" in one]


def validations(run: Path) -> list[list[float]]:
    told = json.loads((run / "report.json").read_text())["validations"]
    return [[one[part] for part in ("step", "loss", "token_accuracy")] for one in told]


def assert_same_end(run: Path, old: Path, exact: bool, other_masks: bool = False) -> None:
    """The adapter, the loss curve and the validations of the earlier version's whole run.

    other_masks: dropout is not what it was, so only what was done before is the same, and the end is as good.
    """
    if other_masks:
        ours, theirs = curve(run), curve(old)
        half = min(len(ours), 6)  # its last checkpoint but one, where the last is damaged
        assert ours[:half] == theirs[:half] and len(ours) == len(theirs)
        assert validations(run)[-1][1] == pytest.approx(validations(old)[-1][1], rel=0.1)
        return
    if exact:
        assert (run / PEFT_FILE).read_bytes() == (old / PEFT_FILE).read_bytes(), "the adapters differ"
        assert curve(run) == curve(old), "the loss curves differ"
        assert validations(run) == validations(old), "the validations differ"
        return
    ours, theirs = load_file(run / PEFT_FILE), load_file(old / PEFT_FILE)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-4, err_msg=key)
    np.testing.assert_allclose(curve(run), curve(old), rtol=1e-4, err_msg="the loss curves")
    np.testing.assert_allclose(validations(run), validations(old), rtol=1e-4, err_msg="the validations")


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def test_a_run_that_was_stopped_goes_on_to_the_same_end(job: OldJob) -> None:
    half = job.kept / "stopped"
    assert len(curve(half)) == last_step(half) < len(curve(job.finished)), "the kept run is no part of the other"
    job.answers["resume"].good()
    assert_same_end(job.stopped, job.finished, job.exact, job.other_masks)
    if job.other_masks:
        assert curve(job.stopped) != curve(job.finished)
        return
    assert report(job.stopped)["tuned"]["loss"] == pytest.approx(report(job.finished)["tuned"]["loss"], rel=1e-4)


def test_a_finished_run_is_measured_again_to_the_old_figures(job: OldJob) -> None:
    told = report(job.finished)
    answer = job.answers["eval"].good()
    assert "on 5 rows" in answer.out
    assert told["comparison"]["verdict"].split(":")[0] in answer.out
    now = json.loads((job.finished / "eval.json").read_text())
    for which in ("base", "tuned"):
        for figure in ("rows", "loss", "token_accuracy", "accuracy"):
            assert now[which][figure] == pytest.approx(told[which][figure], rel=1e-4), f"{which} {figure}"
    assert "on 5 rows" in job.answers["eval other rows"].good().out


def test_a_finished_run_is_asked_and_answers_as_it_did(job: OldJob) -> None:
    assert job.answers["generate"].good().out == job.facts["answer"]
    assert job.answers["generate base"].good().out != job.facts["answer"]
    assert "is finished" in job.answers["resume finished"].good().out


def test_its_adapter_is_a_start(job: OldJob) -> None:
    """The first validation is of the adapter, as the old run last measured it."""
    job.answers["start"].good()
    (run,) = (job.folder / "others").iterdir()
    best = min(loss for _, loss, _ in validations(job.finished))
    assert validations(run)[0][1] == pytest.approx(best, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_loads_its_adapter(job: OldJob) -> None:
    """Every tensor finds its place; and the tuned model gives each held-out answer the loss that the old run told."""
    torch, peft, transformers = (pytest.importorskip(one) for one in ("torch", "peft", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.float32)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        model = peft.PeftModel.from_pretrained(model, job.finished / "adapter").eval()
    held = peft.get_peft_model_state_dict(model)
    kept = load_file(job.finished / PEFT_FILE)
    assert {name: value.tolist() for name, value in held.items()} == {n: v.tolist() for n, v in kept.items()}
    if job.backend == "reference":
        return  # its base is not the folder's
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.finished / "adapter")
    rows = [json.loads(line) for line in (job.finished / "rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["prompt"].count("assistant") == 1]  # of others an earlier answer counts too
    assert len(rows) == 4
    for row in rows:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row["prompt"], row["expected"] + "<|im_end|>")
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(answer))
        assert float(loss) == pytest.approx(row["tuned"]["loss"], rel=1e-4), row["place"]


# Changes to a copy of the stopped run, each of which must be refused or seen.


def sealed(checkpoint: Path) -> None:
    """The manifest written anew, so that a changed file is no damage."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), sha256(data).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"step-{last_step(run):08d}"


def other_identity(job: OldJob, run: Path) -> None:
    """The checkpoint alone says another rank."""
    _replace(newest(run) / "identity.json", '"lora.rank": 2', '"lora.rank": 4')
    sealed(newest(run))


def other_recipe(job: OldJob, run: Path) -> None:
    _replace(run / "recipe.yaml", "seed: 0", "seed: 1")


def other_base(job: OldJob, run: Path) -> None:
    write_model(run / "base", seed=1)
    _replace(run / "recipe.yaml", f"{job.folder / 'model'}\n", f"{run / 'base'}\n")


def other_rows(job: OldJob, run: Path) -> None:
    shutil.copy(job.folder / "train.jsonl", run)
    _replace(run / "train.jsonl", "film 3", "film 9")
    _replace(run / "recipe.yaml", f"{job.folder / 'train.jsonl'}\n", f"{run / 'train.jsonl'}\n")


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new, 1))


def damaged(job: OldJob, run: Path) -> None:
    file = newest(run) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def forgetful(job: OldJob, run: Path) -> None:
    """The optimiser's moments are lost, and nothing says so."""
    file = newest(run) / "state.safetensors"
    tensors = load(file.read_bytes())
    moments = [name for name in tensors if "exp_avg" in name]
    assert moments, "no moments in the checkpoint"
    file.write_bytes(save({name: value * (name not in moments) for name, value in tensors.items()}))
    sealed(newest(run))


REFUSED = {
    other_identity: "lora.rank",
    other_recipe: "seed",
    other_base: "base model weights",
    other_rows: "data rows",
}
CHANGES: tuple[Callable[[OldJob, Path], None], ...] = (*REFUSED, damaged, forgetful)


def test_what_does_not_belong_to_it_is_refused(job: OldJob) -> None:
    for change, said in REFUSED.items():
        assert said in job.answers[change.__name__].failed(8), change.__name__


def test_a_damaged_checkpoint_gives_way_to_the_one_before(job: OldJob) -> None:
    job.answers["damaged"].good()
    assert_same_end(job.changed["damaged"], job.finished, job.exact, job.other_masks)


def test_a_resume_that_forgets_would_be_seen(job: OldJob) -> None:
    """Planted: without the moments the run ends well, and not the same."""
    job.answers["forgetful"].good()
    if job.other_masks:
        return
    for exact in {job.exact, False}:
        with pytest.raises(AssertionError):
            assert_same_end(job.changed["forgetful"], job.finished, exact)


def test_the_toy_model_is_made_the_same_for_ever(tmp_path: Path) -> None:
    """A run knows its base by these bytes: whatever else fails, this says whether the toy has changed."""
    write_model(tmp_path / "model")
    found = sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert found == "0428209ed16143bd379cc315ca3febb3280d76f78d482b6de94b7873dea45c8d"

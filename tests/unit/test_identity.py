"""Each change of what a result depends on is refused with exit 8 and named; what changes nothing is not refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.disk import digests
from finetune.events import result_of
from tests.end_to_end.command import Work
from tests.unit.test_wrong_resume import finetune

RECIPE = """
data: {train: train.jsonl, valid: valid.jsonl, test: test.jsonl}
prompt: {template: plain}
lora: {rank: 2, alpha: 4}
train: {steps: 2, batch_size: 4, checkpoint_every: 1}
backend: reference
"""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two shards, rows, and one finished run."""
    pytest.importorskip("torch")
    from tests.tiny_models import model_with_tokenizer

    folder = tmp_path_factory.mktemp("work")
    made = model_with_tokenizer(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=1)
    work = Work(folder, made)
    (folder / "model").unlink()
    shutil.copytree(made, folder / "model")
    in_shards(folder / "model")
    (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 2}')
    for name, first in (("train.jsonl", 0), ("valid.jsonl", 20), ("test.jsonl", 40)):
        work.lines(name, [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(first, first + 8)])
    work.recipe(RECIPE)
    finetune(work, "train", "recipe.yaml").good()
    return folder


def in_shards(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    where = {name: SHARDS[number % 2] for number, name in enumerate(sorted(weights))}
    for shard in SHARDS:
        chosen = {name: value for name, value in weights.items() if where[name] == shard}
        save_file(chosen, model / shard, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture
def work(done: Path, tmp_path: Path) -> Work:
    """A copy of all of it; the run was killed after its last checkpoint."""
    copy = Work(tmp_path / "copy", done / "model")
    (copy.folder / "model").unlink()
    shutil.copytree(done, copy.folder, dirs_exist_ok=True)
    run = copy.runs()[0]
    (run / "report.json").unlink()
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(done), str(copy.folder)))
    return copy


# Changes of the model's folder.


def quietly(file: Path, change: Callable[[bytearray], None]) -> None:
    """Bytes changed in place, and the times put back."""
    before, data = file.stat(), bytearray(file.read_bytes())
    change(data)
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def zeroed_but_for_samples(model: Path) -> None:
    """All that 0.1.0 did not look at: 64 samples of 4 KiB."""
    for shard in SHARDS:
        file, size = model / shard, (model / shard).stat().st_size
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")

        def change(data: bytearray, header: int = header, size: int = size) -> None:
            keep = np.zeros(size, bool)
            keep[:header] = True
            for sample in range(64):
                start = header + max(0, size - header - 4096) * sample // 63
                keep[start : start + 64] = True  # these weights are small, so less of each sample is kept
            for at in np.flatnonzero(~keep).tolist():
                data[at] = 0

        quietly(file, change)


def one_bit(model: Path) -> None:
    def change(data: bytearray) -> None:
        data[-5] ^= 1

    quietly(model / SHARDS[1], change)


def other_shard(model: Path) -> None:
    weights = load_file(model / SHARDS[0])
    save_file({name: value * 2 for name, value in weights.items()}, model / SHARDS[0], metadata={"format": "pt"})


def edited(name: str, **values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | values))

    return change


def other_rope(model: Path) -> None:
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    file.write_text(json.dumps(config))


def added_token(model: Path) -> None:
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"content": "film"})
    file.write_text(json.dumps(tokenizer))


def other_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")


CHANGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights zeroed": (zeroed_but_for_samples, f"base model weights: {SHARDS[0]} has changed"),
    "one bit": (one_bit, f"base model weights: {SHARDS[1]} has changed"),
    "one shard replaced": (other_shard, f"base model weights: {SHARDS[0]} has changed"),
    "rope_theta": (other_rope, "config.json, rope_parameters.rope_theta: the run has 10000.0, the model now has 20000"),
    "rms_norm_eps": (edited("config.json", rms_norm_eps=0.1), "rms_norm_eps: the run has 1e-06, the model now has 0.1"),
    "a new key": (
        edited("config.json", quantization_config={"quant_method": "x", "bits": 8}),
        "config.json, quantization_config.bits: the run has no such key, the model now has 8",
    ),
    "added token": (added_token, "tokenizer.json has changed"),
    "tokenizer's settings": (edited("tokenizer_config.json", padding_side="x"), "tokenizer_config.json has changed"),
    "chat template": (other_template, "chat_template.jinja"),
    "end token": (edited("generation_config.json", eos_token_id=[2, 3]), "eos_token_id: the run has 2, the model now"),
}


@pytest.mark.parametrize("command", ["resume", "eval", "generate", "chat"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_model_is_refused(work: Work, change: str, command: str) -> None:
    make, said = CHANGED[change]
    make(work.folder / "model")
    more = ["a film"] if command == "generate" else []
    assert said in finetune(work, command, str(work.runs()[0]), *more).failed(8)


# What changes nothing.


def touched(work: Work) -> None:
    for file in (work.folder / "model").iterdir():
        os.utime(file)


def moved(work: Work) -> None:
    (work.folder / "model").rename(work.folder / "elsewhere")
    recipe = work.runs()[0] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{work.folder}/model\n", f"{work.folder}/elsewhere\n"))


def other_order(work: Work) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = work.folder / "model" / name
        file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=7))


def with_files_beside(work: Work) -> None:
    (work.folder / "model" / "README.md").write_text("# A model\n")
    (work.folder / "model" / "notes.json").write_text("{}")


def saved_elsewhere(work: Work) -> None:
    edited("config.json", _name_or_path="a/b", transformers_version="9.9")(work.folder / "model")


@pytest.mark.parametrize("change", [touched, moved, other_order, with_files_beside, saved_elsewhere])
def test_what_changes_nothing_is_no_refusal(work: Work, change: Callable[[Work], None]) -> None:
    change(work)
    run = str(work.runs()[0])
    finetune(work, "resume", run).good()
    finetune(work, "eval", run).good()
    finetune(work, "generate", run, "a film").good()


# Rows.


def lines(work: Work, name: str) -> list[str]:
    return (work.folder / name).read_text().splitlines(keepends=True)


def a_validation_row_trained_on(work: Work) -> None:
    train, valid = lines(work, "train.jsonl"), lines(work, "valid.jsonl")
    (work.folder / "train.jsonl").write_text("".join([*train, valid[0]]))
    (work.folder / "valid.jsonl").write_text("".join(valid[1:]))


def a_test_row_validated_on(work: Work) -> None:
    valid, test = lines(work, "valid.jsonl"), lines(work, "test.jsonl")
    (work.folder / "valid.jsonl").write_text("".join([*valid, test[0]]))
    (work.folder / "test.jsonl").write_text("".join(test[1:]))


def rows_in_another_order(work: Work) -> None:
    (work.folder / "train.jsonl").write_text("".join(reversed(lines(work, "train.jsonl"))))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (a_validation_row_trained_on, ("train", "valid")),
        (a_test_row_validated_on, ("valid", "test")),
        (rows_in_another_order, ("train",)),
    ],
)
def test_rows_that_move_are_refused_by_the_splits_name(
    work: Work, change: Callable[[Work], None], named: tuple[str, ...]
) -> None:
    change(work)
    run = str(work.runs()[0])
    said = finetune(work, "resume", run).failed(8)
    assert [name for name in ("train", "valid", "test") if f"data rows of {name}" in said] == list(named)
    if "test" in named:
        finetune(work, "eval", run, "--data", "test.jsonl").good()
    finetune(work, "eval", run).good()  # on the rows that the run recorded


def test_an_adapter_to_start_from_that_changed_is_refused(work: Work) -> None:
    start = work.folder / "start"
    shutil.copytree(work.runs()[0] / "adapter", start)
    finetune(work, "train", "recipe.yaml", f"lora.start_from={start}").good()
    run = work.runs()[-1]
    (run / "report.json").unlink()
    file = start / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert "lora.start_from: the adapter there has changed" in finetune(work, "resume", str(run)).failed(8)


# Digests of files.


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files that have not changed for an hour, as far as the clock goes."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED", -1)
    made = [tmp_path / name for name in ("a", "b")]
    for number, file in enumerate(made):
        file.write_bytes(bytes([number]) * 5000)
    return made


def reads(files: list[Path]) -> tuple[int, list[str]]:
    """How often the work told of progress, which it does while it reads; and the digests."""
    digests._memory.cache_clear()  # as in a new process
    told = list(digests.digests(files))
    return len(told), result_of(digests.digests(files))


def test_an_unchanged_file_is_read_once(files: list[Path], tmp_path: Path) -> None:
    (first, made), (again, same) = reads(files), reads(files)
    assert (first, again) == (2, 0) and made == same and made[0] != made[1]
    link = tmp_path / "link"
    link.symlink_to(files[0])
    assert reads([link]) == (0, made[:1])


def test_a_change_is_seen_though_size_and_time_stay(files: list[Path]) -> None:
    _, before = reads(files)
    quietly(files[1], lambda data: data.__setitem__(100, 9))
    count, after = reads(files)
    assert count == 1 and after[0] == before[0] and after[1] != before[1]


def test_a_file_that_changed_just_now_is_not_remembered(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 2_000_000_000)
    assert reads(files)[0] == reads(files)[0] == 2


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', "{" * 5000])
def test_a_memory_that_cannot_be_used_is_none(files: list[Path], tmp_path: Path, text: str) -> None:
    _, expected = reads(files)
    memory = tmp_path / "cache" / "digests.json"
    memory.write_text(text)
    assert reads(files) == (2, expected)
    memory.unlink()
    memory.parent.rmdir()
    memory.parent.write_text("a file where the folder should be")
    assert reads(files) == (2, expected) == reads(files)

"""A merged folder does what the run's session does, in every library that loads it; and what does not is refused."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from backends import registry
from backends.interface import LoraSpec, ModelSpec, OptimSpec, TrainState
from backends.model_folder import ModelFolder, read_tensor
from finetune.commands import export
from finetune.data.collate import evaluation_batches
from finetune.data.tokenizer import encode_prompt
from finetune.disk.adapter import Adapter, read_adapter
from finetune.disk.model_writer import cast, write_weights
from finetune.disk.run_folder import RunFolder
from finetune.errors import EnvironmentProblem, ExitCode, ExportFailed, Incompatible, RecipeError
from finetune.export import folders, merge
from finetune.export.folders import quantise
from finetune.export.prompt import Prompts
from finetune.recipe.load import load_recipe
from tests.conformance.toy import toy_batch
from tests.tiny_models import family, model_with_tokenizer
from tests.unit.export.exported_run import Runs, made
from tests.unit.export.gguf_models import readers
from tests.unit.toy_run import load_job

KINDS = [("torch", "none"), ("torch", "4bit"), ("mlx", "4bit")]


def scores(session: Any, rows: Any) -> np.ndarray:
    found = [session.score(batch).logprob for _, batch in evaluation_batches(rows, 4096, False)]
    return np.concatenate([one.ravel() for one in found])


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_merged_float32_folder_scores_as_the_session_in_every_backend(
    runs: Runs, kind: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = runs(*kind), list[Path]()
    monkeypatch.setattr(export, "write_page", written.append)
    (run.path / "report.html").write_text("the page of before")
    path = made(run, "merged", "f32")
    told = json.loads((path / "export.json").read_text())
    assert told["holds"] and {check["holds"] for check in told["checks"]} == {"yes"}
    job = load_job(load_recipe(run.recipe))
    session = job.open()
    session.set_state(TrainState(0, read_adapter(run.adapter).tensors, {}))
    wanted = scores(session, job.prepared.held_out.examples)
    for backend in ("torch", "mlx"):
        loaded = folders.loaded_folder(path, job, backend)
        assert np.abs(scores(loaded.session, job.prepared.held_out.examples) - wanted).max() < 2e-5
    assert "exports, each verified" in (run.path / "report.txt").read_text() and written == [run.path]
    (run.path / "report.html").unlink()  # other tests export this run, too, which never finished
    assert f"mlx_lm.server --model {path}" in (run.path / "exports.txt").read_text()
    reader = AutoTokenizer.from_pretrained(path)
    for _, messages, _, text in Prompts(job.prepared, {}).rows():
        tokens = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokens == encode_prompt(job.tokenizer, text)
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (path / "chat_template.jinja").read_text()


def test_the_original_weights_are_not_what_a_quantised_run_was_trained_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "tensors", lambda *given: original(*given[:3], True))
    with pytest.raises(ExportFailed, match="log-probabilities"):
        made(runs("torch", "4bit"), "merged", "f32")


original = merge.tensors


@pytest.mark.parametrize("rows", ["text", "prompt", "chat"])
def test_rows_of_every_task_verify_an_export(runs: Runs, rows: str) -> None:
    path = made(runs("torch", "none", rows), "merged", "bf16")
    told = json.loads((path / "export.json").read_text())
    names = [check["name"] for check in told["checks"]]
    assert told["holds"] and ("answers" in names) == ("exact match" in names) == (rows != "text")


def test_a_folder_quantised_for_mlx_keeps_the_tuning(runs: Runs) -> None:
    path = made(runs("mlx", "4bit"), "mlx", None, 8)
    told = json.loads((path / "export.json").read_text())
    assert told["holds"] and told["name"] == "mlx-8bit"
    assert json.loads((path / "config.json").read_text())["quantization"]["bits"] == 8
    assert not (path / "merged").exists()


def _change(run: Any, bits: int) -> dict[str, Any]:
    """What is said of the change of the weights, whatever else an export with so many bits keeps of a small tuning."""
    with contextlib.suppress(ExportFailed):
        made(run, "mlx", None, bits, rows=4)
    path = max((run.path / "exports").glob(f"mlx-{bits}bit*/export.json"), key=lambda file: file.stat().st_mtime_ns)
    told = json.loads(path.read_text())["checks"]
    return dict(next(check for check in told if check["name"] == "change of the weights"))


@pytest.mark.parametrize("bits", [4, 6])
def test_quantising_again_on_the_grid_of_the_training_is_refused(
    runs: Runs, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training changed is less than half a step of the grid, so the merge into 4 bits rounds it away."""
    run = runs("mlx", "4bit")

    def little(run: RunFolder) -> Adapter:
        adapter = read_adapter(run.adapter)
        tensors = {name: one * 0.04 if name.endswith("lora_B") else one for name, one in adapter.tensors.items()}
        return Adapter(tensors, adapter.rank, adapter.scale)

    monkeypatch.setattr(export, "read_trained", little)
    assert _change(run, bits)["holds"] == "yes"
    monkeypatch.setattr(merge, "write_merged", lambda *given, original=False: _write_merged(*given))
    if bits == 4:
        with pytest.raises(ExportFailed, match=r"change of the weights: .*; use --bits 8, or --to merged"):
            made(run, "mlx", None, bits, rows=4)
    assert _change(run, bits)["holds"] == ("no" if bits == 4 else "yes")  # the finer grid holds it all the same


def test_a_base_that_mlx_has_packed_is_not_packed_again_without_a_word(tmp_path: Path) -> None:
    """Its own numbers are those of the grid: in 4 bits the change is lost, in 8 bits it is kept."""
    if reason := registry.probe("mlx"):
        pytest.skip(reason)
    _packed_by_mlx(model_with_tokenizer(tmp_path / "base"), tmp_path / "packed")
    base = ModelFolder.open(tmp_path / "packed")
    session, rng = _session(base, LoraSpec(2, 4.0), "mlx"), np.random.default_rng(0)
    state = {
        n: (rng.standard_normal(v.shape) * 0.03).astype(np.float32) for n, v in session.get_state().adapter.items()
    }
    adapter = Adapter(state, 2, 2.0)
    (merged := tmp_path / "merged").mkdir()
    _write_merged(merged, session, base, adapter, "f32")
    for file in (tmp_path / "base").glob("tokenizer*.json"):
        shutil.copyfile(file, merged / file.name)
    holds = []
    for bits in (4, 8):
        quantise(merged, tmp_path / str(bits), bits, False)
        before, after = (merge.tensors(session, base, one, original=True) for one in (Adapter({}, 2, 0.0), adapter))
        holds += [check.holds for check in folders.change_checks(tmp_path / str(bits), before, after, adapter)]
    assert holds == ["no", "yes"]


def _alpha(adapter: Adapter) -> Adapter:
    return Adapter(adapter.tensors, adapter.rank, adapter.scale * 8)


def _transposed(weight: Any, adapter: Adapter, module: str) -> Any:
    a, b = (adapter.tensors[f"{module}.lora_{part}"] for part in "AB")
    delta = adapter.scale * b @ a
    return weight + (delta.T if delta.shape[0] == delta.shape[1] else delta)


def _config(change: Any) -> Any:
    def write(to: Path, *given: Any, **named: Any) -> Any:
        written = _write_merged(to, *given, **named)
        config = json.loads((to / "config.json").read_text())
        change(config)
        (to / "config.json").write_text(json.dumps(config))
        return written

    return write


def _theta(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 100.0


def _tokenizer(change: Any) -> Any:
    def write(to: Path, folder: Any, tokenizer: Any, template: str) -> None:
        _write_tokenizer(to, folder, tokenizer, template)
        change(to, tokenizer)

    return write


def _base_template(to: Path, tokenizer: Any) -> None:
    (to / "chat_template.jinja").write_text(tokenizer.chat_template)


def _no_end(to: Path, tokenizer: Any) -> None:
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))


def _other_tokens(to: Path, tokenizer: Any) -> None:
    whole = json.loads((to / "tokenizer.json").read_text())
    whole["model"]["merges"] = []
    (to / "tokenizer.json").write_text(json.dumps(whole))


_write_merged, _write_tokenizer, _merged = merge.write_merged, folders.write_tokenizer, merge.merged
FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "alpha x 8": (merge, "merged", lambda w, a, m: _merged(w, _alpha(a), m), "log-probabilities"),
    "B A transposed": (merge, "merged", _transposed, "log-probabilities"),
    "the adapter is not applied": (merge, "merged", lambda weight, adapter, module: weight, "log-probabilities"),
    "another theta": (merge, "write_merged", _config(_theta), "log-probabilities"),
    "the base's template": (folders, "write_tokenizer", _tokenizer(_base_template), "prompts"),
    "no end token": (folders, "write_tokenizer", _tokenizer(_no_end), "answers"),
    "other tokens": (folders, "write_tokenizer", _tokenizer(_other_tokens), "tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_by_name(runs: Runs, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong, caught_by = FAULTS[fault]
    run = runs("torch", "none")
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(ExportFailed, match=caught_by) as refusal:
        made(run, "merged", "f16")
    assert refusal.value.exit_code == ExitCode.EXPORT == 9
    failed = run.path / "exports" / "merged-f16.failed"
    told = json.loads((failed / "export.json").read_text())
    assert not told["holds"] and caught_by in [check["name"] for check in told["checks"] if check["holds"] == "no"]
    assert str(failed) in str(refusal.value) and not (run.path / "exports" / "merged-f16").exists()
    monkeypatch.undo()


def test_bytes_that_change_on_the_disk_are_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(to: Path, *given: Any, **named: Any) -> Any:
        written = _write_merged(to, *given, **named)
        with (to / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x01\x01")
        return written

    monkeypatch.setattr(merge, "write_merged", write)
    with pytest.raises(ExportFailed, match="file: 1 differ"):
        made(runs("torch", "none"), "merged", "bf16")


def test_a_success_takes_away_what_failed_before(runs: Runs) -> None:
    run = runs("torch", "none")
    failed = run.path / "exports" / "merged-bf16.failed"
    failed.mkdir(parents=True, exist_ok=True)
    (failed / "export.json").write_text("{}")
    made(run, "merged", "bf16")
    assert not failed.exists() and (run.path / "exports" / "merged-bf16" / "model.safetensors").exists()


def test_another_folder_is_not_overwritten(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RecipeError, match="is no export"):
        made(runs("torch", "none"), "merged", output=tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "dora"), [("gemma3_text", False), ("phi3", False), ("qwen3", False), ("phi3", True), ("qwen2", True)]
)
def test_other_families_merge_to_the_same_model(tmp_path: Path, name: str, dora: bool) -> None:
    """Tied embeddings, fused layers, biases and norms that are stored otherwise: all tensors keep name and numbers."""
    folder = ModelFolder.open(family(name, tmp_path / "base"))
    lora = LoraSpec(2, 4.0, dora=dora)
    session = _session(folder, lora)
    rng = np.random.default_rng(0)
    state = {n: rng.standard_normal(v.shape).astype(np.float32) * 0.1 for n, v in session.get_state().adapter.items()}
    session.set_state(TrainState(0, state, {}))
    to = tmp_path / "merged"
    to.mkdir()
    _write_merged(to, session, folder, Adapter(state, 2, 2.0), "f32")
    batch = toy_batch()
    again = _session(ModelFolder.open(to), LoraSpec(1, 1.0))
    assert np.abs(again.score(batch).logprob - session.score(batch).logprob).max() < 2e-5


def _packed_by_bitsandbytes(base: Path, to: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=four).save_pretrained(to)


def _packed_by_mlx(base: Path, to: Path) -> None:
    quantise(base, to, 4, False)


@pytest.mark.parametrize(("backend", "pack"), [("mlx", _packed_by_mlx), ("torch", _packed_by_bitsandbytes)])
def test_a_base_that_is_quantised_on_the_disk_merges_to_numbers(tmp_path: Path, backend: str, pack: Any) -> None:
    """MLX packs embeddings and output layer too. Nothing of the packing is left."""
    if reason := registry.probe(backend):
        pytest.skip(reason)
    pack(model_with_tokenizer(tmp_path / "base"), tmp_path / "packed")
    base = ModelFolder.open(tmp_path / "packed")
    session = _session(base, LoraSpec(2, 4.0), backend)
    rng = np.random.default_rng(0)
    state = {n: rng.standard_normal(v.shape).astype(np.float32) * 0.1 for n, v in session.get_state().adapter.items()}
    session.set_state(TrainState(0, state, {}))
    (to := tmp_path / "merged").mkdir()
    _write_merged(to, session, base, Adapter(state, 2, 2.0), "f32")
    assert not {"quantization", "quantization_config"} & set(json.loads((to / "config.json").read_text()))
    batch = toy_batch()
    for name in ("mlx", "torch"):
        again = _session(ModelFolder.open(to), LoraSpec(1, 1.0), name)
        assert np.abs(again.score(batch).logprob - session.score(batch).logprob).max() < 2e-5


def _session(folder: ModelFolder, lora: LoraSpec, backend: str = "torch") -> Any:
    return registry.open_session(backend, ModelSpec(folder.path, dtype="float32", folder=folder), lora, OptimSpec(), 0)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_weights_are_sharded_and_read_as_transformers_reads_them(tmp_path: Path, kind: Any) -> None:
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    rng = np.random.default_rng(1)
    tensors = {f"t{i}.weight": rng.standard_normal((8, 16)).astype(np.float32) for i in range(5)}
    shapes = {name: one.shape for name, one in tensors.items()}
    write_weights(tmp_path, shapes, readers(tensors), kind, largest=3 * 8 * 16 * 2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1 and files[0] == f"model-00001-of-0000{len(files)}.safetensors"
    number = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    for name, file in index["weight_map"].items():
        read = safetensors.load_file(tmp_path / file)[name]
        assert read.dtype == number and torch.equal(read, torch.from_numpy(tensors[name]).to(number))
        assert np.array_equal(read_tensor(tmp_path / file, name), read.float().numpy())


def served(
    target: Any, path: Path, rank: int = 8, quantize: str = "none", packed: Any = (), method: str = "lora"
) -> list[list[str]]:
    recipe = SimpleNamespace(lora=SimpleNamespace(rank=rank), quantize=quantize, method=method)
    job: Any = SimpleNamespace(recipe=recipe, folder=SimpleNamespace(path=Path("/base"), packed=packed))
    return [shlex.split(line) for line in target.commands(path, job, Path("/runs/it's, a = b/adapter"))]


def test_servers_are_told_what_they_would_not_do_by_themselves(tmp_path: Path) -> None:
    """vLLM serves float32 as float16, and no server runs a model's own code, unless it is asked to."""
    half, whole = (served(folders.MergedFolder(f"merged-{kind}", kind), tmp_path) for kind in ("f16", "f32"))
    assert [half[0], half[2]] == [["vllm", "serve", str(tmp_path)], ["mlx_lm.server", "--model", str(tmp_path)]]
    assert whole == [[*half[0], "--dtype", "float32"], half[2]]
    (tmp_path / "modeling_own.py").write_text("")
    for target in (folders.MergedFolder("merged-f16", "f16"), folders.QuantisedFolder("mlx-4bit", "4bit")):
        assert all(words[-1] == "--trust-remote-code" for words in served(target, tmp_path))
    assert [words[0] for words in served(folders.QuantisedFolder("mlx-4bit", "4bit"), tmp_path)] == ["mlx_lm.server"]


@pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (16, 16), (64, 64), (257, 320), (512, 512)])
def test_vllm_takes_the_adapter_with_a_rank_that_it_fits_in(rank: int, most: int, tmp_path: Path) -> None:
    """Its parser: --max-lora-rank is one of a few numbers; a module is JSON, or name=path without more = or commas."""
    words = served(folders.MergedFolder("merged-bf16", "bf16"), tmp_path, rank)[1]
    assert words[:3] == ["vllm", "serve", "/base"] and words[words.index("--max-lora-rank") + 1] == str(most)
    module = json.loads(words[words.index("--lora-modules") + 1])
    assert module == {"name": "tuned", "path": "/runs/it's, a = b/adapter"} and "--enable-lora" in words
    assert words[words.index("--chat-template") + 1] == str(tmp_path / "chat_template.jinja")
    assert words[words.index("--generation-config") + 1] == str(tmp_path)


@pytest.mark.parametrize("given", [{"rank": 513}, {"quantize": "4bit"}, {"packed": {"a"}}, {"method": "full"}])
def test_vllm_is_not_given_an_adapter_that_is_not_the_run_s_model_there(given: Any, tmp_path: Path) -> None:
    assert "--enable-lora" not in str(served(folders.MergedFolder("merged-bf16", "bf16"), tmp_path, **given))


def test_weights_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    folder = ModelFolder.open(model_with_tokenizer(tmp_path))
    name = next(iter(folder.lora_modules(LoraSpec(1, 1.0))))
    packed: Any = SimpleNamespace(scheme="nf4", base_weight=lambda module: np.zeros((3, 5), np.float32))
    with pytest.raises(Incompatible, match=rf"{name}\.weight has the shape \[3, 5\], not \["):
        merge.tensors(packed, folder, Adapter({}, 1, 1.0))[f"{name}.weight"]()


def test_numbers_beyond_float16_are_refused() -> None:
    with pytest.raises(EnvironmentProblem, match="--type bf16"):
        cast(np.array([1e5], np.float32), "f16", "a.weight")


def test_safetensors_itself_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.bias": np.zeros((0,), np.float32)}
    write_weights(tmp_path, {name: one.shape for name, one in tensors.items()}, readers(tensors), "f32")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])

"""A GGUF export does in llama.cpp what the run's session does; each fault that such files are known for is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.interface import TrainState
from backends.model_folder import ModelFolder
from finetune.data.tokenizer import answer_text, encode_prompt, load_tokenizer
from finetune.disk.adapter import Adapter, read_adapter
from finetune.errors import EnvironmentProblem, ExportFailed
from finetune.export import families, gguf_export, gguf_file, merge, packages, vocabulary
from finetune.export.engine import Engine
from finetune.export.gguf_export import loaded_gguf
from finetune.export.prompt import Prompts
from finetune.recipe.load import load_recipe
from tests.unit.export.exported_run import Runs, made
from tests.unit.export.gguf_models import chat, engine, write
from tests.unit.export.test_travelling_prompt import KINDS, prepared, travelling
from tests.unit.toy_run import load_job

for package in ("gguf", "xllamacpp"):
    pytest.importorskip(package)


def told(path: Path) -> dict[str, Any]:
    return json.loads((path / "export.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "quantize"), [("f32", "4bit"), ("f16", "none"), ("q8_0", "none")])
def test_a_file_does_what_the_session_does(runs: Runs, kind: str, quantize: str) -> None:
    run = runs("torch", quantize)
    path = made(run, "gguf", kind)
    assert path.name == f"gguf-{kind}" and told(path)["holds"]
    assert f"llama-server -m {path}/model.gguf --jinja" in (run.path / "exports.txt").read_text()


def test_k_quants_keep_most_of_the_tuning(runs: Runs) -> None:
    pytest.importorskip("libgguf")
    path = made(runs("torch"), "gguf", "q4_k_m")
    kept = next(check for check in told(path)["checks"] if check["name"] == "tuning that is kept")
    assert float(kept["result"].partition("%")[0]) > 90


def test_the_adapter_alone_does_the_same_on_its_base(runs: Runs) -> None:
    path = made(runs("torch"), "gguf", None, None, True)
    assert sorted(file.name for file in path.iterdir()) == ["adapter.gguf", "chat_template.jinja", "export.json"]
    assert told(path)["holds"]


ASKED = ["classification", "prompt", "alpaca", "chat"]


@pytest.mark.parametrize(
    ("rows", "count"),
    [*((rows, 12) for rows in ASKED), *(pytest.param(rows, 50, marks=pytest.mark.slow) for rows in ASKED)],
)
def test_answers_of_the_chat_endpoint_are_the_answers_of_the_run(runs: Runs, rows: str, count: int) -> None:
    run = runs("torch", "none", rows, count)
    path = run.path / "exports" / "gguf-f16"
    path = path if path.exists() else made(run, "gguf", "f16", rows=12)
    assert told(path)["holds"]
    job = load_job(load_recipe(run.recipe))
    session = job.open()
    session.set_state(TrainState(0, read_adapter(run.adapter).tensors, {}))
    reader = loaded_gguf(job, path / "model.gguf").session
    assert isinstance(reader, Engine)
    stop, tokenizer = job.prepared.stop_tokens, job.tokenizer
    asked = list(Prompts(job.prepared, {}).rows())
    prompts = [example.prompt_tokens.tolist() for example in job.prepared.held_out.examples]
    assert len(asked) == len(prompts) == count
    answers = []
    for (_, messages, *_), tokens in zip(asked, session.generate(prompts, 12, stop), strict=True):
        text, ended = chat(reader, messages, 12)
        answers.append(answer_text(tokenizer, tokens, stop))
        assert text.strip() == answers[-1] and ended == (len(tokens) < 12)
    assert {"positive", "negative"} <= set(answers)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_writes_the_prompts_of_the_run(exportable_model: Path, kind: str, tmp_path: Path) -> None:
    """Its own engine of templates, on every way in which a recipe writes prompts."""
    rows, prompt, _ = KINDS[kind]
    tokenizer = load_tokenizer(ModelFolder.open(exportable_model))
    found = prepared(tmp_path, rows, prompt, tokenizer)
    always = {"about": "Rome"} if "always" in kind else {}
    write(exportable_model, tmp_path / "model.gguf", "f16", travelling(found, tokenizer, always)[0])
    reader = engine(tmp_path / "model.gguf")
    for _, messages, tools, text in Prompts(found, always).rows(found.train.records):
        assert reader.tokenise(reader.render(messages, tools)) == encode_prompt(tokenizer, text), messages


_converted, _special, _merged, _family = (
    families.Family.converted, vocabulary._special, merge.merged, families.family_of,
)  # fmt: skip


def _not_permuted(self: families.Family, name: str, tensor: Any) -> Any:
    return _converted(replace(self, permuted={}), name, tensor)


def _shifted(self: families.Family, name: str, tensor: Any) -> Any:
    return _converted(replace(self, norm_shift=1.0), name, tensor)


def _theta(folder: Any) -> Any:
    found = _family(folder)
    return replace(found, keys=found.keys | {f"{found.architecture}.rope.freq_base": 100.0})


def _no_end(tokenizer: Any, count: int) -> Any:
    keys = {name: value for name, value in _special(tokenizer, count).items() if "eot" not in name}
    return keys | {"tokenizer.ggml.eos_token_id": 0}


def _alpha(weight: Any, adapter: Adapter, module: str) -> Any:
    return _merged(weight, replace(adapter, scale=adapter.scale * 8), module)


def _transposed(weight: Any, adapter: Adapter, module: str) -> Any:
    delta = _merged(weight * 0, adapter, module)
    return weight + (delta.T if delta.shape[0] == delta.shape[1] else delta)


FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "heads are not permuted": (families.Family, "converted", _not_permuted, "log-probabilities"),
    "norms are shifted": (families.Family, "converted", _shifted, "log-probabilities"),
    "another theta": (gguf_file, "family_of", _theta, "log-probabilities"),
    "the base's template": (gguf_file, "vocabulary", None, "prompts"),
    "no end token": (vocabulary, "_special", _no_end, "answers"),
    "alpha x 8": (merge, "merged", _alpha, "log-probabilities"),
    "B A transposed": (merge, "merged", _transposed, "log-probabilities"),
    "the adapter is not applied": (merge, "merged", lambda weight, adapter, module: weight, "log-probabilities"),
}


def _base_template(folder: Any, template: str) -> Any:
    return _vocabulary(folder, (folder.path / "chat_template.jinja").read_text())


_vocabulary = gguf_file.vocabulary


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_by_the_check_that_sees_it(
    runs: Runs, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, wrong, caught_by = FAULTS[fault]
    monkeypatch.setattr(place, name, wrong or _base_template)
    run = runs("torch")
    with pytest.raises(ExportFailed, match=caught_by):
        made(run, "gguf", "f16", rows=8)
    failed = told(run.path / "exports" / "gguf-f16.failed")
    assert caught_by in [check["name"] for check in failed["checks"] if check["holds"] == "no"]


def test_without_the_packages_it_says_what_to_install(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(packages, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(EnvironmentProblem, match=r'pip install "recipe-finetune\[gguf\]"'):
        made(runs("torch"), "gguf", "q6_k")
    assert not list((runs("torch").path / "exports").glob("gguf-q6_k*"))


def test_a_file_that_was_changed_is_refused(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: Path, *given: Any) -> Any:
        written = gguf_file.write_model(file, *given)
        with file.open("r+b") as opened:
            opened.seek(-64, 2)
            opened.write(b"\x42" * 64)
        return written

    monkeypatch.setattr(gguf_export, "write_model", write)
    with pytest.raises(ExportFailed, match="file: 1 differ"):
        made(runs("torch"), "gguf", "bf16", rows=4)

"""An adapter's layers under the names of the library that loads it, and the check of every written folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import libraries
from backends.interface import LoraSpec
from backends.model_folder import ModelFolder
from finetune.disk.adapter import read_adapter
from finetune.disk.adapter_check import in_words, loadings
from finetune.disk.adapter_writer import write_adapter
from tests.conformance.toy import Case, random_adapter, toy_batch

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from backends.torch_backend import tree  # noqa: E402
from tests.tiny_families import published  # noqa: E402
from tests.tiny_models import FAMILIES as USUAL  # noqa: E402
from tests.tiny_models import family  # noqa: E402

FAMILIES = (
    "gemma3", "mistral3", "qwen3_vl", "qwen3_5", "gemma4", "granite4", "granite4_h_moe", "lfm2", "qwen3_moe",
    "granite4_h", "olmo3", "ministral3", "gemma4_e2b", "gemma4_moe", "qwen3_5_moe", "qwen3_5_text", *USUAL,
)  # fmt: skip
LORA = LoraSpec(4, 8.0)
BATCH = toy_batch()
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("bases") / name
            made[name] = family(name, folder) if name in USUAL else published(name, folder)
        return made[name]

    return base


def written(base: Path, folder: Path, lora: LoraSpec = LORA, backend: str = "torch") -> np.ndarray:
    """A random adapter of the base, written to `folder`; log-probabilities of the batch's targets. [B, T]"""
    session = Case(backend, base).open(lora=lora)
    state = random_adapter(session)
    session.set_state(state)
    folder.mkdir()
    opened = ModelFolder.open(base)
    write_adapter(folder, state.adapter, lora, str(base), opened.blocks, {}, opened)
    return session.score(BATCH).logprob


def chosen(logits: np.ndarray) -> np.ndarray:
    """log p of each supervised target from logits [B, T, V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprob = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logprob, BATCH.targets[..., None], axis=-1)[..., 0] * (BATCH.weights > 0)


def in_peft(base: Path, adapter: Path, lacking: bool = False) -> np.ndarray:
    """lacking: PEFT is to say that the folder lacks layers that it adapts."""
    config = transformers.AutoConfig.from_pretrained(base)
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(base, dtype=torch.float32)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments") as warned:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert any("missing adapter keys" in str(one.message) for one in warned) == lacking
    with torch.no_grad():
        return chosen(model(input_ids=torch.from_numpy(BATCH.inputs.astype(np.int64))).logits.numpy())


def in_mlx_lm(base: Path, adapter: Path) -> np.ndarray:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    config = ModelFolder.open(base).config
    model = load_adapters(load_model(base, model_config=config)[0], str(adapter))
    model.eval()
    return chosen(np.array(model(mx.array(BATCH.inputs)).astype(mx.float32)))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_libraries_load_the_folder_as_it_is(name: str, tmp_path: Path, base_of: Callable[[str], Path]) -> None:
    base = base_of(name)
    ours = written(base, tmp_path / "adapter")
    assert np.abs(in_peft(base, tmp_path / "adapter") - ours).max() < 1e-5
    again = written(base, tmp_path / "the same", backend="mlx")
    assert np.abs(in_mlx_lm(base, tmp_path / "adapter") - again).max() < 3e-5
    for file in ("adapter_model.safetensors", "adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "the same" / file).read_bytes()
    checked = loadings(tmp_path / "adapter", ModelFolder.open(base))
    assert [(one.library, one.fits, one.reason) for one in checked] == [("mlx-lm", True, ""), ("PEFT", True, "")]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "granite4"])
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_folder_is_read_back_as_it_was(
    name: str, backend: str, tmp_path: Path, base_of: Callable[[str], Path]
) -> None:
    some = LoraSpec(4, 8.0, layers=1)
    ours = written(base_of(name), tmp_path / "adapter", some)
    session = Case(backend, base_of(name)).open(lora=some)
    session.set_state(type(session.get_state())(0, read_adapter(tmp_path / "adapter").tensors, {}))
    np.testing.assert_allclose(session.score(BATCH).logprob, ours, atol=1e-4)


def changed(file: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    save_file({name: tensor.copy() for name, tensor in change(load_file(file)).items()}, file)


FAULTS: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "another prefix": (lambda t: {n.replace("layers.", "blocks.", 1): v for n, v in t.items()}, "are not looked for"),
    "a layer less": (lambda t: dict(sorted(t.items())[2:]), "2 of 28 tensors are missing"),
    "a layer more": (lambda t: t | {f"{n}.more": v for n, v in sorted(t.items())[:1]}, "1 of 29 tensors"),
    "a tensor turned": (lambda t: {n: v.T if v.shape[0] == 128 or v.shape[1] == 128 else v for n, v in t.items()},
                        "and must be"),
    "no tensor": (lambda t: {}, "28 of 28 tensors are missing"),
}  # fmt: skip


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_with_the_library(
    fault: str, file: str, tmp_path: Path, base_of: Callable[[str], Path]
) -> None:
    base, adapter = base_of("llama"), tmp_path / "adapter"
    written(base, adapter)
    change, words = FAULTS[fault]
    changed(adapter / file, change)
    library, other = ("mlx-lm", "PEFT") if file == "adapters.safetensors" else ("PEFT", "mlx-lm")
    lines = list(in_words(loadings(adapter, ModelFolder.open(base))))
    assert lines[0] == f"checked: {other} finds every layer of it"
    assert lines[1].startswith(f"{library} does not load it: ") and words in lines[1]


def test_a_config_that_names_other_layers_is_seen(tmp_path: Path, base_of: Callable[[str], Path]) -> None:
    base, adapter = base_of("llama"), tmp_path / "adapter"
    written(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"].remove("q_proj")
    config["lora_parameters"]["keys"].remove("self_attn.k_proj")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    words = list(in_words(loadings(adapter, ModelFolder.open(base))))
    assert len(words) == 2 and all("4 of 28 tensors are not looked for" in line for line in words)


def test_a_library_that_refuses_the_layers_is_named_with_its_reason(tmp_path: Path) -> None:
    base = family("mamba2", tmp_path / "base", num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16)
    model = ModelFolder.open(base)
    (tmp_path / "adapter").mkdir()
    tensors = {
        f"{module}.lora_{part}": np.zeros((4, inputs) if part == "A" else (outputs, 4), np.float32)
        for module, (outputs, inputs) in model.lora_modules(LORA).items()
        for part in "AB"
    }
    write_adapter(tmp_path / "adapter", tensors, LORA, str(base), model.blocks, {}, model)
    found = {one.library: one for one in loadings(tmp_path / "adapter", model)}
    assert found["PEFT"].fits is False and "does not adapt out_proj in models of type mamba2" in found["PEFT"].reason


ATTENTION = LoraSpec(4, 8.0, targets=("o_proj",))


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning", "ignore:Found missing adapter")
@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe", "glm4_moe_lite"])
def test_layers_that_peft_takes_for_experts_are_named(
    name: str, tmp_path: Path, base_of: Callable[[str], Path]
) -> None:
    """PEFT adapts the experts in their place, and leaves them out."""
    base, model = base_of(name), ModelFolder.open(base_of(name))
    ours = written(base, tmp_path / "all")
    assert np.abs(in_peft(base, tmp_path / "all", lacking=True) - ours).max() > 0.1
    found = {one.library: one for one in loadings(tmp_path / "all", model)}["PEFT"]
    assert found.fits is False and "it takes down_proj, gate_proj, up_proj for layers of experts" in found.reason
    assert "_proj and " in found.reason and "leave these out of lora.targets" in found.reason
    ours = written(base, tmp_path / "attention", ATTENTION)
    assert np.abs(in_peft(base, tmp_path / "attention") - ours).max() < 1e-5
    assert {one.library: one for one in loadings(tmp_path / "attention", model)}["PEFT"].fits


def test_what_is_known_of_experts_in_peft_is_what_peft_has() -> None:
    weights = pytest.importorskip("peft.utils.transformers_weight_conversion")
    assert {kind: {*names} for kind, names in weights._MOE_TARGET_MODULE_MAPPING.items()} == tree._OF_EXPERTS
    taken = {kind for kind, like in weights._MODEL_TO_CONVERSION_PATTERN.items() if like in tree._OF_EXPERTS}
    assert taken >= {"qwen3_next", "mixtral"} and "qwen2_moe" not in taken


def test_what_mlx_lm_computes_otherwise_is_said(tmp_path: Path, base_of: Callable[[str], Path]) -> None:
    base = base_of("gpt_oss_mxfp4")
    ours = written(base, tmp_path / "adapter", backend="mlx")
    assert 1e-4 < np.abs(in_mlx_lm(base, tmp_path / "adapter") - ours).max() < 0.1
    lines = list(in_words(loadings(tmp_path / "adapter", ModelFolder.open(base))))
    assert lines[0] == "checked: mlx-lm and PEFT find every layer of it"
    assert lines[1:] == [
        "mlx-lm computes this model a little otherwise than transformers and this run: it rounds the ends of YaRN's "
        "ramp, which this model does not"
    ]


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_vl", "qwen3_5", "qwen3_5_text", "gemma4", "lfm2"])
def test_without_the_libraries_a_rule_gives_the_same_names(
    name: str, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder.open(base_of(name))
    modules = folder.lora_modules(LORA)
    derived = {library: module.names(folder, modules) for library, module in libraries.by_name().items()}
    without_libraries(monkeypatch)
    assert {library: module.names(folder, modules) for library, module in libraries.by_name().items()} == derived


def test_a_library_that_is_not_installed_is_not_said_to_load_it(
    tmp_path: Path, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(base_of("llama"), tmp_path / "adapter")
    without_libraries(monkeypatch)
    words = list(in_words(loadings(tmp_path / "adapter", ModelFolder.open(base_of("llama")))))
    assert [line.split(":")[0] for line in words] == ["not checked for mlx-lm", "not checked for PEFT"]


def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("torch", "mlx"):
        monkeypatch.setitem(sys.modules, f"backends.{backend}_backend.tree", None)
